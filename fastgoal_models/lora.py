"""LoRA (arXiv 2106.09685) for FAST-GOAL, by Hugging Face's peft.

Two small matrices beside a weight W train in its place: it acts as W + B A. They stand beside the
queries, keys and values of every block's attention and beside both layers of its MLP. The
attention's output layer has none: nn.MultiheadAttention reads its weight without calling it, and
peft's way around that adds B A to W and subtracts it again in every forward pass, after which W is
no longer the same to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ConfigError, UserError, how_to_install
from .fast_goal import FastGoalModel
from .options import tensors_digest

_ADAPTER = "default"  # peft's own name for the only one


class LoraError(UserError, RuntimeError):
    """peft is missing or too old, or adapters belong to other weights; the message says what."""


def check_lora(rank: int) -> None:
    """Raises ConfigError for a rank below 1, LoraError where peft is missing or older than 0.17."""
    _config(rank)


class LoraAdapters:
    """Adapters that were put into a model, in place; from then on only they and the scale train.

    It is `fastgoal_models.training.Adapters`: a checkpoint's `model.safetensors` holds the merged
    weights, which load into a model without adapters, and its state the adapters alone.

    Args:
        model: its parameters stop training, except for the logit scale; B starts at zero, so that
            the model gives what it gave before.
        rank: columns of B and rows of A; the product is not scaled (peft's alpha is the rank).
        seed: of A's random numbers.

    Raises what `check_lora` does.
    """

    def __init__(self, model: FastGoalModel, rank: int, seed: int = 0) -> None:
        config = _config(rank)
        from peft import inject_adapter_in_model

        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)  # stops the training of everything else
        model.clip.logit_scale.requires_grad_(True)
        self.model = model
        self._base = self._digest()

    def merged(self) -> dict[str, Tensor]:
        """The state dict of a model without adapters that gives the same results."""
        from peft.tuners.lora import LoraLayer

        weights = {
            name.replace(".base_layer", ""): tensor.detach()
            for name, tensor in self.model.state_dict().items()
            if ".lora_" not in name
        }
        with torch.no_grad():
            for name, layer in self.model.named_modules():
                if isinstance(layer, LoraLayer):
                    name = f"{name}.{getattr(layer, 'parameter_name', 'weight')}"
                    product = cast(Any, layer).get_delta_weight(_ADAPTER)
                    weights[name] = weights[name] + product
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The weights that train, by name, and a digest of those that do not."""
        trained = {name: parameter.detach() for name, parameter in self._trained().items()}
        return {"weights": trained, "base": self._base}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises LoraError if the other weights differ."""
        if state["base"] != self._base:
            raise LoraError(
                "these adapters were trained beside other weights. Fix: give the same --pretrained "
                "file, unchanged, and the same --seed"
            )
        trained = self._trained()
        if state["weights"].keys() != trained.keys():
            raise LoraError("these adapters are of another model. Fix: give the same --model")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["weights"][name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _digest(self) -> str:
        # Of sorted names: in a forward pass peft takes weights out of their modules and puts them
        # back last.
        state, trained = self.model.state_dict(), self._trained()
        return tensors_digest({name: state[name] for name in state if name not in trained})


def _config(rank: int) -> Any:
    if rank < 1:
        raise ConfigError(f"--lora must be at least 1; got {rank}")
    try:
        from peft import LoraConfig

        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=r".*\.resblocks\.\d+\.mlp\.(c_fc|c_proj)",
            target_parameters=["attn.in_proj_weight"],
        )
    except (ImportError, TypeError) as error:  # TypeError: it has no target_parameters yet
        raise LoraError(f"--lora: {error}. Fix: {how_to_install('lora')}") from error

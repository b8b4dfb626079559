"""What a checkpoint holds of a run, and what a resumed run must agree on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoints import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from .config import TrainConfig

# These say where and how often to write, how fast to read, and how often to look: a resumed run may
# change them.
_FREE_TO_CHANGE = ("out", "save_every", "keep", "num_workers", "eval_every", "keep_best")


class Adapters(Protocol):
    """Small weights that train beside a model's own, which stay as they were when it was built."""

    def merged(self) -> dict[str, Tensor]:
        """The state dict of a model without them that gives the same results."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Raises RuntimeError where they were trained beside other weights than the model's."""
        ...


class TrainState:
    """What a run changes as it goes, all of which a checkpoint holds.

    `model` is on `device` already. `skipped` counts steps whose gradient overflowed fp16, and
    `saved` is the newest checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        adapters: Adapters | None,
        device: torch.device,
    ) -> None:
        self.model, self.adapters, self.device = model, adapters, device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.trained, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average = _moving_average(model, config)
        self.done, self.skipped = 0, 0
        self.saved: Path | None = None
        self._parts: dict[str, Any] = {"optimizer": self.optimizer, "scaler": self.scaler}
        if self.average is not None:
            self._parts["ema"] = self.average
        if adapters is not None:
            self._parts["adapters"] = adapters

    @property
    def judged(self) -> nn.Module:
        """What an evaluation looks at: the model, or the moving average of its weights."""
        # The average is a model of its own, so that the weights that train stay untouched.
        return self.model if self.average is None else self.average.module

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from there. Raises CheckpointError where it is one of another model."""
        try:
            if self.adapters is None:  # else its weights are merged ones; the model has its own
                self.model.load_state_dict(checkpoint.weights)
            for name, part in self._parts.items():
                part.load_state_dict(checkpoint.state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this model: {error}") from error
        _set_random_states(checkpoint.state["random"], self.device)
        self.done, self.saved = checkpoint.step, checkpoint.path
        self.skipped = checkpoint.state.get("skipped_steps", 0)  # older runs did not count

    def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Write a checkpoint of the steps that are done (see `save_checkpoint`)."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state["random"] = _random_states(self.device)
        state["skipped_steps"] = self.skipped
        weights = self.model.state_dict() if self.adapters is None else self.adapters.merged()
        self.saved = save_checkpoint(folder, self.done, weights, state, run)


def run_identity(config: TrainConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must agree on, as it looks after a trip through JSON."""
    fixed = {name: value for name, value in asdict(config).items() if name not in _FREE_TO_CHANGE}
    return json.loads(json.dumps(fixed | dict(more)))


def find_checkpoint(folder: Path, resume: bool | Path, run: Mapping[str, Any]) -> Checkpoint:
    path = latest_checkpoint(folder) if isinstance(resume, bool) else resume
    if path is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint to resume from")
    checkpoint = load_checkpoint(path)
    names = sorted(run.keys() | checkpoint.config.keys())
    differing = [
        f"{name} was {checkpoint.config.get(name)!r}, is now {run.get(name)!r}"
        for name in names
        if checkpoint.config.get(name) != run.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to a run that was started differently: {'; '.join(differing)}. "
            "Resume with the old values, or start again in another folder"
        )
    return checkpoint


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as if nothing had been drawn here."""
    states = _random_states(device)
    try:
        yield
    finally:
        _set_random_states(states, device)


def _optimizer(
    trained: list[nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    # Vectors and scalars are norms, biases, the class embedding and the logit scale: pulling those
    # to zero is not regularisation.
    matrices = [p for p in trained if config.decay_all or p.ndim >= 2]
    vectors = [p for p in trained if not (config.decay_all or p.ndim >= 2)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=device.type in ("cuda", "cpu"),
    )


def _moving_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    if config.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=False)


def _random_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

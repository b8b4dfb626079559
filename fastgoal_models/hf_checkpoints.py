"""CLIP's weights under Hugging Face's names and under open_clip's, without loss either way.

Both are the same ViT and text transformer. Hugging Face keeps queries, keys and values apart, and
its projections are linear layers, the transposes of open_clip's matrices. GOAL's checkpoints are
Hugging Face's; FAST-GOAL's training here, and open_clip's, use the other.

What neither holds is the activation: OpenAI's weights, and those trained from them, need QuickGELU,
most others GELU. Hugging Face says so in `config.json` (`hidden_act`), open_clip in the model's
configuration (`quick_gelu`, the models called `...-quickgelu`). The wrong one raises no error and
costs much of the accuracy.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError

_TRANSPOSED = {"text_projection", "visual.proj"}
_NOT_WEIGHTS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}  # of open_clip
_WRAPPERS = ("module.", "_orig_mod.", "model.", "clip.")  # DDP, torch.compile, ..., FastGoalModel
_IN_CHECKPOINTS = ("state_dict", "model_state_dict", "model", "module")
_IN_FOLDERS = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


class HfCheckpointError(UserError, ValueError):
    """These weights can not be read or converted; the message names what is missing or too much."""


@dataclass(frozen=True)
class ClipSizes:
    """What a CLIP's weights tell about it."""

    image_width: int
    image_layers: int
    image_mlp_width: int
    patch_size: int
    image_size: int
    text_width: int
    text_layers: int
    text_mlp_width: int
    text_positions: int
    vocabulary: int
    embed_dim: int


@dataclass(frozen=True)
class ClipSettings:
    """What they do not tell, though the features depend on it."""

    image_heads: int
    text_heads: int
    activation: str  # "quick_gelu" or "gelu"


def layout_of(names: Iterable[str]) -> str | None:
    """Whose names these are: "hf", "open-clip", or None where they are neither's."""
    joined = "\n".join(names)
    if "text_model." in joined or "vision_model." in joined:
        return "hf"
    return "open-clip" if ".resblocks." in joined else None


def open_clip_from_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a Hugging Face `CLIPModel` as one of open_clip's `CLIP`.

    Values, dtypes and devices stay; tensors that need no rearranging are shared with the input.
    Position ids are left out, prefixes of wrappers (`module.` and the like) taken off.

    Raises HfCheckpointError, which lists them, for names that are missing or not CLIP's.
    """
    weights = _unwrapped(state_dict)
    weights = {name: x for name, x in weights.items() if not name.endswith(".position_ids")}
    table = _table(
        text_layers=_layers(weights, "text_model.encoder.layers."),
        image_layers=_layers(weights, "vision_model.encoder.layers."),
    )
    _check_names(weights, [name for names in table.values() for name in names], "Hugging Face")
    converted = {}
    for name, hf_names in table.items():
        parts = [weights[hf_name] for hf_name in hf_names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        converted[name] = tensor.t().contiguous() if name in _TRANSPOSED else tensor
    return converted


def hf_from_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of open_clip's `CLIP` as one of a Hugging Face `CLIPModel`.

    The inverse of `open_clip_from_hf`, bit for bit. Also takes a `CustomTextCLIP` whose text tower
    is CLIP's, and a `fastgoal_models.FastGoalModel`.

    Raises HfCheckpointError, which lists them, for names that are missing or not CLIP's.
    """
    weights = {name.removeprefix("text."): x for name, x in _unwrapped(state_dict).items()}
    weights = {name: x for name, x in weights.items() if name not in _NOT_WEIGHTS}
    table = _table(
        text_layers=_layers(weights, "transformer.resblocks."),
        image_layers=_layers(weights, "visual.transformer.resblocks."),
    )
    _check_names(weights, table, "open_clip")
    converted = {}
    for name, hf_names in table.items():
        tensor = weights[name].t().contiguous() if name in _TRANSPOSED else weights[name]
        if name == "logit_scale":
            tensor = tensor.reshape(())  # open_clip may keep it in one dimension
        parts = tensor.chunk(3) if len(hf_names) == 3 else (tensor,)
        converted.update(zip(hf_names, parts, strict=True))
    return converted


def sizes_of(state_dict: Mapping[str, Tensor]) -> ClipSizes:
    """The sizes of a CLIP from a state dict as `open_clip_from_hf` returns it."""
    text_layers = _layers(state_dict, "transformer.resblocks.")
    image_layers = _layers(state_dict, "visual.transformer.resblocks.")
    positions, image_width = state_dict["visual.positional_embedding"].shape
    patch_size = state_dict["visual.conv1.weight"].shape[-1]
    vocabulary, text_width = state_dict["token_embedding.weight"].shape
    return ClipSizes(
        image_width=image_width,
        image_layers=image_layers,
        image_mlp_width=len(state_dict["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        patch_size=patch_size,
        image_size=math.isqrt(positions - 1) * patch_size,
        text_width=text_width,
        text_layers=text_layers,
        text_mlp_width=len(state_dict["transformer.resblocks.0.mlp.c_fc.bias"]),
        text_positions=len(state_dict["positional_embedding"]),
        vocabulary=vocabulary,
        embed_dim=state_dict["visual.proj"].shape[1],
    )


def hf_config(sizes: ClipSizes, settings: ClipSettings) -> dict[str, Any]:
    """The `config.json` with which `CLIPModel.from_pretrained` reads such weights."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": sizes.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.text_width,
            "intermediate_size": sizes.text_mlp_width,
            "projection_dim": sizes.embed_dim,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": settings.text_heads,
            "max_position_embeddings": sizes.text_positions,
            "hidden_act": settings.activation,
            # CLIP's start and end tokens are the last two; a text's features are the end token's.
            "bos_token_id": sizes.vocabulary - 2,
            "eos_token_id": sizes.vocabulary - 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": sizes.image_width,
            "intermediate_size": sizes.image_mlp_width,
            "projection_dim": sizes.embed_dim,
            "num_hidden_layers": sizes.image_layers,
            "num_attention_heads": settings.image_heads,
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
            "hidden_act": settings.activation,
        },
    }


def settings_from_hf(config: Mapping[str, Any]) -> ClipSettings:
    """The settings in the `config.json` of a Hugging Face CLIP.

    Raises HfCheckpointError where the towers' activations are not one that open_clip has.
    """
    # What is not written there is the default of transformers' CLIP.
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    activations = {tower.get("hidden_act", "quick_gelu") for tower in (text, vision)}
    if not (activations == {"quick_gelu"} or activations == {"gelu"}):
        raise HfCheckpointError(
            f"config.json has hidden_act {' and '.join(sorted(activations))}; open_clip has "
            "quick_gelu or gelu, for both towers"
        )
    return ClipSettings(
        image_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
        activation=activations.pop(),
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, or in the weights file of a folder, on the CPU; runs no code of it.

    `.safetensors`, or anything `torch.load` reads with weights_only=True; also where a training
    checkpoint holds it beside other things, under `state_dict`, `model_state_dict` or `model`.

    Raises:
        FileNotFoundError: there is no such file, or no weights file in the folder.
        HfCheckpointError: it is damaged, needs code to be read, or holds no state dict.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has no weights file ({', '.join(_IN_FOLDERS)})")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HfCheckpointError(
            f"{path} is not a weights file, or holds Python objects besides tensors, which could "
            "run code when they are read. Fix: where you trust it, load it yourself and save the "
            "state dict alone"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise HfCheckpointError(f"{path} is damaged or not a weights file: {error}") from error
    return _find_state_dict(path, content)


def _find_state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    inner = content
    while isinstance(inner, Mapping):
        if inner and all(isinstance(value, Tensor) for value in inner.values()):
            return dict(inner)
        inner = next((inner[key] for key in _IN_CHECKPOINTS if key in inner), None)
    found = sorted(map(str, content)) if isinstance(content, Mapping) else [type(content).__name__]
    raise HfCheckpointError(
        f"{path} holds no state dict, neither itself nor under {', '.join(_IN_CHECKPOINTS)}; "
        f"it holds {_shortened(found)}"
    )


def _unwrapped(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the prefixes that all names share because a module was wrapped."""
    weights = state_dict
    while weights:
        shared = [w for w in _WRAPPERS if all(name.startswith(w) for name in weights)]
        if not shared:
            break
        weights = {name.removeprefix(shared[0]): tensor for name, tensor in weights.items()}
    return weights


def _layers(names: Iterable[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) + 1 for name in names if (match := pattern.match(name))), default=0)


def _table(text_layers: int, image_layers: int) -> dict[str, tuple[str, ...]]:
    """open_clip's name of each weight and Hugging Face's: one, or those of q, k and v."""
    modules = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
        "visual.ln_post": "vision_model.post_layernorm",
    }
    table: dict[str, tuple[str, ...]] = {
        "logit_scale": ("logit_scale",),
        "positional_embedding": ("text_model.embeddings.position_embedding.weight",),
        "text_projection": ("text_projection.weight",),
        "visual.class_embedding": ("vision_model.embeddings.class_embedding",),
        "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight",),
        "visual.proj": ("visual_projection.weight",),
    }
    for blocks, layers, count in (
        ("transformer.resblocks", "text_model.encoder.layers", text_layers),
        ("visual.transformer.resblocks", "vision_model.encoder.layers", image_layers),
    ):
        for i in range(count):
            block, layer = f"{blocks}.{i}", f"{layers}.{i}"
            modules |= {
                f"{block}.ln_1": f"{layer}.layer_norm1",
                f"{block}.ln_2": f"{layer}.layer_norm2",
                f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
                f"{block}.mlp.c_fc": f"{layer}.mlp.fc1",
                f"{block}.mlp.c_proj": f"{layer}.mlp.fc2",
            }
            for kind in ("weight", "bias"):
                table[f"{block}.attn.in_proj_{kind}"] = tuple(
                    f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"
                )
    without_bias = {"token_embedding", "visual.conv1"}
    for name, hf_name in modules.items():
        table[f"{name}.weight"] = (f"{hf_name}.weight",)
        if name not in without_bias:
            table[f"{name}.bias"] = (f"{hf_name}.bias",)
    return table


def _check_names(names: Collection[str], expected: Collection[str], whose: str) -> None:
    missing = sorted(set(expected) - set(names))
    unexpected = sorted(set(names) - set(expected))
    if not missing and not unexpected:
        return
    problems = [
        f"{len(some)} {what}: {_shortened(some)}"
        for what, some in (("missing", missing), ("unexpected", unexpected))
        if some
    ]
    raise HfCheckpointError(f"these are not the weights of {whose}'s CLIP; {'; '.join(problems)}")


def _shortened(names: list[str], most: int = 10) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""Loading a CAFT checkpoint: every name and shape agrees, or an error that lists what does not."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoints import CheckpointError

_WRAPPERS = ("state_dict", "model")
_GENERATOR = "visual.superpixel_generator."
_LISTED = 8


def load_caft_weights(model: nn.Module, source: Path | Mapping[str, Tensor]) -> None:
    """Load a state dict, or that of a file, into a Caft, strictly, running nobody's code.

    Reads .safetensors and PyTorch files; the state dict may lie in a training checkpoint under
    "state_dict" or "model", and its names may begin with "module.". Raises CheckpointError.
    """
    weights = _read(source) if isinstance(source, Path) else _named(source)
    wanted = model.state_dict()
    if not any(name.startswith(_GENERATOR) for name in wanted):
        weights = {k: v for k, v in weights.items() if not k.startswith(_GENERATOR)}
    problems = []
    for title, names in (
        ("missing", [name for name in wanted if name not in weights]),
        ("not known", [name for name in weights if name not in wanted]),
        (
            "of another shape",
            [
                f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in weights and weights[name].shape != tensor.shape
            ],
        ),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            problems.append(f"{len(names)} {title}: {', '.join(names[:_LISTED])}{more}")
    if problems:
        what = source if isinstance(source, Path) else "the state dict"
        raise CheckpointError(
            f"{what} does not hold the weights of this CAFT. {'; '.join(problems)}. Fix: give the "
            "configuration that they were trained with"
        )
    model.load_state_dict(weights)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return _named(load_file(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} can not be read as weights alone: {error}. Fix: save its state_dict, "
            "torch.save(checkpoint['state_dict'], path)"
        ) from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict, neither itself nor under {_WRAPPERS}")
    return _named(loaded)


def _named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}

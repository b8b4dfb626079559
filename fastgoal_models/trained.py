"""What a training run left, as it is evaluated: the moving average of its weights, if it kept one.

Every command that takes the folder of a run, or of one of its checkpoints, reads it here, so that
what is exported, mixed and drawn is what was evaluated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoints import MANIFEST, latest_checkpoint, load_checkpoint
from .errors import ConfigError, need_file
from .hf_checkpoints import read_weights

_NOTES = "fastgoal"  # in the metadata of a safetensors file
# Of all that a run notes, what the model is.
_IDENTITY = ("model", "pretrained", "architecture", "superpixels", "published")


class Trained(NamedTuple):
    """The model of a checkpoint, as `load_trained` read it."""

    name: str
    """the folder that was asked for, the step, and whether these are averaged weights"""
    weights: dict[str, Tensor]
    """under the names of the model that trained, on the CPU"""
    notes: dict[str, Any]
    """what its run noted of itself"""


def is_trained(folder: Path) -> bool:
    """Whether this is the folder of a run or a checkpoint that `load_trained` reads."""
    return _checkpoint_in(Path(folder)) is not None


def load_trained(folder: Path) -> Trained:
    """The weights that are evaluated, of a checkpoint or of the newest one of a run.

    Args:
        folder: that of a run, of its `checkpoints`, or of one checkpoint.

    Raises:
        ConfigError: it is none of these.
        CheckpointError: the checkpoint is damaged.
    """
    folder = Path(folder)
    path = _checkpoint_in(folder)
    if path is None:
        raise ConfigError(f"{folder} holds no checkpoint of `fastgoal train`{_instead(folder)}")
    found = load_checkpoint(path)
    average = {
        name.removeprefix("module."): tensor
        for name, tensor in found.state.get("ema", {}).items()
        if name.startswith("module.")
    }
    name = f"{folder}, step {found.step}" + (", averaged" if average else "")
    return Trained(name, found.weights | average, found.config)


def load_weights(path: Path, argument: str) -> Trained:
    """`load_trained` of a run or a checkpoint; else the weights in a file, or in a folder with one.

    Raises ConfigError, naming the argument, where there is nothing; HfCheckpointError for a file
    that can not be read, CheckpointError for a checkpoint that is damaged.
    """
    if is_trained(path):
        return load_trained(path)
    if not path.is_dir():
        need_file(path, argument)
    return Trained(str(path), read_weights(path), notes_on(path))


def _checkpoint_in(folder: Path) -> Path | None:
    if (folder / MANIFEST).is_file():
        return folder
    return latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder)


def _instead(folder: Path) -> str:
    if not (folder / "model.safetensors").is_file():
        return ""
    return (
        f": its model.safetensors has no {MANIFEST} beside it. Fix: name that file as weights, and "
        "the model they are of"
    )


def notes_as_metadata(notes: dict[str, Any]) -> dict[str, str]:
    """The metadata with which a safetensors file says which model its weights are of."""
    # Some releases of transformers refuse a file that does not name its format.
    identity = {name: notes[name] for name in _IDENTITY if name in notes}
    return {"format": "pt"} | ({_NOTES: json.dumps(identity)} if identity else {})


def notes_on(weights: Path) -> dict[str, Any]:
    """What is noted of a file of weights: in its metadata, or by its run in the same folder.

    Nothing where it is a file of somebody else's, or no file at all.
    """
    if not weights.is_file():
        return {}
    try:
        if weights.suffix == ".safetensors":
            with safe_open(weights, "pt") as file:
                noted = (file.metadata() or {}).get(_NOTES)
            if noted is not None:
                return dict(json.loads(noted))
        return dict(json.loads((weights.parent / MANIFEST).read_text("utf-8"))["config"])
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return {}

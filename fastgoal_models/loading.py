"""A model from what a person types: a name, a configuration, or what a training run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from .caft.config import CaftConfig
from .caft.model import Caft
from .checkpoints import Checkpoint, latest_checkpoint, load_checkpoint
from .errors import ConfigError
from .fast_goal import FastGoalModel, text_positions_in
from .options import create_model

CAFT_NAMES = ("caft-b", "caft-s", "caft-xs")


class Loaded(NamedTuple):
    """A model, and what to call it."""

    model: FastGoalModel | Caft
    name: str
    random: bool
    """its weights are nobody's: no result of it means anything"""
    notes: dict[str, Any]
    """what its training run noted of itself; empty for other models"""


class LoadedFastGoal(NamedTuple):
    """`Loaded`, where it can only be a FastGoalModel."""

    model: FastGoalModel
    name: str
    random: bool
    notes: dict[str, Any]


def architecture(model: str, pretrained: str | None) -> dict[str, Any]:
    """The configuration, in open_clip's JSON layout, of the model that these two words name.

    Raises ConfigError for a name that open_clip does not know, or a file that is not JSON.
    """
    if model.endswith(".json"):
        try:
            return json.loads(Path(model).read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{model} is not JSON: {error}") from error
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"open_clip has no model {model!r}, nor is it a JSON file with one")
    tag = pretrained if pretrained and not Path(pretrained).is_file() else None
    if tag and open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"):
        config["quick_gelu"] = True  # as the tag's weights want it
    return config


def load_fast_goal(
    model: str,
    pretrained: str | None = None,
    *,
    context_length: int | None = None,
    seed: int = 0,
) -> LoadedFastGoal:
    """`load_model` where it must not be a CAFT. Raises ConfigError for one."""
    loaded = load_model(model, pretrained, context_length=context_length, seed=seed)
    if not isinstance(loaded.model, FastGoalModel):
        raise ConfigError(f"{model} is a CAFT, and this wants a CLIP")
    return LoadedFastGoal(loaded.model, *loaded[1:])


def load_model(
    model: str,
    pretrained: str | None = None,
    *,
    context_length: int | None = None,
    seed: int = 0,
) -> Loaded:
    """The model that a person means.

    Args:
        model: the folder of a training run or of one of its checkpoints; or caft-b, caft-s,
            caft-xs; or an open_clip name; or a JSON configuration of one of the last two.
        pretrained: an open_clip tag of that name, or a weights file; None: random weights.
        context_length: text positions of a CLIP that is not a run's; None: as many as it has.
        seed: of random weights.

    Raises:
        ConfigError: nothing of that name, or weights that do not fit it.
        CheckpointError: a checkpoint that is damaged.
    """
    if Path(model).is_dir():
        if pretrained is not None:
            raise ConfigError(f"{model} has weights of its own: leave --pretrained out")
        return _from_run(Path(model))
    name = model if pretrained is None else f"{model}, {pretrained}"
    if model in CAFT_NAMES or _is_caft(model):
        config = CaftConfig.load(model)
        if pretrained is None:
            return Loaded(Caft.create(config, superpixels="slic"), name, True, {})
        return Loaded(Caft.from_checkpoint(pretrained, config), name, False, {})
    if context_length is None and pretrained is not None and Path(pretrained).is_file():
        context_length = text_positions_in(Path(pretrained))
    if context_length is None:
        context_length = architecture(model, pretrained)["text_cfg"].get("context_length", 77)
    clip = create_model(model, pretrained, seed, context_length)
    return Loaded(clip, name, pretrained is None, {})


def _is_caft(model: str) -> bool:
    if not model.endswith(".json") or not Path(model).is_file():
        return False
    return "parts" in architecture(model, None).get("text_cfg", {})


def _from_run(folder: Path) -> Loaded:
    checkpoint = _checkpoint(folder)
    noted = checkpoint.config
    name = f"{folder}, step {checkpoint.step}"
    weights = checkpoint.path / "model.safetensors"
    if isinstance(noted.get("model"), dict):
        caft = Caft.from_checkpoint(
            weights,
            CaftConfig.load(noted["model"]),
            superpixels=noted["superpixels"],
            published=noted["published"],
        )
        return Loaded(caft, name, False, noted)
    if not isinstance(noted.get("architecture"), dict):
        raise ConfigError(
            f"{checkpoint.path} does not say which model it is of. Fix: --model NAME --pretrained "
            f"{weights}"
        )
    clip = FastGoalModel.create(
        noted["architecture"], weights, context_length=noted["context_length"]
    )
    return Loaded(clip, name, False, noted)


def _checkpoint(folder: Path) -> Checkpoint:
    path = folder if (folder / "model.safetensors").is_file() else None
    path = path or latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder)
    if path is None:
        raise ConfigError(f"{folder} holds no checkpoint of `fastgoal train`")
    return load_checkpoint(path)

"""A model from what a person types: a name, a configuration, or what a training run left."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

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

    Raises ConfigError for a name that open_clip does not know, and a file that is not there or no
    model's.
    """
    if model.endswith(".json"):
        try:
            config = json.loads(Path(model).read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"can not read {model}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{model} is not JSON: {error}") from error
        towers = ("vision_cfg", "text_cfg")
        if not isinstance(config, dict) or not all(isinstance(config.get(t), dict) for t in towers):
            raise ConfigError(f"{model} is no model: it needs {' and '.join(towers)}")
        return config
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"open_clip has no model {model!r}, nor is it a JSON file with one")
    tag = pretrained if pretrained and not Path(pretrained).is_file() else None
    known = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if known.get("quick_gelu"):
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
        model: the folder of a training run or of one of its checkpoints, of whose moving average,
            if it kept one, the weights are; or caft-b, caft-s, caft-xs; or an open_clip name; or
            a JSON configuration of one of the last two.
        pretrained: an open_clip tag of that name, or a weights file; None: random weights.
        context_length: text positions of a CLIP that is not a run's; None: as many as it has.
        seed: of random weights.

    Raises:
        ConfigError: nothing of that name, or weights that do not fit it; weights of a training run
            whose model was another, though they would fit.
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
    if pretrained is not None:
        _refuse_another_architecture(model, Path(pretrained))
    if context_length is None and pretrained is not None and Path(pretrained).is_file():
        context_length = text_positions_in(Path(pretrained))
    known = architecture(model, pretrained)
    if context_length is None:
        context_length = known["text_cfg"].get("context_length", 77)
    clip = create_model(model, pretrained, seed, context_length)
    return Loaded(clip, name, pretrained is None, {})


def _refuse_another_architecture(model: str, weights: Path) -> None:
    """Raises ConfigError where the run that wrote `weights` notes another model beside them.

    Not every difference shows in the weights' shapes: QuickGELU has none, nor have heads.
    """
    try:
        manifest = json.loads((weights.parent / "checkpoint.json").read_text("utf-8"))
        noted = manifest["config"]["architecture"]
    except (OSError, ValueError, TypeError, KeyError):
        return  # not of a run, or of one that noted nothing
    if not weights.is_file() or not isinstance(noted, dict):
        return
    there, here = _settings(noted), _settings(architecture(model, str(weights)))
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} in {model}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise ConfigError(
            f"--pretrained {weights} is of a run with another model: {', '.join(differing)}. "
            f"Fix: --model {weights.parent} without --pretrained"
        )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in open_clip's JSON layout, flat and with its defaults.

    Without the text positions, of which the weights themselves have the number.
    """
    flat: dict[str, Any] = {"quick_gelu": False, "custom_text": False} | config
    for part, defaults in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        settings = asdict(defaults) | flat.pop(part, {})
        flat |= {f"{part}.{name}": value for name, value in settings.items()}
    del flat["text_cfg.context_length"]
    return json.loads(json.dumps(flat))  # tuples as a file has them


def _is_caft(model: str) -> bool:
    if not model.endswith(".json") or not Path(model).is_file():
        return False
    return "parts" in architecture(model, None).get("text_cfg", {})


def _from_run(folder: Path) -> Loaded:
    checkpoint = _checkpoint(folder)
    noted = checkpoint.config
    average = _moving_average(checkpoint)
    name = f"{folder}, step {checkpoint.step}" + (", averaged" if average else "")
    weights = checkpoint.path / "model.safetensors"
    if isinstance(noted.get("model"), dict):
        caft = Caft.from_checkpoint(
            weights,
            CaftConfig.load(noted["model"]),
            superpixels=noted["superpixels"],
            published=noted["published"],
        )
        caft.load_state_dict(average, strict=False)
        return Loaded(caft, name, False, noted)
    if not isinstance(noted.get("architecture"), dict):
        raise ConfigError(
            f"{checkpoint.path} does not say which model it is of. Fix: --model NAME --pretrained "
            f"{weights}"
        )
    clip = FastGoalModel.create(
        noted["architecture"], weights, context_length=noted["context_length"]
    )
    clip.load_state_dict(average, strict=False)
    return Loaded(clip, name, False, noted)


def _moving_average(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights of a run that kept some (`ema`); else none."""
    state = checkpoint.state.get("ema", {})
    return {
        name.removeprefix("module."): tensor
        for name, tensor in state.items()
        if name.startswith("module.")
    }


def _checkpoint(folder: Path) -> Checkpoint:
    path = folder if (folder / "model.safetensors").is_file() else None
    path = path or latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder)
    if path is None:
        raise ConfigError(f"{folder} holds no checkpoint of `fastgoal train`")
    return load_checkpoint(path)

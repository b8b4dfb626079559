"""A model from what a person types: a name, a configuration, or what a training run left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from .caft.config import CaftConfig
from .caft.model import Caft
from .errors import ConfigError
from .fast_goal import FastGoalModel, text_positions_in
from .options import create_model
from .preprocessing import unlike_clip
from .trained import Trained, is_trained, load_trained, notes_on

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
        raise ConfigError(
            f"open_clip has no model {model!r}, nor is it a JSON file with one, nor a folder of a "
            "run of `fastgoal train`"
        )
    tag = pretrained if pretrained and not Path(pretrained).is_file() else None
    known = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if known.get("quick_gelu"):
        config["quick_gelu"] = True  # as the tag's weights want it
    return config


def noted_architecture(model: FastGoalModel, name: str, pretrained: str | None) -> dict[str, Any]:
    """What is noted of a model that two words name: `architecture`, and how it wants its pictures,
    where that is not as CLIP's.
    """
    unlike = unlike_clip(model.preprocess)
    return architecture(name, pretrained) | ({"preprocess_cfg": unlike} if unlike else {})


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
        return _of_run(load_trained(Path(model)))
    name = model if pretrained is None else f"{model}, {pretrained}"
    if model in CAFT_NAMES or _is_caft(model):
        config = CaftConfig.load(model)
        if pretrained is None:
            return Loaded(Caft.create(config, superpixels="slic"), name, True, {})
        noted = notes_on(Path(pretrained))
        how = {key: noted[key] for key in ("superpixels", "published") if key in noted}
        return Loaded(Caft.from_checkpoint(pretrained, config, **how), name, False, {})
    noted = None if pretrained is None else _noted_architecture(model, Path(pretrained))
    if context_length is None and pretrained is not None and Path(pretrained).is_file():
        context_length = text_positions_in(Path(pretrained))
    known = noted or architecture(model, pretrained)
    if context_length is None:
        context_length = known["text_cfg"].get("context_length", 77)
    clip = create_model(noted or model, pretrained, seed, context_length)
    return Loaded(clip, name, pretrained is None, {})


def _noted_architecture(model: str, weights: Path) -> dict[str, Any] | None:
    """The architecture that is noted of `weights`, with how it wants its pictures; None: nothing.

    Raises ConfigError where `model` is another one: not every difference shows in the weights'
    shapes: QuickGELU has none, nor have heads.
    """
    notes = notes_on(weights)
    noted = notes.get("architecture")
    if not isinstance(noted, dict):
        return None
    differing = differences(noted, architecture(model, str(weights)), model)
    if differing:
        run, name = weights.parent, name_of(notes) or "NAME, the one it is of"
        fix = f"--model {run} without --pretrained" if is_trained(run) else f"--model {name}"
        raise ConfigError(
            f"--pretrained {weights} is of a run with another model: {', '.join(differing)}. "
            f"Fix: {fix}"
        )
    return noted


def name_of(notes: Mapping[str, Any]) -> str | None:
    """What to give to --model for the model in the notes of a run; None where nothing is known.

    The name that the run was given, if it says all: OpenAI's tags have QuickGELU, which their names
    alone have not.
    """
    given, noted = notes.get("model"), notes.get("architecture")
    if isinstance(given, dict):
        config = CaftConfig.load(given)
        return next((name for name in CAFT_NAMES if CaftConfig.load(name) == config), None)
    if not isinstance(noted, dict):
        return None
    for name in (str(given), f"{given}-quickgelu", *open_clip.list_models()):
        try:
            if not differences(noted, architecture(name, None), name):
                return name
        except ConfigError:
            continue
    return None


def differences(noted: dict[str, Any], other: dict[str, Any], name: str) -> list[str]:
    """In words, where an architecture that a run noted differs from the other, called `name`.

    Not the text positions, of which the weights have the number, nor how pictures are normalised,
    where the other does not say it.
    """
    there, here = _settings(noted), _settings(other)
    here.setdefault("preprocess_cfg", there.get("preprocess_cfg"))
    return [
        f"{key} is {there.get(key)!r} there and {here.get(key)!r} in {name}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in open_clip's JSON layout, flat, with its defaults, less text positions."""
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


def _of_run(trained: Trained) -> Loaded:
    noted = trained.notes
    if isinstance(noted.get("model"), dict):
        return Loaded(caft_of(trained), trained.name, False, noted)
    if not isinstance(noted.get("architecture"), dict):
        raise ConfigError(
            f"{trained.name}: it does not say which model it is of. Fix: --model NAME --pretrained "
            "FILE, its model.safetensors"
        )
    clip = FastGoalModel.create(noted["architecture"], context_length=noted["context_length"])
    clip.load_state_dict(trained.weights)
    return Loaded(clip, trained.name, False, noted)


def caft_of(trained: Trained, model: str | None = None, superpixels: str | None = None) -> Caft:
    """The CAFT that a run trained, or its weights in another configuration, by other superpixels.

    Raises ConfigError where the run trained something else, CheckpointError for weights that do not
    fit the other configuration.
    """
    noted = trained.notes
    if not isinstance(noted.get("model"), dict):
        raise ConfigError(f"{trained.name}: it is of no `fastgoal train caft`")
    return Caft.from_checkpoint(
        trained.weights,
        CaftConfig.load(model or noted["model"]),
        superpixels=superpixels or noted["superpixels"],
        published=noted["published"],
    )

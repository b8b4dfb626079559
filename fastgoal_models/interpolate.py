"""`fastgoal interpolate`: weights between two models, as WiSE-FT does (arXiv 2109.01903).

A fine-tuned model has often forgotten some of what the one before it knew. The weights in between
keep much of both, and cost nothing: (1 − alpha) · old + alpha · new.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from .checkpoints import save_tensors_atomically
from .errors import ConfigError
from .loading import differences, load_fast_goal, name_of, noted_architecture
from .positional import stretch_positional_embedding
from .trained import Trained, load_weights, notes_as_metadata

_SHOWN = 3  # differences that an error names
_POSITIONS = ("positional_embedding", "text.positional_embedding")


@dataclass(frozen=True)
class InterpolateOptions:
    """The options of `fastgoal interpolate`."""

    old: Path  # or the name of a model, whose weights `old_pretrained` says
    new: Path
    out: Path
    alpha: float = 0.5
    old_pretrained: str | None = None
    force: bool = False


def run_interpolate(options: InterpolateOptions, console: Console) -> None:
    """Read both, write what lies between. Raises what a user can mend (see `cli`)."""
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"OUT must be a .safetensors file, not {options.out}")
    if options.out.exists() and not options.force:
        raise ConfigError(f"{options.out} exists already. Fix: --force replaces it")
    sides = _old(options), _read(options.new, "NEW")
    notes = _notes_of_both(*sides)
    name = name_of(notes)
    old, stretched = _stretched_like(sides[0].weights, sides[1].weights)
    weights = interpolate(old, sides[1].weights, options.alpha)
    save_tensors_atomically(weights, options.out, notes_as_metadata(notes))
    if stretched:
        console.print(f"The old model's texts were stretched to {stretched} positions.")
    console.print(
        escape(
            f"Wrote {options.out}: {1 - options.alpha:g} · ({sides[0].name}) + {options.alpha:g} · "
            f"({sides[1].name}), {len(weights)} tensors. To load it"
            f"{'' if name else ', with the name of their model'}:\n"
            f"  --model {shlex.quote(name or 'NAME')} --pretrained {shlex.quote(str(options.out))}"
        ),
        highlight=False,
        soft_wrap=True,
    )


def interpolate(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 − alpha) · old + alpha · new for each weight, in the new one's dtype.

    Computed in float32, or float64 where one is that. 0 gives the old weights, 1 the new ones, to
    the bit where their dtypes agree. What is not floating point (counters) is taken from the new.

    Raises ConfigError for an alpha outside [0, 1], or for names or shapes that differ, naming the
    first of them.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"--alpha must be 0 (the old model) to 1 (the new one); got {alpha}")
    differing = _differences(old, new)
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ConfigError(
            f"these are not weights of one architecture: {'; '.join(differing[:_SHOWN])}{more}. "
            "Fix: give two models that differ only in their training"
        )
    between = {}
    for name, value in new.items():
        if not value.is_floating_point():
            between[name] = value.clone()
            continue
        wide = torch.promote_types(torch.promote_types(old[name].dtype, value.dtype), torch.float32)
        between[name] = torch.lerp(old[name].to(wide), value.to(wide), alpha).to(value.dtype)
    return between


def _differences(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            found.append(f"only the old one has {name}")
        elif name not in old:
            found.append(f"only the new one has {name}")
        elif old[name].shape != new[name].shape:
            shapes = tuple(old[name].shape), tuple(new[name].shape)
            found.append(f"{name} has shape {shapes[0]} in the old one, {shapes[1]} in the new")
        elif old[name].is_floating_point() != new[name].is_floating_point():
            found.append(
                f"{name} is {old[name].dtype} in the old one, {new[name].dtype} in the new"
            )
    return found


def _old(options: InterpolateOptions) -> Trained:
    """The weights before the training: named as other commands name a model, or in a file."""
    name, tag = str(options.old), options.old_pretrained
    if tag is not None:
        if options.old.is_file() and options.old.suffix != ".json":
            raise ConfigError(
                f"OLD {name} has weights of its own: --old-pretrained {tag} is for a model's name. "
                "Fix: leave it out"
            )
        loaded = load_fast_goal(name, tag)
        noted = noted_architecture(loaded.model, name, tag)
        notes = {"model": name, "pretrained": tag, "architecture": noted}
        return Trained(loaded.name, _as_open_clip(dict(loaded.model.state_dict())), notes)
    tags = [] if options.old.exists() else open_clip.list_pretrained_tags_by_model(name)
    if tags:
        raise ConfigError(
            f"OLD: {name} is the name of a model, and does not say which weights. Fix: "
            f"--old-pretrained TAG, one of {', '.join(tags)}"
        )
    return _read(options.old, "OLD")


def _read(path: Path, argument: str) -> Trained:
    """The weights that are meant, under open_clip's names."""
    found = load_weights(path, argument)
    return found._replace(weights=_as_open_clip(found.weights))


def _notes_of_both(old: Trained, new: Trained) -> dict[str, Any]:
    """What is noted of the model that both are of. Raises ConfigError where there are two."""
    one, two = (side.notes.get("architecture") for side in (old, new))
    if isinstance(one, dict) and isinstance(two, dict):
        differing = differences(one, {"preprocess_cfg": None} | two, new.name)
        if differing:
            raise ConfigError(f"{old.name} is of another model: {', '.join(differing)}")
    return new.notes or old.notes


def _as_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under open_clip's names where a FastGoalModel wrote them, which holds its CLIP as `clip`."""
    if all(name.startswith("clip.") for name in weights):
        return {name.removeprefix("clip."): tensor for name, tensor in weights.items()}
    return weights


def _stretched_like(
    old: dict[str, Tensor], new: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int | None]:
    """The old weights, with text positions stretched to the new ones' number as training does."""
    for name in _POSITIONS:
        if name in old and name in new and len(old[name]) < len(new[name]):
            length = len(new[name])
            try:
                positions = stretch_positional_embedding(old[name], length)
            except ValueError:
                continue  # not a stretch of these: `interpolate` says that the shapes differ
            return old | {name: positions}, length
    return old, None

"""How a model wants its pictures: normalised by what, and resized how when it is judged.

Weights alone do not tell. open_clip knows it of each of its tags and keeps it with a model as
`preprocess_cfg`; a run notes it under that name in its architecture, where it is not CLIP's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

_CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}


class Normalisation(NamedTuple):
    """(pixel − mean) / std of each channel, for pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


CLIP_NORMALISATION = Normalisation(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def preprocess_of(settings: Mapping[str, Any], image_size: int) -> PreprocessCfg:
    """What a `preprocess_cfg` means for inputs of S × S; fields that are not in it are CLIP's.

    Raises ValueError, naming it, for a field that there is not, or whose value makes no sense.
    """
    known = asdict(PreprocessCfg())
    unknown = ", ".join(sorted(settings.keys() - known.keys()))
    if unknown:
        raise ValueError(f"preprocess_cfg has no {unknown}. Fix: use {', '.join(known)}")
    values = merge_preprocess_dict(known, {**settings, "size": image_size})
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise ValueError(
                f"preprocess_cfg: {name} must be one of {choices}; got {values[name]!r}"
            )
    for name in Normalisation._fields:
        values[name] = _of_channels(name, values[name])
    if min(values["std"]) <= 0:
        raise ValueError(f"preprocess_cfg: std must be above 0; got {values['std']}")
    return PreprocessCfg(**values)


def _of_channels(name: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"preprocess_cfg: {name} must be three numbers, RGB; got {values!r}")
    return numbers


def unlike_clip(preprocess: PreprocessCfg) -> dict[str, Any]:
    """The fields that differ from CLIP's, as JSON keeps them; of most models there are none."""
    usual = asdict(PreprocessCfg(size=preprocess.size))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(preprocess).items()
        if value != usual[name]
    }

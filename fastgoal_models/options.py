"""What a person typed, as objects: a device, a model, the name of a data set's contents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from .fast_goal import FastGoalModel
from .glit import GlitRecord
from .training import ConfigError, default_device


def parse_device(name: str | None) -> torch.device:
    """The device of that name, or the default one. ConfigError when it is not here."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} can not be used here: {reason}") from error
    return device


def create_model(
    model: str | Path, pretrained: str | None, seed: int, context_length: int = 248
) -> FastGoalModel:
    """A FastGoalModel by open_clip name or JSON file; random weights depend on `seed` alone.

    ConfigError for a name, tag or file that does not lead to a model.
    """
    if isinstance(model, str) and model.endswith(".json"):
        model = Path(model)
    torch.manual_seed(seed)
    try:
        return FastGoalModel.create(model, pretrained, context_length=context_length)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        weights = f"weights {pretrained!r}" if pretrained else "random weights"
        raise ConfigError(f"can not build model {str(model)!r} with {weights}: {error}") from error


def records_digest(records: Sequence[GlitRecord]) -> str:
    """Sixteen hex digits that change when a caption, an image's name or a pair does."""
    digest = hashlib.sha256()
    for record in records:
        pairs = [(pair.sentence, pair.box) for pair in record.pairs]
        digest.update(repr((record.id, record.caption, record.sentences, pairs)).encode())
    return digest.hexdigest()[:16]

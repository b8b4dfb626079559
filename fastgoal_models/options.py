"""What a person typed, as objects: a model, the name of a data set's contents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import ConfigError
from .fast_goal import FastGoalModel
from .glit import GlitRecord


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


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that change when a name or a bit of a tensor does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous()
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def records_digest(records: Sequence[GlitRecord]) -> str:
    """Sixteen hex digits that change when a caption, an image's name or a pair does."""
    digest = hashlib.sha256()
    for record in records:
        pairs = [(pair.sentence, pair.box) for pair in record.pairs]
        digest.update(repr((record.id, record.caption, record.sentences, pairs)).encode())
    return digest.hexdigest()[:16]

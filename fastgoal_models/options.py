"""What a person typed, as objects: a model, the name of a data set's contents."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .fast_goal import FastGoalModel
from .glit import GlitRecord


def create_model(
    model: str | Path | Mapping[str, Any],
    pretrained: str | None,
    seed: int,
    context_length: int = 248,
) -> FastGoalModel:
    """A FastGoalModel by open_clip name, JSON file or its contents; random by `seed` alone.

    ConfigError for a name, tag or file that does not lead to a model.
    """
    if isinstance(model, str) and model.endswith(".json"):
        model = Path(model)
    torch.manual_seed(seed)
    try:
        with _quiet():
            return FastGoalModel.create(model, pretrained, context_length=context_length)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        weights = f"weights {pretrained!r}" if pretrained else "random weights"
        why = str(error)
        if "Failed to download" in why:
            why += " Fix: --pretrained FILE, with weights that are here already"
        raise ConfigError(f"can not build model {str(model)!r} with {weights}: {why}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a hub that can not be reached logs at each try: the error says it once."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that change when a name or a bit of a tensor does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous()
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def records_digest(records: Sequence[GlitRecord]) -> str:
    """Sixteen hex digits that change when an id, an image's name or size, a caption or a pair does.

    Not when the data set is moved to another folder.
    """
    digest = hashlib.sha256()
    for record in records:
        pairs = [(pair.sentence, pair.box) for pair in record.pairs]
        image = (record.image.name, record.width, record.height)
        texts = (record.caption, record.captions, record.sentences)
        digest.update(repr((record.id, image, texts, pairs)).encode())
    return digest.hexdigest()[:16]

"""FLISM, FAST-GOAL's local pairs (arXiv 2605.26615): which sentence tells of which region.

Its five fixed regions, here without a detector's boxes: the four quadrants and the centre.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .glit import Box, GlitRecord, LocalPair, crop_region, image_tensor, load_image


class Encoder(Protocol):
    """A CLIP: a FastGoalModel, an open_clip model, or anything that encodes like them."""

    def encode_image(self, images: Tensor, /) -> Tensor: ...

    def encode_text(self, texts: Tensor, /) -> Tensor: ...


def fixed_regions(width: int, height: int) -> dict[str, Box]:
    """The four quadrants and the centre box, which has half the sides: x1, y1, x2, y2 in pixels."""
    w, h = float(width), float(height)
    return {
        "upper left": (0.0, 0.0, w / 2, h / 2),
        "upper right": (w / 2, 0.0, w, h / 2),
        "lower left": (0.0, h / 2, w / 2, h),
        "lower right": (w / 2, h / 2, w, h),
        "centre": (w / 4, h / 4, 3 * w / 4, 3 * h / 4),
    }


def best_pair(record: GlitRecord) -> LocalPair:
    """The pair FAST-GOAL trains on, the most similar one. Raises ValueError where there is none."""
    if not record.pairs:
        raise ValueError(f"{record.id} has no local pair. Fix: run match_pairs first")
    return record.pairs[0]


@torch.no_grad()
def match_pairs(
    model: Encoder,
    records: Sequence[GlitRecord],
    *,
    tokenizer: SimpleTokenizer | None = None,
    image_size: int | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[GlitRecord]:
    """Give each sentence its most similar region: the records anew, their pairs best first.

    Regions (squashed crops) and sentences are embedded in batches; similarity is the cosine. Of
    equal scores the region, then the sentence, that comes first wins. `tokenizer` and `image_size`
    default to the model's own, `device` to where the model is. The model's training mode is put
    back afterwards.

    Raises GlitError, naming it, for a picture that can not be read.
    """
    reader: SimpleTokenizer = tokenizer or _own(model, "tokenizer")
    side: int = image_size or _own(model, "image_size")
    module = model if isinstance(model, nn.Module) else nn.Module()
    if device is None:
        weight = next(module.parameters(), None)
        device = "cpu" if weight is None else weight.device
    images_at_once = max(1, batch_size // 5)
    was_training = module.training
    module.eval()
    matched: list[GlitRecord] = []
    try:
        with tqdm(
            total=len(records), desc="local pairs", unit="image", disable=not progress
        ) as bar:
            for start in range(0, len(records), images_at_once):
                chunk = records[start : start + images_at_once]
                matched += _match(model, chunk, reader, side, batch_size, device)
                bar.update(len(chunk))
    finally:
        module.train(was_training)
    return matched


def _own(model: Encoder, name: str) -> Any:
    if not hasattr(model, name):
        raise TypeError(f"{type(model).__name__} has no {name}. Fix: give match_pairs {name}=...")
    return getattr(model, name)


def _match(
    model: Encoder,
    records: Sequence[GlitRecord],
    tokenizer: SimpleTokenizer,
    image_size: int,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[GlitRecord]:
    """The records with their pairs, embedded together."""
    regions = [fixed_regions(record.width, record.height) for record in records]
    crops = []
    for record, boxes in zip(records, regions, strict=True):
        image = load_image(record.image)
        crops += [image_tensor(crop_region(image, box), image_size) for box in boxes.values()]
    sentences = [sentence for record in records for sentence in record.sentences]
    features = [
        torch.cat([F.normalize(encode(part.to(device)).float(), dim=-1).cpu() for part in parts])
        for encode, parts in (
            (model.encode_image, torch.stack(crops).split(batch_size)),
            (model.encode_text, tokenizer(sentences).split(batch_size)),
        )
    ]
    image_features = features[0].split([len(boxes) for boxes in regions])
    text_features = features[1].split([len(record.sentences) for record in records])
    for record, boxes, v, t in zip(records, regions, image_features, text_features, strict=True):
        scores, chosen = (t @ v.T).max(dim=1)
        named = list(boxes.items())
        pairs = [
            LocalPair(sentence, named[region][1], named[region][0], score)
            for sentence, (score, region) in enumerate(
                zip(scores.tolist(), chosen.tolist(), strict=True)
            )
        ]
        pairs.sort(key=lambda pair: -pair.score)  # stable: the earlier sentence of equal ones
        yield replace(record, pairs=tuple(pairs))

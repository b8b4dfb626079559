"""Does a sentence look at what it tells of? Pointing accuracy on pictures with boxes.

This is a measure of our own. FAST-GOAL's paper reports localisation as top-5, top-10 and top-15
figures; how they were taken is in no source that we have, and pointing accuracy can not be compared
with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .caft.data import text_rows
from .caft.maps import caft_maps
from .caft.model import Caft
from .fast_goal import FastGoalModel
from .glit import GlitRecord
from .pictures import Box, image_tensor, load_image


class Pointing(NamedTuple):
    """Shares of sentences, each 0 where there is none."""

    hits: float
    """whose most similar place lies in their box"""
    chance: float
    """that a place drawn at random would hit: the boxes' mean share of the picture"""
    sentences: int


def points_into(heat: Tensor, box: Box, width: float, height: float) -> tuple[float, float]:
    """Whether the centre of the brightest cell of a map (h, w) lies in the box; the box's share.

    The map lies over a picture of width × height, and so does the box. Of equally bright cells a
    fair share counts as hit, so that a map that is all alike is chance; NaN hits nothing. The
    share is that of the cells' centres, since only those can be hit.
    """
    rows, columns = heat.shape
    x = (torch.arange(columns) + 0.5) * (width / columns)
    y = (torch.arange(rows) + 0.5) * (height / rows)
    inside = ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))
    heat = heat.float().cpu()
    brightest = heat >= heat.max() - 1e-9
    hits = float(inside[brightest].float().mean()) if bool(brightest.any()) else 0.0
    return hits, float(inside.float().mean())


def pointing_of(found: Sequence[tuple[float, float]]) -> Pointing:
    """The means of `points_into`'s results."""
    if not found:
        return Pointing(0.0, 0.0, 0)
    hits, chances = (sum(values) / len(found) for values in zip(*found, strict=True))
    return Pointing(hits, chances, len(found))


@torch.no_grad()
def pointing(model: FastGoalModel | Caft, records: Sequence[GlitRecord]) -> Pointing:
    """Over all pairs of the records, whose boxes should come from elsewhere than this model.

    A CLIP's map is the cosine of the sentence's feature with every projected patch, a CAFT's the
    sentence's attention over the fine tokens. Pictures are squashed, so that boxes scale along.

    Raises GlitError for a picture that can not be read.
    """
    was_training = model.training
    model.eval()
    found = []
    try:
        for record in records:
            if record.pairs:
                maps = sentence_maps(model, record, [pair.sentence for pair in record.pairs])
                found += [
                    points_into(heat, pair.box, record.width, record.height)
                    for heat, pair in zip(maps, record.pairs, strict=True)
                ]
    finally:
        model.train(was_training)
    return pointing_of(found)


@torch.no_grad()
def sentence_maps(
    model: FastGoalModel | Caft, record: GlitRecord, sentences: Sequence[int]
) -> list[Tensor]:
    """A map (h, w) over the whole picture for each of these sentences of the record."""
    device = next(model.parameters()).device
    words = [record.sentences[sentence] for sentence in sentences]
    if isinstance(model, Caft):
        pixels = image_tensor(load_image(record.image), model.config.image_size).to(device)
        maps = caft_maps(model, pixels, text_rows(words, model.tokenizer).to(device))
        return list(maps.attention)
    pixels = image_tensor(load_image(record.image), model.image_size, *model.normalisation)
    features = model.encode_text(model.tokenizer(words).to(device))
    _, patches = model.image_tokens(pixels[None].to(device))
    patches = F.normalize(model.project_patches(patches[0]), dim=-1)
    return list((features @ patches.T).unflatten(1, model.grid_size))

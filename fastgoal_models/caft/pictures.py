"""A picture of what a CAFT found: its segments level by level, and the attention of each part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..drawing import lay_over, new_figure
from ..fonts import save_figure, wrap
from .maps import CaftMaps

_TEXT_WIDTH = 34  # characters of a part's caption in a line above its map


def draw_caft(picture: Image.Image, captions: Sequence[str], maps: CaftMaps, path: Path) -> None:
    """One sheet: the picture and its segments level by level, below the attention of each part.

    Args:
        picture: as the model saw it: whole, of any size.
        captions: the parts, one for each map.
        maps: of `caft_maps`.
        path: where to write; its ending chooses the format.
    """
    columns = max(1 + len(maps.segments), len(captions))
    width, height = picture.size
    cell = 3.0
    figure = new_figure(cell * columns, 2 * cell * height / width + 1.7)
    axes = figure.subplots(2, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("the picture", fontsize=10)
    pixels = np.asarray(picture.convert("RGB"))
    for axis, segments, count in zip(axes[0, 1:], maps.segments, maps.tokens, strict=False):
        axis.imshow(_coloured(pixels, segments))
        axis.set_title(f"{int(segments.unique().numel())} of {count} segments", fontsize=10)
    brightest = float(maps.attention.max())
    for axis, caption, attention in zip(axes[1], captions, maps.attention, strict=False):
        lay_over(axis, picture, picture.size, attention, 0.0, brightest)
        lines = wrap(caption, _TEXT_WIDTH, max_lines=4, placeholder=" …")
        axis.set_title("\n".join(lines), fontsize=9, parse_math=False)  # a $ is a dollar
    save_figure(figure, path, dpi=100)


def _coloured(pixels: np.ndarray[Any, Any], segments: Tensor) -> np.ndarray[Any, Any]:
    """Each segment in its mean colour, with a dark line between segments."""
    height, width = pixels.shape[:2]
    enlarged = F.interpolate(segments[None, None].float(), size=(height, width), mode="nearest")
    labels = enlarged[0, 0].long().numpy()
    count = labels.max() + 1
    sizes = np.bincount(labels.ravel(), minlength=count).clip(1)
    colours = np.stack(
        [
            np.bincount(labels.ravel(), channel.ravel(), minlength=count) / sizes
            for channel in np.moveaxis(pixels.astype(np.float64), 2, 0)
        ],
        axis=1,
    )
    drawn = colours[labels].astype(np.uint8)
    edge = np.zeros((height, width), dtype=bool)
    line = max(1, min(height, width) // 200)
    edge[line:] |= labels[line:] != labels[:-line]
    edge[:, line:] |= labels[:, line:] != labels[:, :-line]
    drawn[edge] = (20, 20, 20)
    return drawn

"""What CAFT found in a picture: its hierarchy of segments, and where each part of a caption looks.

A cell of the encoder's grid belongs to a superpixel, a superpixel by shares to the tokens of each
level above. What a level's tokens weigh is carried down to the cells by those shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no window, no display needed

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from ..fonts import save_figure, wrap
from .model import Caft
from .vision import Hierarchy

_TEXT_WIDTH = 34  # characters of a part's caption in a line above its map


class CaftMaps(NamedTuple):
    """Of one image: what there is to draw."""

    segments: list[Tensor]
    """(h, w) int64 for each level, finest first: the segment of each cell of the grid"""
    tokens: list[int]
    """tokens of each level"""
    attention: Tensor
    """(parts, h, w): attention of each part of the caption, summing to at most one"""


def cell_shares(hierarchy: Hierarchy) -> list[Tensor]:
    """(N, h, w, tokens) for each level, superpixels first: the share of each cell in each token."""
    first = hierarchy.assignments[0]
    shares = [F.one_hot(hierarchy.superpixels, first.shape[1]).to(first.dtype)]
    for assignment in hierarchy.assignments:
        shares.append(torch.einsum("nhwl,nlm->nhwm", shares[-1], assignment))
    return shares


@torch.no_grad()
def caft_maps(model: Caft, image: Tensor, texts: Tensor) -> CaftMaps:
    """The segments of an image and the text-conditioned attention of a caption's parts.

    Attention is the pool's, averaged over its heads; what falls on its zero token is left out, so
    that a part which finds nothing has a pale map.

    Args:
        model: put into evaluation mode meanwhile, and back afterwards.
        image: (3, H, W), CLIP-normalised.
        texts: (parts, L) int64.
    """
    was_training = model.training
    model.eval()
    encoded = model.encode_image(image[None], with_hierarchy=True)
    parts = F.normalize(model.encode_parts(texts), dim=-1)  # as when it scores
    model.train(was_training)
    assert encoded.hierarchy is not None
    pool, tokens = model.visual_proj, encoded.fine_tokens
    _, weights = pool.attn(
        pool.ln_q(parts)[None], pool.ln_k(tokens), pool.ln_v(tokens), need_weights=True
    )
    shares = cell_shares(encoded.hierarchy)
    # Each cell's part of what its token is given: a large token does not outshine a small one.
    of_cells = shares[1][0] / shares[1][0].sum(dim=(0, 1)).clamp_min(1e-6)
    attention = torch.einsum("pm,hwm->phw", weights[0, :, : tokens.shape[1]], of_cells)
    return CaftMaps(
        [share[0].argmax(dim=-1).cpu() for share in shares],
        [share.shape[-1] for share in shares],
        attention.cpu(),
    )


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
    figure, axes = plt.subplots(
        2, columns, figsize=(cell * columns, 2 * cell * height / width + 1.7), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("the picture", fontsize=10)
    pixels = np.asarray(picture.convert("RGB"))
    for axis, segments, count in zip(axes[0, 1:], maps.segments, maps.tokens, strict=False):
        axis.imshow(_coloured(pixels, segments))
        axis.set_title(f"{int(segments.unique().numel())} of {count} segments", fontsize=10)
    grey = picture.convert("L").convert("RGB")
    brightest = float(maps.attention.max())
    for axis, caption, attention in zip(axes[1], captions, maps.attention, strict=False):
        _overlay(axis, grey, attention, brightest)
        lines = wrap(caption, _TEXT_WIDTH, max_lines=4, placeholder=" …")
        axis.set_title("\n".join(lines), fontsize=9, parse_math=False)  # a $ is a dollar
    save_figure(figure, path, dpi=100)
    plt.close(figure)


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


def _overlay(axis: Axes, grey: Image.Image, attention: Tensor, brightest: float) -> None:
    width, height = grey.size
    axis.imshow(grey, extent=(0, width, height, 0))
    axis.imshow(
        attention.numpy(), extent=(0, width, height, 0), cmap="magma", alpha=0.6, vmin=0.0,
        vmax=brightest, interpolation="nearest",
    )  # fmt: skip

"""Superpixels: which pixels of an image make up each of CAFT's first tokens.

An image of H x W pixels has H/16 x W/16 superpixels, each grown from a cell of 16 x 16 pixels. A
map of labels (N, H, W) comes from one of three makers: `grid` (the cells themselves), `slic`
(colour and position, our own, on the tensor's device) or `sfcn` (CAFT's network). A token is the
mean of the encoder's grid, one cell for 8 x 8 pixels, over a superpixel's cells.

No maker and no mean waits for the device, and equal inputs give equal bits: sums of pixels are sums
of integers, sums of features are matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from .sfcn import Sfcn

CELL = 16
"""pixels of a superpixel's cell, down and across"""
STRIDE = 8
"""pixels of a cell of the encoder's grid"""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SFCN_MEAN = (0.411, 0.432, 0.45)

_SLIC_STEPS = 5
_SLIC_LEVELS = 255  # colours and positions are whole numbers, so that their sums are exact
_SLIC_COMPACTNESS = 96.0  # levels of colour that weigh as much as one cell's width

Maker = Callable[[Tensor], Tensor]
"""images (N, 3, H, W), CLIP-normalised -> labels (N, H, W) int64 in [0, H/16 * W/16)"""


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    # Filled where it is wanted: a tensor of host values would wait for the device.
    return torch.stack([like.new_full((1, 1), value) for value in values])


def _pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images back to RGB in about [0, 1], float32."""
    images = images.float()
    return images * _per_channel(std, images) + _per_channel(mean, images)


def _own_cell(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row (H, 1) and column (1, W) of the cell that each pixel lies in."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) // CELL
    columns = torch.arange(width, device=images.device) // CELL
    return rows[:, None], columns[None]


def _around(images: Tensor) -> Tensor:
    """(9, H, W): the cells around each pixel, row by row; at the border the nearest that exists."""
    row, column = _own_cell(images)
    down, across = images.shape[2] // CELL, images.shape[3] // CELL
    cells = [
        (row + dy).clamp(0, down - 1) * across + (column + dx).clamp(0, across - 1)
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    return torch.stack(cells)


def grid_labels(images: Tensor) -> Tensor:
    """The cells themselves."""
    row, column = _own_cell(images)
    labels = row * (images.shape[3] // CELL) + column
    return labels.expand(len(images), -1, -1)


@torch.no_grad()
def slic_labels(images: Tensor, steps: int = _SLIC_STEPS) -> Tensor:
    """SLIC (Achanta et al., 2012): k-means of colour and position, nine candidates a pixel.

    A pixel joins the nearest of the nine superpixels whose cells lie around its own; centres are
    means of whole numbers. Connectivity is not enforced.

    Args:
        images: (N, 3, H, W), CLIP-normalised.
        steps: assignments; the first is to the cells' own means.
    """
    height, width = images.shape[2:]
    down, across = height // CELL, width // CELL
    colours = _pixels(images, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD).clamp(0, 1)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=images.device),
        torch.arange(width, device=images.device),
        indexing="ij",
    )
    places = torch.stack([rows, columns]).expand(len(images), -1, -1, -1)
    points = torch.cat([(colours * _SLIC_LEVELS).round().long(), places], dim=1)  # (N, 5, H, W)
    # Cell by cell: the pixels of a cell all look at the same nine superpixels.
    points = points.unflatten(2, (down, CELL)).unflatten(4, (across, CELL)).transpose(3, 4)
    points = points.flatten(4).flatten(2, 3)  # (N, 5, cells, pixels of a cell)
    weight = torch.ones(5, 1, device=images.device)
    weight[3:] = (_SLIC_COMPACTNESS / CELL) ** 2
    candidates = _around(images)[:, ::CELL, ::CELL].flatten(1).T  # (cells, 9)
    own = torch.arange(down * across, device=images.device)
    labels = own[:, None].expand(len(images), -1, points.shape[3])
    centres = _means(points.flatten(2), labels.flatten(1), len(own), None)
    pixels = points.permute(0, 2, 3, 1).float()
    for _ in range(steps):
        # |p - c|^2 less |p|^2, which all candidates share.
        weighted = weight * centres
        size = (weighted * centres).sum(dim=1)[:, candidates]  # (N, cells, 9)
        products = pixels @ weighted[:, :, candidates].transpose(1, 2)
        nearest = (size[:, :, None] - 2 * products).argmin(dim=3)
        labels = candidates.expand(len(images), -1, -1).gather(2, nearest)
        centres = _means(points.flatten(2), labels.flatten(1), len(own), centres)
    labels = labels.unflatten(2, (CELL, CELL)).unflatten(1, (down, across)).transpose(2, 3)
    return labels.reshape(-1, height, width)


def _means(points: Tensor, labels: Tensor, count: int, otherwise: Tensor | None) -> Tensor:
    """(N, C, count) float32 means of whole numbers (N, C, P) by label (N, P).

    Whole numbers add up to the same sum in every order. A label that nobody has keeps `otherwise`.
    """
    sums = points.new_zeros(*points.shape[:2], count)
    sums.scatter_add_(2, labels[:, None].expand_as(points), points)
    sizes = points.new_zeros(len(points), count)
    sizes.scatter_add_(1, labels, torch.ones_like(labels))
    means = sums / sizes.clamp_min(1)[:, None]
    return means if otherwise is None else torch.where((sizes > 0)[:, None], means, otherwise)


@torch.no_grad()
def sfcn_labels(network: Sfcn, images: Tensor, *, published: bool = False) -> Tensor:
    """Each pixel's most likely of the nine cells around it, by CAFT's network.

    Args:
        network: its BatchNorms run as the network's mode says.
        images: (N, 3, H, W), CLIP-normalised.
        published: undo the normalisation with ImageNet's mean and deviation, as the published code
            does, instead of CLIP's.
    """
    mean, std = (
        (IMAGENET_MEAN, IMAGENET_STD) if published else (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    pixels = _pixels(images, mean, std)
    with torch.autocast(images.device.type, enabled=False):
        likely = network(pixels - _per_channel(_SFCN_MEAN, pixels)).argmax(dim=1, keepdim=True)
    around = _around(images)
    return around.expand(len(images), -1, -1, -1).gather(1, likely)[:, 0]


class Superpixels(NamedTuple):
    """The superpixels of some images: L of them an image."""

    labels: Tensor
    """(N, H/8, W/8) int64: whose each cell of the encoder's grid is"""
    live: Tensor
    """(N, L) bool: it has a cell; the others are padding"""
    source: Tensor
    """(N, L) int64: itself, or for padding the live superpixel that stands in for it"""

    def means(self, features: Tensor) -> Tensor:
        """Tokens (N, L, D) from the encoder's grid (N, D, H/8, W/8): means over the cells."""
        count = self.live.shape[1]
        member = F.one_hot(self.labels.flatten(1), count).to(features.dtype)  # (N, cells, L)
        sums = member.transpose(1, 2) @ features.flatten(2).transpose(1, 2)
        tokens = sums / member.sum(dim=1).clamp_min(1)[..., None]
        return tokens.gather(1, self.source[..., None].expand(-1, -1, tokens.shape[2]))


@torch.no_grad()
def superpixels(pixel_labels: Tensor) -> Superpixels:
    """The superpixels of a map of labels (N, H, W), H and W divisible by 16.

    Cells of the encoder's grid take the label of their first pixel (nearest-neighbour sampling). A
    superpixel without a cell is padding; the live one whose centroid in the map is nearest stands
    in for it, the first of equals. The centroid of one without a pixel is its cell's centre.
    """
    batch, height, width = pixel_labels.shape
    down, across = height // CELL, width // CELL
    count = down * across
    labels = pixel_labels[:, ::STRIDE, ::STRIDE]
    live = F.one_hot(labels.flatten(1), count).any(dim=1)
    device = pixel_labels.device
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None].expand(height, width)
    places = torch.stack([rows, columns]).flatten(1).expand(batch, -1, -1)
    cell = torch.arange(count, device=device)
    centres = torch.stack([cell // across, cell % across]) * CELL + (CELL - 1) / 2
    centroids = _means(
        places, pixel_labels.flatten(1), count, centres.float().expand(batch, -1, -1)
    )
    distances = (centroids[:, :, :, None] - centroids[:, :, None]).square().sum(dim=1)
    distances = distances.masked_fill(~live[:, None], torch.inf)
    source = torch.where(live, cell, distances.argmin(dim=2))
    return Superpixels(labels, live, source)

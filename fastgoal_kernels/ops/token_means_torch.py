"""Means of boxes and spans of tokens in plain PyTorch.

`embedding_bag` sums rows in a fixed order without copying an item's tokens for every range in it;
the forward sums the tokens of a range, the backward the ranges of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import score_dtype


def _items(item: Tensor | None, count: int, num_items: int, device: torch.device) -> Tensor:
    """The item of each range, int64 and in [0, num_items)."""
    if item is None:
        return torch.arange(count, device=device)
    return item.long().clamp(0, max(num_items - 1, 0))


def _of_boxes(boxes: Tensor, sizes: Tensor, height: int, width: int, side: int) -> Tensor:
    """Rectangles (M, 4) int64 of boxes (M, 4) on images of the sizes (M, 2).

    The arithmetic of `reference.region_grid`, operation by operation, without a host-made tensor
    (a copy that would make a CUDA device wait); always at least one patch and inside the grid.
    """

    def axis(low: Tensor, high: Tensor, size: Tensor, cells: int) -> tuple[Tensor, ...]:
        low, high = low * side / size, high * side / size
        centre = ((low + high) / 2).clamp(0, side - 1)
        low, high = low.round().clamp(0, side - 1), high.round().clamp(0, side)
        first = (low * cells / side).floor()
        end = (high * cells / side).ceil()
        return first, end, (centre * cells / side).floor()

    boxes, sizes = boxes.double(), sizes.double()
    c1, c2, c = axis(boxes[:, 0], boxes[:, 2], sizes[:, 0], width)
    r1, r2, r = axis(boxes[:, 1], boxes[:, 3], sizes[:, 1], height)
    no_patch = (c2 <= c1) | (r2 <= r1)

    def inside(first: Tensor, end: Tensor, patch: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        # The clamps and nan_to_num change nothing for finite boxes of images with a size.
        first = torch.where(no_patch, patch, first).nan_to_num(0).clamp(0, cells - 1).long()
        end = torch.where(no_patch, patch + 1, end).nan_to_num(0).clamp(0, cells).long()
        return first, torch.maximum(end, first + 1)

    return torch.stack([*inside(c1, c2, c, width), *inside(r1, r2, r, height)], dim=1)


def _of_spans(spans: Tensor, lengths: Tensor | int, context: int) -> Tensor:
    """Rectangles (M, 4) int64 of spans (M, 2) in texts of the lengths (M,), one column wide."""
    start, end = spans.long().clamp(0, context).unbind(1)
    empty = end <= start
    end = torch.where(empty, lengths, end)
    start = torch.where(empty, lengths - 1, start)
    column = torch.zeros_like(start)
    return torch.stack([column, column + 1, start, end], dim=1)


def _inside(rectangles: Tensor, width: int, num_rows: int) -> Tensor:
    """(M, P) bool: which rows of its item a rectangle holds."""
    c1, c2, r1, r2 = rectangles.T[..., None]
    position = torch.arange(num_rows, device=rectangles.device)
    row, column = position // width, position % width
    return (row >= r1) & (row < r2) & (column >= c1) & (column < c2)


def forward(
    tokens: Tensor, item: Tensor | None, ranges: Tensor, sizes: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Means (M, D) in the dtype of the tokens, and rectangles (M, 4) int32."""
    num_items, num_rows, dim = tokens.shape
    if not tokens.numel():
        count = len(ranges)
        return tokens.new_zeros(count, dim), tokens.new_zeros(count, 4, dtype=torch.int32)
    item = _items(item, len(ranges), num_items, tokens.device)
    if grid:
        assert sizes is not None
        rectangles, width = _of_boxes(ranges, sizes[item], *grid), grid[1]
    else:
        lengths = num_rows if sizes is None else sizes.long()[item].clamp(1, num_rows)
        rectangles, width = _of_spans(ranges, lengths, num_rows), 1
    inside = _inside(rectangles, width, num_rows)
    # Rows outside are replaced by one inside, of weight 0, so that a NaN outside stays there.
    position = torch.arange(num_rows, device=tokens.device)
    first = rectangles[:, 2] * width + rectangles[:, 0]
    row = torch.where(inside, position, first[:, None]) + (item * num_rows)[:, None]
    dtype = score_dtype(tokens.dtype)
    sums = F.embedding_bag(
        row, tokens.reshape(num_items * num_rows, dim).to(dtype), mode="sum",
        per_sample_weights=inside.to(dtype),
    )  # fmt: skip
    return (sums / inside.sum(dim=1, keepdim=True)).to(tokens.dtype), rectangles.int()


def backward(
    upstream: Tensor,
    item: Tensor | None,
    rectangles: Tensor,
    width: int,
    num_items: int,
    num_rows: int,
) -> Tensor:
    """The gradient of the tokens (num_items, num_rows, D): of each, the sum over its item's ranges.

    Those that do not hold it count as one more range, of gradient 0, so that their NaN stays away.
    """
    (count, dim), device = upstream.shape, upstream.device
    if not num_items * num_rows * dim:
        return upstream.new_zeros(num_items, num_rows, dim)
    inside = _inside(rectangles, width, num_rows)
    shares = upstream.to(score_dtype(upstream.dtype)) / inside.sum(dim=1, keepdim=True)
    shares = F.pad(shares, (0, 0, 0, 1))
    item, order = _items(item, count, num_items, device).sort(stable=True)
    bounds = torch.searchsorted(item, torch.arange(num_items + 1, device=device))
    counts = bounds.diff()
    # The bags of item n come after each other, one a token, and begin at num_rows * bounds[n].
    row = torch.arange(num_rows, device=device)
    starts = bounds[:-1, None] * num_rows + counts[:, None] * row
    place = torch.arange(count * num_rows, device=device)
    owner = item.repeat_interleave(num_rows)
    place = place - bounds[owner] * num_rows
    m = order[bounds[owner] + place % counts[owner]]
    bags = torch.where(inside[m, place // counts[owner]], m, count)
    gradient = F.embedding_bag(bags, shares, starts.flatten(), mode="sum")
    return gradient.view(num_items, num_rows, dim).to(upstream.dtype)

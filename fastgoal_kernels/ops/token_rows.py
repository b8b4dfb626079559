"""Padded, masked and ragged token batches, seen as one thing: rows that belong to items.

MaxSim treats every row alike, so both backends work on flat rows (total, D) and small tables that
say which item a row belongs to and what it weighs in its item's mean. No table needs a look at the
values, so building them never makes the host wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import score_dtype


class TokenRows(NamedTuple):
    """One modality's tokens. `items` is the number of images or texts."""

    rows: Tensor  # (total, D), contiguous
    starts: Tensor  # (items,) int64: an item's first row
    lengths: Tensor  # (items,) int32: up to its last valid row; 0 = empty
    row_item: Tensor  # (total,) int32: the item a row belongs to
    row_weight: Tensor  # (total,) float32 or float64: its share in the mean; 0 = padding
    longest: int  # no item is longer
    full: bool  # known without looking: every item has `longest` rows and none is padding
    has_holes: bool  # perhaps: valid rows need not be an item's first

    @property
    def items(self) -> int:
        return self.starts.shape[0]

    @property
    def total(self) -> int:
        return self.rows.shape[0]

    def bounds(self) -> list[int]:
        """Each item's first row, and the end. Of ragged tokens a CUDA device synchronises."""
        if self.total == self.items * self.longest:
            return [item * self.longest for item in range(self.items + 1)]
        return [*self.starts.tolist(), self.total]

    def part(self, items: slice, rows: slice) -> TokenRows:
        """Some items alone, and their rows."""
        return self._replace(
            rows=self.rows[rows],
            starts=self.starts[items] - rows.start,
            lengths=self.lengths[items],
            row_item=self.row_item[rows] - items.start,
            row_weight=self.row_weight[rows],
        )

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Every item cut into blocks of `size` rows: (item, first row within the item) of each.

        There are at most total // size + items blocks, a number known without looking; the
        blocks past the last real one have item -1.
        """
        per_item = (self.lengths + (size - 1)) // size
        ends = per_item.cumsum(0)
        block = torch.arange(self.total // size + self.items, device=self.rows.device)
        item = torch.searchsorted(ends, block, right=True)
        owner = item.clamp(max=self.items - 1)
        first = (block - (ends - per_item)[owner]) * size
        return torch.where(item < self.items, item, -1).int(), first.int()


def token_rows(
    tokens: Tensor, mask: Tensor | None, offsets: Tensor | None, longest: int, mean: bool
) -> TokenRows:
    """Rows of padded (items, length, D) tokens, with or without a mask, or of ragged (total, D).

    `longest` bounds the length of a ragged item. Offsets and lengths are clamped, so that wrong
    ones give wrong scores but never a read out of bounds.
    """
    device = tokens.device
    if offsets is not None:
        total = tokens.shape[0]
        bounds = offsets.long().clamp(0, total)
        starts, lengths = bounds[:-1], (bounds[1:] - bounds[:-1]).clamp(0, longest)
        row = torch.arange(total, device=device)
        row_item = torch.searchsorted(bounds[1:].contiguous(), row, right=True)
        valid = row_item < len(starts)
        row_item = row_item.clamp(max=max(len(starts) - 1, 0))
        if len(starts):
            place = row - starts[row_item]
            valid = valid & (place >= 0) & (place < lengths[row_item])
        counts, rows = lengths, tokens
    else:
        items, length, dim = tokens.shape
        longest = length
        starts = torch.arange(items, device=device) * length
        row_item = torch.arange(items, device=device)[:, None].expand(items, length).reshape(-1)
        if mask is None:
            valid = torch.ones(items * length, dtype=torch.bool, device=device)
            counts = lengths = torch.full((items,), length, device=device)
        else:
            valid = mask.reshape(-1)
            counts = mask.sum(dim=1)
            position = torch.arange(1, length + 1, device=device)
            lengths = (mask * position).amax(dim=1) if length else counts
        rows = tokens.reshape(items * length, dim)
    row_weight = valid.to(score_dtype(tokens.dtype))
    if mean and len(counts):
        row_weight = row_weight / counts.clamp_min(1)[row_item]
    return TokenRows(
        rows.contiguous(), starts, lengths.int(), row_item.int(), row_weight, longest,
        full=mask is None and offsets is None, has_holes=mask is not None,
    )  # fmt: skip


def winner_dtype(longest: int) -> torch.dtype:
    """The smallest integer that counts to `longest`: 1, 2 or 4 bytes a winner."""
    if longest <= 256:
        return torch.uint8
    return torch.uint16 if longest <= 65536 else torch.int32


def new_outputs(
    images: TokenRows, texts: TokenRows, direction: str, save_winners: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros for (t2i scores, i2t scores, t2i winners, i2t winners); no elements if not wanted.

    Scores are (images, texts); winners (images, text rows) and (texts, image rows), positions
    within the other's item. Zeros, because nobody writes the winners of empty items.
    """

    def new(wanted: bool, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        shape = (rows, columns) if wanted else 0
        return torch.zeros(shape, dtype=dtype, device=images.rows.device)

    t2i, i2t = direction != "image_to_text", direction != "text_to_image"
    dtype = score_dtype(images.rows.dtype)
    return (
        new(t2i, images.items, texts.items, dtype),
        new(i2t, images.items, texts.items, dtype),
        new(t2i and save_winners, images.items, texts.total, winner_dtype(images.longest)),
        new(i2t and save_winners, texts.items, images.total, winner_dtype(texts.longest)),
    )

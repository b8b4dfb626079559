"""One side of a loss of plain features, images or texts: what both engines do with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .normalize import gradient_through_length, unit_rows

# Gradients are finished a part of the batch at a time, because what goes through a feature's length
# takes half a dozen float32 copies.
_PARTS = 16


def slices(total: int, step: int) -> Iterator[slice]:
    """0 to total, `step` at a time."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


class Features:
    """(N, D) features as they were given, and as the loss takes them: of unit length if asked."""

    def __init__(self, given: Tensor, normalize: bool):
        self.given, self.normalize = given, normalize

    def __len__(self) -> int:
        return len(self.given)

    def all(self) -> Tensor:
        """What the loss takes, contiguous; a copy if the features have to be normalised."""
        return self.part(slice(0, len(self.given)))

    def part(self, rows: slice) -> Tensor:
        """What the loss takes of some rows, contiguous."""
        given = self.given[rows]
        return unit_rows(given) if self.normalize else given.contiguous()

    def new_gradient(self, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor for the gradient of what was given; default: in its dtype."""
        return torch.empty(
            self.given.shape, dtype=dtype or self.given.dtype, device=self.given.device
        )

    def finish(self, sums: Tensor, factor: Tensor | float, rows: slice, out: Tensor) -> None:
        """out[rows] = the gradient of what was given, of `factor` times that of what is taken.

        `sums` are those of `rows`, and are overwritten. `out` may be where they are.
        """
        for part in slices(rows.stop - rows.start, max(len(self) // _PARTS, 64)):
            where = slice(rows.start + part.start, rows.start + part.stop)
            gradient = sums[part].mul_(factor)
            if self.normalize:
                gradient = gradient_through_length(gradient, self.given[where])
            out[where] = gradient


def smoothing_shares(
    label_smoothing: float,
    pair_mask: Tensor | None,
    num_rows: int,
    num_columns: int,
    target_offset: int,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The part of the target that label smoothing gives each pair of a row, and of a column.

    It is spread evenly over the pairs that take part; targets always do.
    """
    if pair_mask is None:
        rows, columns = (
            like.new_full((num_rows,), num_columns),
            like.new_full((num_columns,), num_rows),
        )
    else:
        masked_targets = (~pair_mask.diagonal(target_offset)).to(like.dtype)
        rows, columns = pair_mask.sum(1).to(like.dtype), pair_mask.sum(0).to(like.dtype)
        rows += masked_targets
        columns[target_offset : target_offset + num_rows] += masked_targets
    return label_smoothing / rows, label_smoothing / columns

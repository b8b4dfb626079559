"""The k best of every row and of every column of a score matrix that is seen tile by tile.

Best first; of equal scores the lower index comes first; NaN counts as the best, as in
`torch.sort`. The definition is `reference.topk`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def _best_columns(tile: Tensor, k: int) -> Tensor:
    """(rows, k) columns of each row's k best; of equal scores the lower columns, in their order.

    Which of several equal scores `torch.topk` returns is left open, so it only says where to cut.
    A second one, over integers that are all different, picks. Sorting the tile takes several times
    as long, and whatever depends on whether there are ties makes the host wait for the device.
    """
    width = tile.shape[1]
    cut = tile.topk(k, dim=1).values[:, -1:]
    # k or more NaN: only NaN is neither below nor at infinity.
    cut = cut.masked_fill(cut.isnan(), torch.inf)
    place = torch.arange(width, 0, -1, dtype=torch.int32, device=tile.device)
    place = torch.where(tile == cut, place, place + width)
    return place.masked_fill_(tile < cut, 0).topk(k, dim=1).indices


def _merge(values: Tensor, indices: Tensor, tile: Tensor, first: int, k: int) -> None:
    """Merge tile (rows, n), columns `first` to `first` + n, into the k best so far, in place.

    What is kept has lower indices than what comes, so a stable sort keeps the order of ties.
    """
    if tile.shape[1] > k:
        column = _best_columns(tile, k)
        tile = tile.gather(1, column)
    else:
        column = torch.arange(tile.shape[1], device=tile.device).expand_as(tile)
    seen = min(first, k)
    values_now = torch.cat([values[:, :seen], tile], dim=1)
    indices_now = torch.cat([indices[:, :seen], column + first], dim=1)
    best, order = values_now.sort(dim=1, descending=True, stable=True)
    kept = min(k, best.shape[1])
    values[:, :kept] = best[:, :kept]
    indices[:, :kept] = indices_now.gather(1, order[:, :kept])


def _slots(items: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((items, k), dtype=like.dtype, device=like.device),
        torch.empty((items, k), dtype=torch.long, device=like.device),
    )


def streaming_topk_of_rows(
    shape: tuple[int, int], k: int, tiles: Iterable[tuple[slice, Tensor]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """(values, indices) of each row's k best columns; the tiles (columns, scores) have all rows."""
    num_rows, num_columns = shape
    values, indices = _slots(num_rows, min(k, num_columns), like)
    for columns, scores in tiles:
        _merge(values, indices, scores, columns.start, k)
    return values, indices


def streaming_topk(
    shape: tuple[int, int],
    k: int,
    tiles: Iterable[tuple[slice, slice, Tensor]],
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, indices) of each row's k best columns, then of each column's k best rows.

    Args:
        shape: (rows, columns) of the whole score matrix.
        k: how many, cut to what there is.
        tiles: (rows, columns, scores), covering the matrix once, in row-major or column-major
            order of the tiles.
        like: gives device and dtype.
    """
    num_rows, num_columns = shape
    row_values, row_indices = _slots(num_rows, min(k, num_columns), like)
    column_values, column_indices = _slots(num_columns, min(k, num_rows), like)
    for rows, columns, scores in tiles:
        _merge(row_values[rows], row_indices[rows], scores, columns.start, k)
        _merge(column_values[columns], column_indices[columns], scores.T, rows.start, k)
    return row_values, row_indices, column_values, column_indices

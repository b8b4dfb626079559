"""MaxSim in plain PyTorch, chunked: exact on any device, never holding the four-way tensor.

Forward. A few images meet a few texts at a time: one matrix product whose result stays in cache
(a couple of MB on a CPU), both maxima from it, one byte a winner kept. Padding is skipped by
taking the items in the order of their lengths, so that those of a tile are about equally long.

Backward. No product at all. The gradient of a query token is a weighted sum of the keys that won,
that of a key token a weighted sum of the queries it won: both are what embedding_bag computes, a
sum over rows of a table in a fixed order, with bags of equal size in the first case and bags cut
from the sorted winners in the second. The rows are read all over the table, so on a CPU the table
is cut into slabs of a few channels that stay in cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import score_dtype
from .products import RepeatedFactor
from .slots import slots
from .token_rows import TokenRows, new_outputs

# Elements of one similarity tile. On a CPU it should stay in the caches next to the cores; on a
# GPU it should be large enough to fill the device and small beside the inputs.
_TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
# Rows of images in a tile: enough that the product keeps its pace, few enough to leave room for
# several texts.
_IMAGE_ROWS = {"cpu": 1568, "cuda": 4096}
# Bag entries (an index and a weight) held at once in the backward, and elements of their sums.
_BAG_ENTRIES = 1 << 18
_SUM_ELEMENTS = 1 << 20
# Channels of a slab, and its rows, on a CPU: 64 channels are four cache lines a row, and 8 MB stay
# in the last-level cache. (AMD EPYC, 25,000 rows: five times the rate of all 512 channels at once.)
_SLAB_CHANNELS = 64
_SLAB_ROWS = 1 << 12


class _Chunk(NamedTuple):
    """Some items of one side as (n, longest, D), whatever layout they came in.

    Valid tokens come first. Behind an item's last it is repeated: a maximum does not see that, and
    the lowest index wins before it, so that no similarity has to be masked.
    """

    tokens: Tensor  # (n * longest, D)
    items: Tensor | slice  # which they are
    rows: Tensor | slice  # the rows of their valid tokens, in order
    weight: Tensor  # (n, longest): 0 = repeated
    live: Tensor | None  # weight != 0; None = all
    longest: int
    place: Tensor | None  # (n, longest): where in its item a token stands; None = where it is here

    def __len__(self) -> int:
        return self.weight.shape[0]


def _chunks(side: TokenRows, max_rows: int) -> Iterator[_Chunk]:
    """All items that have a token, as chunks of at most max_rows rows, but at least one item.

    Of masked or ragged input a CUDA device synchronises, to learn the lengths.
    """
    if side.full:
        step = max(1, max_rows // max(side.longest, 1))
        for first in range(0, side.items if side.longest else 0, step):
            items = slice(first, min(first + step, side.items))
            rows = slice(items.start * side.longest, items.stop * side.longest)
            weight = side.row_weight[rows].view(-1, side.longest)
            yield _Chunk(side.rows[rows], items, rows, weight, None, side.longest, None)
        return
    line = slots(side, granule=1)
    counts, order = line.item_slots.diff().sort(stable=True)
    ends = counts.tolist()
    first = ends.count(0)
    while first < side.items:
        last = first + 1
        while last < side.items and (last + 1 - first) * ends[last] <= max_rows:
            last += 1
        items, longest = order[first:last], ends[last - 1]
        position = torch.arange(longest, device=order.device)
        count = counts[first:last, None]
        row = line.row[line.item_slots[items, None] + torch.minimum(position, count - 1)]
        live = position < count
        weight = torch.where(live, side.row_weight[row], 0.0)
        place = row - side.starts[items, None] if side.has_holes else None
        yield _Chunk(side.rows[row.flatten()], items, row[live], weight, live, longest, place)
        first = last


def forward(
    images: TokenRows,
    texts: TokenRows,
    direction: str,
    save_winners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `token_rows.new_outputs`, filled."""
    outputs = new_outputs(images, texts, direction, save_winners)
    t2i, i2t, t2i_winners, i2t_winners = outputs
    want_t2i, want_i2t = direction != "image_to_text", direction != "text_to_image"
    device = images.rows.device.type
    elements = _TILE_ELEMENTS.get(device, _TILE_ELEMENTS["cuda"])
    for v in _chunks(images, _IMAGE_ROWS.get(device, _IMAGE_ROWS["cuda"])):
        text_rows = max(1, elements // len(v.tokens))
        factor = RepeatedFactor(v.tokens, text_rows)
        for t in _chunks(texts, text_rows):
            tile = factor.times(t.tokens).view(len(t), t.longest, len(v), v.longest)  # (j, q, i, r)
            if want_t2i:
                best, winner = _first_maximum(tile, 3, save_winners)  # (j, q, i)
                live = None if t.live is None else t.live[:, :, None]
                score = _weighted_sum(best, t.weight[:, :, None], live, 1)
                t2i[_outer(v.items, t.items)] = score.T
                if winner is not None:
                    _put_winners(t2i_winners, v, t, winner.permute(2, 0, 1))
            if want_i2t:
                best, winner = _first_maximum(tile, 1, save_winners)  # (j, i, r)
                i2t[_outer(v.items, t.items)] = _weighted_sum(best, v.weight, v.live, 2).T
                if winner is not None:
                    _put_winners(i2t_winners, t, v, winner)
    return outputs


def _first_maximum(tile: Tensor, dim: int, with_index: bool) -> tuple[Tensor, Tensor | None]:
    """The maximum along a dimension, NaN if one is there, and the lowest index that reaches it.

    On a CPU four passes that are vectorised take half the time of the one of max(dim), which is
    not: 1 where the maximum is reached, times a code that falls with the index; the largest
    product tells the first.
    """
    if not with_index:
        return tile.amax(dim), None
    if tile.device.type != "cpu":
        best, index = tile.max(dim)
        return best, index
    best = tile.amax(dim, keepdim=True)
    length = tile.shape[dim]
    code = torch.arange(length, 0, -1, dtype=tile.dtype).view(-1, *(1,) * (tile.ndim - 1 - dim))
    reached = torch.ge(tile, best, out=torch.empty_like(tile)).mul_(code)
    # Beside a NaN nothing is reached, and the index would be the length.
    return best.squeeze(dim), (length - reached.amax(dim)).clamp_(max=length - 1)


def _weighted_sum(best: Tensor, weight: Tensor, live: Tensor | None, dim: int) -> Tensor:
    """The scores. Repeated tokens have weight 0, which would not stop a NaN."""
    shares = best * weight
    return (shares if live is None else torch.where(live, shares, 0.0)).sum(dim)


def _outer(rows: Tensor | slice, columns: Tensor | slice) -> tuple[Tensor | slice, Tensor | slice]:
    """The index of all rows by all columns."""
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        return rows[:, None], columns
    return rows, columns


def _put_winners(winners: Tensor, keys: _Chunk, queries: _Chunk, chunk_winners: Tensor) -> None:
    """Write (keys, n, longest) winners of a chunk of queries to their places in (keys, rows)."""
    if queries.live is None:
        chunk_winners = chunk_winners.flatten(1)
    else:
        chunk_winners = chunk_winners[:, queries.live]
    if keys.place is not None:
        chunk_winners = keys.place.gather(1, chunk_winners.long())
    winners[_outer(keys.items, queries.rows)] = chunk_winners.to(winners.dtype)


def backward(
    images: TokenRows,
    texts: TokenRows,
    t2i: tuple[Tensor, Tensor] | None,
    i2t: tuple[Tensor, Tensor] | None,
    need_image: bool,
    need_text: bool,
    skip_zeros: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both sides' rows from (winners, dL/dS (images, texts)) of each direction.

    skip_zeros: many dL/dS are 0, so that it pays to leave their bag entries out. Only on a CPU: a
    CUDA device would have to tell the host how many are left.
    """
    i2t_of_text = (i2t[0], i2t[1].T) if i2t else None
    t2i_of_text = (t2i[0], t2i[1].T) if t2i else None
    skip = skip_zeros and images.rows.device.type == "cpu"
    image_grad = _side_gradient(images, texts, i2t, t2i, skip) if need_image else None
    text_grad = _side_gradient(texts, images, t2i_of_text, i2t_of_text, skip) if need_text else None
    return image_grad, text_grad


def _side_gradient(
    own: TokenRows,
    other: TokenRows,
    gather: tuple[Tensor, Tensor] | None,
    scatter: tuple[Tensor, Tensor] | None,
    skip_zeros: bool,
) -> Tensor:
    """d own.rows; both gradients of the scores come as (own items, other items)."""
    dtype = score_dtype(own.rows.dtype)
    gradient = torch.zeros(own.rows.shape, dtype=dtype, device=own.rows.device)
    if gradient.numel() and other.total:
        dim, own_bounds, other_bounds = own.rows.shape[1], own.bounds(), other.bounds()
        on_cpu = gradient.device.type == "cpu"
        max_rows, width = (_SLAB_ROWS, _SLAB_CHANNELS) if on_cpu else (other.total, dim)
        for others in _item_ranges(other_bounds, max_rows):
            other_rows = slice(other_bounds[others.start], other_bounds[others.stop])
            slabs = _slabs(other, other_rows, dtype, width)
            # Entries that an own row brings: one an item that it queries, and its share of the
            # rows that query its item.
            entries = max(len(other.starts[others]), len(slabs[0]) * own.items // own.total, 1)
            step = min(_BAG_ENTRIES // entries, _SUM_ELEMENTS // width)
            for items in _item_ranges(own_bounds, step):
                rows = slice(own_bounds[items.start], own_bounds[items.stop])
                bags = []
                if gather:
                    bags.append(_gather_bags(own, items, rows, other, others, *gather, skip_zeros))
                if scatter:
                    bags.append(
                        _scatter_bags(own, items, rows, other, other_rows, *scatter, skip_zeros)
                    )
                for slab, columns in zip(slabs, gradient[rows].split(width, dim=1), strict=True):
                    for index, first_of_bag, share in bags:
                        columns += F.embedding_bag(
                            index, slab, first_of_bag, mode="sum", per_sample_weights=share
                        )[: len(columns)]
    return gradient.to(own.rows.dtype)


def _item_ranges(bounds: list[int], max_rows: int) -> Iterator[slice]:
    """All items in ranges of at most max_rows rows, but at least one item; none without rows."""
    first, items = 0, len(bounds) - 1
    while first < items:
        last = max(bisect_right(bounds, bounds[first] + max_rows) - 1, first + 1)
        if bounds[last] > bounds[first]:
            yield slice(first, last)
        first = last


def _slabs(side: TokenRows, rows: slice, dtype: torch.dtype, width: int) -> list[Tensor]:
    """These rows, a few channels at a time, each slab in one piece."""
    table = side.rows[rows].to(dtype)
    if not side.full:  # a NaN in padding would survive a share of 0
        table = torch.where((side.row_weight[rows] != 0)[:, None], table, 0)
    return [slab.contiguous() for slab in table.split(width, dim=1)]


# Bags as embedding_bag takes them: (index, first entry of each bag or None, share of each entry).
_Bags = tuple[Tensor, "Tensor | None", Tensor]


def _gather_bags(
    own: TokenRows, items: slice, rows: slice, other: TokenRows, others: slice,
    winners: Tensor, grad: Tensor, skip_zeros: bool,
) -> _Bags:  # fmt: skip
    """Own row q sums w_q * g[item of q, x] * (its winner in x) over the other items x."""
    starts, alive = other.starts[others], other.lengths[others] > 0
    # An item without a token names no row: its share is 0, and any row will do.
    index = winners[others, rows].T.contiguous() + (starts - starts[0])
    index = torch.where(alive, index, 0)
    share = torch.where(alive, grad[items, others], 0)[own.row_item[rows] - items.start]
    share = share * own.row_weight[rows, None]
    if not skip_zeros:
        return index, None, share
    kept = share != 0
    counts = kept.sum(dim=1)
    return index[kept], counts.cumsum(0) - counts, share[kept]


def _scatter_bags(
    own: TokenRows, items: slice, rows: slice, other: TokenRows, other_rows: slice,
    winners: Tensor, grad: Tensor, skip_zeros: bool,
) -> _Bags:  # fmt: skip
    """Own row k of item x sums g[x, item of s] * w_s * s over the other rows s that it won."""
    weight, row_item = other.row_weight[other_rows], other.row_item[other_rows]
    bag = winners[items, other_rows].int() + (own.starts[items] - rows.start).int()[:, None]
    num_bags = rows.stop - rows.start
    if not (own.full and other.full):  # rows without a vote go to a bag behind the last
        bag = torch.where((weight != 0) & (own.lengths[items, None] > 0), bag, num_bags)
    bag, share = bag.flatten(), (grad[items][:, row_item] * weight).flatten()
    entry = None
    if skip_zeros:
        entry = share.nonzero().squeeze(1)
        bag = bag[entry]
    bag, order = bag.sort(stable=True)
    order = order if entry is None else entry[order]
    first_of_bag = torch.searchsorted(
        bag, torch.arange(num_bags + 1, dtype=bag.dtype, device=bag.device)
    )
    return order % len(weight), first_of_bag, share[order]

"""MaxSim in plain PyTorch, chunked: exact on any device, never holding the four-way tensor.

Forward. A few images meet a few texts at a time: one matrix product whose result stays in cache
(a couple of MB on a CPU), both maxima from it, one byte a winner kept.

Backward. No product at all. The gradient of a query token is a weighted sum of the keys that won,
that of a key token a weighted sum of the queries it won: both are what embedding_bag computes, a
sum over rows of a table in a fixed order, with bags of equal size in the first case and bags cut
from the sorted winners in the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import score_dtype
from .products import wide_product
from .token_rows import TokenRows, new_outputs

# Elements of one similarity tile. On a CPU it should stay in L2; on a GPU it should be large
# enough to fill the device and small beside the inputs.
_TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
# Bag entries (an index and a weight) held at once in the backward, and elements of their sums.
_BAG_ENTRIES = 1 << 18
_SUM_ELEMENTS = 1 << 20
# Elements of the table that a scatter reads from at a time: every bag reads all over it, so it
# should stay in the last-level cache.
_SLAB_ELEMENTS = 1 << 21


class _Padded:
    """One side as (items, longest, D) with a mask, whatever layout it came in."""

    def __init__(self, side: TokenRows, longest: int):
        self.rows, self.longest, self.full = side.rows, longest, side.full
        # Row positions that no item has read row 0; the mask keeps them out of everything.
        position = torch.arange(longest, device=side.rows.device)
        index = side.starts[:, None] + position
        inside = position < side.lengths[:, None]
        self.row = torch.where(inside, index, 0)
        self.weight = torch.where(inside, side.row_weight[self.row], 0.0)
        self.live = self.weight != 0

    def chunk(self, first: int, last: int) -> Tensor:
        """(items * longest, D) tokens of items first to last."""
        if self.full:
            return self.rows[first * self.longest : last * self.longest]
        return self.rows[self.row[first:last].flatten()]


def _longest(side: TokenRows) -> int:
    """The longest item, exactly. Of masked or ragged input a CUDA device synchronises for it."""
    if side.items == 0 or side.total == 0:
        return 0
    return side.longest if side.full else int(side.lengths.max())


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
    longest_v, longest_t = _longest(images), _longest(texts)
    if 0 in (images.items, texts.items, longest_v, longest_t):
        return outputs

    v, t = _Padded(images, longest_v), _Padded(texts, longest_t)
    step_v, step_t = _steps(longest_v, longest_t, images.rows.device)
    for i in range(0, images.items, step_v):
        i_end = min(i + step_v, images.items)
        v_chunk = v.chunk(i, i_end)
        for j in range(0, texts.items, step_t):
            j_end = min(j + step_t, texts.items)
            tile = wide_product(t.chunk(j, j_end), v_chunk.T)
            tile = tile.view(j_end - j, longest_t, i_end - i, longest_v)  # (j, q, i, r)
            if not v.full:
                tile.masked_fill_(~v.live[None, None, i:i_end], -torch.inf)
            if not t.full:
                tile.masked_fill_(~t.live[j:j_end, :, None, None], -torch.inf)
            if want_t2i:
                best, winner = tile.max(dim=3)  # (j, q, i); of equal maxima the first
                score = _mean(best, t, slice(j, j_end), v, slice(i, i_end))
                t2i[i:i_end, j:j_end] = score.T
                if save_winners:
                    _put(t2i_winners[i:i_end], winner.permute(2, 0, 1), t, j, j_end)
            if want_i2t:
                best, winner = tile.max(dim=1)  # (j, i, r)
                best = best.permute(1, 2, 0)
                i2t[i:i_end, j:j_end] = _mean(best, v, slice(i, i_end), t, slice(j, j_end))
                if save_winners:
                    _put(i2t_winners[j:j_end], winner, v, i, i_end)
    return outputs


def _steps(longest_v: int, longest_t: int, device: torch.device) -> tuple[int, int]:
    """Images and texts of a tile: about 400 region rows, then as many word rows as it holds."""
    elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS["cuda"])
    step_v = max(1, round(elements**0.5 * 0.55 / longest_v))
    step_t = max(1, elements // (step_v * longest_v * longest_t))
    return step_v, step_t


def _mean(best: Tensor, query: _Padded, queries: slice, key: _Padded, keys: slice) -> Tensor:
    """(queries, longest, keys) maxima to (queries, keys) scores; padding and empty keys count 0."""
    weight = query.weight[queries, :, None]
    if query.full and key.full:
        return (best * weight).sum(dim=1)
    alive = (weight != 0) & key.live[keys].any(dim=1)
    return torch.where(alive, best * weight, 0.0).sum(dim=1)


def _put(winners: Tensor, chunk: Tensor, side: _Padded, first: int, last: int) -> None:
    """Write (keys, items, longest) winners of a chunk of items to their rows of (keys, rows)."""
    chunk = chunk.to(winners.dtype)
    if side.full:
        winners[:, first * side.longest : last * side.longest] = chunk.flatten(1)
    else:
        live = side.live[first:last]
        winners[:, side.row[first:last][live]] = chunk[:, live]


def backward(
    images: TokenRows,
    texts: TokenRows,
    t2i: tuple[Tensor, Tensor] | None,
    i2t: tuple[Tensor, Tensor] | None,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both sides' rows from (winners, dL/dS (images, texts)) of each direction."""
    i2t_own_text = (i2t[0], i2t[1].T) if i2t else None
    t2i_own_text = (t2i[0], t2i[1].T) if t2i else None
    image_grad = _side_gradient(images, texts, i2t, t2i) if need_image else None
    text_grad = _side_gradient(texts, images, t2i_own_text, i2t_own_text) if need_text else None
    return image_grad, text_grad


def _side_gradient(
    own: TokenRows,
    other: TokenRows,
    gather: tuple[Tensor, Tensor] | None,
    scatter: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """d own.rows; both gradients of the scores come as (own items, other items)."""
    dtype = score_dtype(own.rows.dtype)
    gradient = torch.zeros(own.rows.shape, dtype=dtype, device=own.rows.device)
    if gradient.numel() and other.total:
        table = other.rows.to(dtype)
        if not other.full:  # a NaN in padding would survive a weight of 0
            table = torch.where((other.row_weight != 0)[:, None], table, 0)
        if gather:
            _gather(gradient, table, own, other, *gather)
        if scatter:
            _scatter(gradient, table, own, other, *scatter)
    return gradient.to(own.rows.dtype)


def _gather(
    gradient: Tensor, table: Tensor, own: TokenRows, other: TokenRows, winners: Tensor, grad: Tensor
) -> None:
    """Row q gets w_q * sum over other items x of g[item of q, x] * table[winner of q in x]."""
    grad = torch.where(other.lengths > 0, grad, 0)
    step = max(1, min(_BAG_ENTRIES // other.items, _SUM_ELEMENTS // table.shape[1]))
    for first in range(0, own.total, step):
        rows = slice(first, first + step)
        index = (winners[:, rows].long() + other.starts[:, None]).T
        share = grad[own.row_item[rows]] * own.row_weight[rows, None]
        gradient[rows] += F.embedding_bag(
            index.clamp_(0, other.total - 1), table, mode="sum",
            per_sample_weights=share.to(table.dtype),
        )  # fmt: skip


def _scatter(
    gradient: Tensor, table: Tensor, own: TokenRows, other: TokenRows, winners: Tensor, grad: Tensor
) -> None:
    """Own row k of item x gets the sum of g[x, item of s] * w_s * table[s] over its queries s."""
    longest, dim, device = _longest(own), table.shape[1], table.device
    if longest == 0:
        return
    all_vote = own.full and other.full
    slab = max(1, _SLAB_ELEMENTS // dim)
    step = max(1, min(_BAG_ENTRIES // slab, _SUM_ELEMENTS // (longest * dim)))
    position = torch.arange(longest, device=device)
    for first_row in range(0, other.total, slab):
        rows = slice(first_row, min(first_row + slab, other.total))
        part, weight, row_item = table[rows], other.row_weight[rows], other.row_item[rows]
        for first in range(0, own.items, step):
            items = slice(first, min(first + step, own.items))
            winner = winners[items, rows].int()
            if not all_vote:  # queries without a vote go to a bag behind the last key's
                alive = (weight != 0) & (own.lengths[items, None] > 0)
                winner = torch.where(alive, winner, longest)
            count = winner.shape[0]
            bags = count * (longest + 1)
            first_bag = torch.arange(0, bags, longest + 1, dtype=torch.int32, device=device)
            bag, order = (winner + first_bag[:, None]).flatten().sort(stable=True)
            bag_ids = torch.arange(bags, dtype=torch.int32, device=device)
            share = (grad[items][:, row_item] * weight).to(table.dtype)
            sums = F.embedding_bag(
                order % part.shape[0], part, torch.searchsorted(bag, bag_ids), mode="sum",
                per_sample_weights=share.flatten()[order],
            ).view(count, longest + 1, dim)[:, :longest]  # fmt: skip
            if own.full:
                gradient.view(own.items, longest, dim)[items] += sums
            else:
                inside = position < own.lengths[items, None]
                gradient[(own.starts[items, None] + position)[inside]] += sums[inside]

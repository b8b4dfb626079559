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
from .token_rows import TokenRows, winner_dtype

# Elements of one similarity tile. On a CPU it should stay in L2; on a GPU it should be large
# enough to fill the device and small beside the inputs.
_TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
# Bag entries (an index and a weight) held at once in the backward.
_BAG_ENTRIES = 1 << 18
# Elements of the sums of those bags.
_SUM_ELEMENTS = 1 << 19


class _Padded:
    """One side as (items, longest, D) with a mask, whatever layout it came in."""

    def __init__(self, side: TokenRows, longest: int):
        self.rows, self.items, self.longest = side.rows, side.items, longest
        self.full = side.full
        # Row positions that no item has read row 0; the mask keeps them out of everything.
        position = torch.arange(longest, device=side.rows.device)
        index = side.starts[:, None] + position
        inside = position < side.lengths[:, None]
        self.row = torch.where(inside, index, 0)
        weight = torch.where(inside, side.row_weight[self.row], 0.0)
        self.weight = weight.to(score_dtype(side.rows.dtype))
        self.live = weight != 0

    def chunk(self, first: int, last: int) -> Tensor:
        """(rows, D) tokens of items first to last, and how many rows an item has there."""
        if self.full:
            return self.rows[first * self.longest : last * self.longest]
        return self.rows[self.row[first:last].flatten()]


def _longest(side: TokenRows) -> int:
    """The longest item, exactly. Of masked or ragged input a CUDA device synchronises for it."""
    if side.items == 0 or side.total == 0:
        return 0
    return side.longest if side.full else int(side.lengths.max())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T accumulated, and returned, in float32 (float64 for float64)."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16) and _HAS_OUT_DTYPE:
        return torch.mm(a, b.T, out_dtype=torch.float32)
    dtype = score_dtype(a.dtype)
    return a.to(dtype) @ b.to(dtype).T


_HAS_OUT_DTYPE = "out_dtype" in (torch.mm.__doc__ or "")


def forward(
    images: TokenRows,
    texts: TokenRows,
    direction: str,
    save_winners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t2i scores, i2t scores, t2i winners, i2t winners); what is not asked for is empty.

    Winners are (images, text rows) and (texts, image rows): positions within the other's item.
    """
    device, dtype = images.rows.device, score_dtype(images.rows.dtype)
    want_t2i, want_i2t = direction != "image_to_text", direction != "text_to_image"

    def empty_if(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape if wanted else 0, dtype=dtype, device=device)

    t2i = empty_if(want_t2i, images.items, texts.items)
    i2t = empty_if(want_i2t, images.items, texts.items)
    t2i_winners = empty_if(
        want_t2i and save_winners, images.items, texts.total, dtype=winner_dtype(images.longest)
    )
    i2t_winners = empty_if(
        want_i2t and save_winners, texts.items, images.total, dtype=winner_dtype(texts.longest)
    )
    outputs = t2i, i2t, t2i_winners, i2t_winners
    longest_v, longest_t = _longest(images), _longest(texts)
    if 0 in (images.items, texts.items, longest_v, longest_t):
        return outputs

    v, t = _Padded(images, longest_v), _Padded(texts, longest_t)
    step_v, step_t = _steps(longest_v, longest_t, device)
    for i in range(0, images.items, step_v):
        i_end = min(i + step_v, images.items)
        v_chunk = v.chunk(i, i_end)
        for j in range(0, texts.items, step_t):
            j_end = min(j + step_t, texts.items)
            tile = _product(t.chunk(j, j_end), v_chunk)
            tile = tile.view(j_end - j, longest_t, i_end - i, longest_v)  # (j, q, i, r)
            if not v.full:
                tile.masked_fill_(~v.live[None, None, i:i_end], -torch.inf)
            if not t.full:
                tile.masked_fill_(~t.live[j:j_end, :, None, None], -torch.inf)
            if want_t2i:
                best, winner = tile.max(dim=3)  # (j, q, i)
                score = _weighted(best, t.weight[j:j_end, :, None], dim=1)
                alive = v.live[i:i_end].any(dim=1)
                t2i[i:i_end, j:j_end] = torch.where(alive, score, 0.0).T
                if save_winners:
                    _put(t2i_winners[i:i_end], winner.permute(2, 0, 1), t, j, j_end)
            if want_i2t:
                best, winner = tile.max(dim=1)  # (j, i, r)
                score = _weighted(best, v.weight[None, i:i_end], dim=2)
                alive = t.live[j:j_end].any(dim=1)
                i2t[i:i_end, j:j_end] = torch.where(alive[:, None], score, 0.0).T
                if save_winners:
                    _put(i2t_winners[j:j_end], winner, v, i, i_end)
    return outputs


def _steps(longest_v: int, longest_t: int, device: torch.device) -> tuple[int, int]:
    """Images and texts of a tile: about 400 region rows, then as many word rows as it holds."""
    elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS["cuda"])
    step_v = max(1, round(elements**0.5 * 0.55 / longest_v))
    step_t = max(1, elements // (step_v * longest_v * longest_t))
    return step_v, step_t


def _weighted(best: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Sum of best * weight, where a weight of 0 takes even an infinity out."""
    return torch.where(weight != 0, best * weight, 0.0).sum(dim=dim)


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
    live = (other.row_weight != 0) & (own.lengths > 0)[:, None]
    longest = _longest(own)
    if longest == 0:
        return
    step = max(1, min(_BAG_ENTRIES // other.total, _SUM_ELEMENTS // (longest * table.shape[1])))
    edges = torch.arange(longest + 1, device=table.device)
    position = torch.arange(longest, device=table.device)
    for first in range(0, own.items, step):
        items = slice(first, first + step)
        # Queries without a vote sort behind the last key, into a bag that nobody reads.
        winner = torch.where(live[items], winners[items].long(), longest)
        winner, order = winner.sort(dim=1, stable=True)
        bounds = torch.searchsorted(winner, edges.repeat(len(winner), 1))
        offset = torch.arange(len(winner), device=table.device)[:, None] * other.total
        share = grad[items].gather(1, other.row_item[order].long()) * other.row_weight[order]
        # One more bag an item: it takes what has no vote.
        sums = F.embedding_bag(
            order.flatten(), table, (bounds + offset).flatten(), mode="sum",
            per_sample_weights=share.flatten().to(table.dtype),
        ).view(len(winner), longest + 1, -1)[:, :longest]  # fmt: skip
        if own.full:
            gradient.view(own.items, longest, -1)[items] += sums
        else:
            inside = position < own.lengths[items, None]
            gradient[(own.starts[items, None] + position)[inside]] += sums[inside]

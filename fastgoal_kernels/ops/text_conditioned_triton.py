"""Text-conditioned scores in Triton: attention kernels, and a projection that ends in a cosine.

Pairs are worked on a chunk at a time, a few images times many captions. The pooled heads a_ij of a
chunk lie in a buffer that a GPU's L2 holds; everything else of a pair stays in registers.

    attention_kernel            q, k, v -> a, and per head its log-sum-exp or its share in <o, t>
    norm_kernel                 a -> |o| = |W a + b|; o is never stored
    projection_gradient_kernel  a -> o -> dL/do, from which cuBLAS makes dL/da and dL/dW
    query_gradient_kernel       dL/da -> dL/dq of every pair
    key_value_gradient_kernel   dL/da -> dL/dk and dL/dv, some captions at a time
    sum_by_caption_kernel       rows of pairs -> their sum, weighted, over each caption's pairs

<o, t> is <a, W't> + <b, t>, and W't is made once a caption: only |o| costs D x D products a pair.
The backward makes a again rather than keep it, and P from the log-sum-exps. Sums over pairs go
through partial sums that are added in a fixed order: no atomics, the same bits every run. Softmax
logits are kept in units of log 2, because the device's exponential is exp2. The counts behind this
are in docs/kernels/text_conditioned.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .products import sum_of_products
from .text_conditioned_pool import Need, Pool, add_rows
from .tiles_triton import (
    Config,
    architecture,
    dot,
    float32_precision,
    of_architecture,
    product_tile,
    tile_case,
)

# Numbers in one buffer of a chunk: 32 MB of half precision. Of three such buffers, two at a time
# are in use, about what an H200's L2 holds; and a chunk is long enough to fill it.
_CHUNK_ELEMENTS = 1 << 24
# Images in one chunk: they are a launch's third axis, and CUDA has no longer one.
_CHUNK_IMAGES = 65_535
# How many programs of the key and value gradients keep every chip busy.
_PROGRAMS = 1024

_LN_2 = tl.constexpr(math.log(2))

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "first_column", "num_columns", "num_pairs", "length", "num_images", "columns_a_split",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


@triton.jit
def _captions(index, image, c, first_column, num_columns, HAS_INDEX: tl.constexpr):
    """The captions of an image's columns c of the chunk."""
    if HAS_INDEX:
        place = image.to(tl.int64) * num_columns + c
        return tl.load(index + place, mask=c < num_columns, other=0)
    return tl.minimum(first_column + c, first_column + num_columns - 1).to(tl.int64)


@triton.jit
def _head_rows(rows, row, ok, head, DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr):
    """One head's part of these rows (n, DIM): (n, BLOCK_H); 0 where not ok and past the head."""
    d = tl.arange(0, BLOCK_H)
    inside = ok[:, None] & (d < HEAD)[None, :]
    place = row.to(tl.int64)[:, None] * DIM + head * HEAD + d[None, :]
    return tl.load(rows + place, mask=inside, other=0.0)


@triton.jit
def _store_head_rows(
    rows, value, row, ok, head, DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr
):
    d = tl.arange(0, BLOCK_H)
    inside = ok[:, None] & (d < HEAD)[None, :]
    place = row.to(tl.int64)[:, None] * DIM + head * HEAD + d[None, :]
    tl.store(rows + place, value.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _alive(mask, image, token, length, HAS_MASK: tl.constexpr):
    """Which of an image's tokens can be attended to."""
    ok = token < length
    if HAS_MASK:
        place = image.to(tl.int64) * length + token
        ok = ok & (tl.load(mask + place, mask=ok, other=0) != 0)
    return ok


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attention_kernel(
    q, k, v, mask, index, pooled, lse, folded_text, along,
    first_column, num_columns, length, softmax_scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    ZERO: tl.constexpr, HAS_MASK: tl.constexpr, HAS_INDEX: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of an image, attended to by a block of captions: softmax([q k, 0]) [v, 0].

    `softmax_scale` is in units of log 2. The 0, under ZERO, is where the softmax starts from. For
    the scores <a, W't> is wanted as well, for the backward the log-sum-exp.
    """
    head, image = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < num_columns
    caption = _captions(index, image, c, first_column, num_columns, HAS_INDEX)
    query = _head_rows(q, caption, ok, head, DIM, HEAD, BLOCK_H)
    if ZERO:
        top = tl.zeros((BLOCK_C,), dtype=tl.float32)
        total = tl.full((BLOCK_C,), 1.0, dtype=tl.float32)
    else:
        top = tl.full((BLOCK_C,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    first_row = image.to(tl.int64) * length
    for first in range(0, length, BLOCK_L):
        token = first + tl.arange(0, BLOCK_L)
        inside = token < length
        key = _head_rows(k, first_row + token, inside, head, DIM, HEAD, BLOCK_H)
        value = _head_rows(v, first_row + token, inside, head, DIM, HEAD, BLOCK_H)
        logits = dot(query, tl.trans(key), tl.zeros((BLOCK_C, BLOCK_L), tl.float32), PRECISION)
        alive = _alive(mask, image, token, length, HAS_MASK)
        logits = tl.where(alive[None, :], logits * softmax_scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = dot(weights.to(value.dtype), value, sums * shrink[:, None], PRECISION)
        top = new_top
    nothing = total == 0.0
    row = image.to(tl.int64) * num_columns + c
    average = sums / tl.where(nothing, 1.0, total)[:, None]
    _store_head_rows(pooled, average, row, ok, head, DIM, HEAD, BLOCK_H)
    place = row * (DIM // HEAD) + head
    if SCORES:
        # Looked up again: kept through the loop they were registers that sm_80 spilled.
        caption = _captions(index, image, c, first_column, num_columns, HAS_INDEX)
        folded = _head_rows(folded_text, caption, ok, head, DIM, HEAD, BLOCK_H)
        tl.store(along + place, tl.sum(average * folded, axis=1), mask=ok)
    else:
        top += tl.log2(tl.where(nothing, 1.0, total))
        tl.store(lse + place, tl.where(nothing, 0.0, top), mask=ok)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def query_gradient_kernel(
    q, k, v, mask, index, pooled, d_pooled, lse, delta, d_q,
    first_column, num_columns, length, softmax_scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dq of every pair, and delta = <a, dL/da> of every pair and head."""
    head, image = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < num_columns
    caption = _captions(index, image, c, first_column, num_columns, HAS_INDEX)
    query = _head_rows(q, caption, ok, head, DIM, HEAD, BLOCK_H)
    row = image.to(tl.int64) * num_columns + c
    d_a = _head_rows(d_pooled, row, ok, head, DIM, HEAD, BLOCK_H)
    a = _head_rows(pooled, row, ok, head, DIM, HEAD, BLOCK_H)
    own_delta = tl.sum(a.to(tl.float32) * d_a.to(tl.float32), axis=1)
    place = row * (DIM // HEAD) + head
    tl.store(delta + place, own_delta, mask=ok)
    own_lse = tl.load(lse + place, mask=ok, other=0.0)
    sums = tl.zeros((BLOCK_C, BLOCK_H), dtype=tl.float32)
    first_row = image.to(tl.int64) * length
    for first in range(0, length, BLOCK_L):
        token = first + tl.arange(0, BLOCK_L)
        inside = token < length
        key = _head_rows(k, first_row + token, inside, head, DIM, HEAD, BLOCK_H)
        value = _head_rows(v, first_row + token, inside, head, DIM, HEAD, BLOCK_H)
        logits = dot(query, tl.trans(key), tl.zeros((BLOCK_C, BLOCK_L), tl.float32), PRECISION)
        alive = _alive(mask, image, token, length, HAS_MASK)
        logits = tl.where(alive[None, :], logits * softmax_scale, float("-inf"))
        weights = tl.exp2(logits - own_lse[:, None])
        d_weights = dot(d_a, tl.trans(value), tl.zeros((BLOCK_C, BLOCK_L), tl.float32), PRECISION)
        d_logits = weights * (d_weights - own_delta[:, None])
        sums = dot(d_logits.to(key.dtype), key, sums, PRECISION)
    # d logits / d (q k) is the softmax scale itself, not in units of log 2.
    _store_head_rows(d_q, sums * (softmax_scale * _LN_2), row, ok, head, DIM, HEAD, BLOCK_H)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def key_value_gradient_kernel(
    q, k, v, mask, index, d_pooled, lse, delta, d_k, d_v,
    first_column, num_columns, length, num_images, columns_a_split, softmax_scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of a split's captions in dL/dk and dL/dv of a block of an image's tokens."""
    split, head, image = tl.program_id(0), tl.program_id(1) % (DIM // HEAD), tl.program_id(2)
    token = tl.program_id(1) // (DIM // HEAD) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = token < length
    row = image.to(tl.int64) * length + token
    key = _head_rows(k, row, inside, head, DIM, HEAD, BLOCK_H)
    value = _head_rows(v, row, inside, head, DIM, HEAD, BLOCK_H)
    alive = _alive(mask, image, token, length, HAS_MASK)
    k_sums = tl.zeros((BLOCK_L, BLOCK_H), dtype=tl.float32)
    v_sums = tl.zeros((BLOCK_L, BLOCK_H), dtype=tl.float32)
    past = tl.minimum((split + 1) * columns_a_split, num_columns)
    for first in range(split * columns_a_split, past, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        ok = c < past
        caption = _captions(index, image, c, first_column, num_columns, HAS_INDEX)
        query = _head_rows(q, caption, ok, head, DIM, HEAD, BLOCK_H)
        pair = image.to(tl.int64) * num_columns + c
        d_a = _head_rows(d_pooled, pair, ok, head, DIM, HEAD, BLOCK_H)
        place = pair * (DIM // HEAD) + head
        pair_lse = tl.load(lse + place, mask=ok, other=float("inf"))
        pair_delta = tl.load(delta + place, mask=ok, other=0.0)
        logits = dot(key, tl.trans(query), tl.zeros((BLOCK_L, BLOCK_C), tl.float32), PRECISION)
        logits = tl.where(alive[:, None], logits * softmax_scale, float("-inf"))
        weights = tl.exp2(logits - pair_lse[None, :])
        v_sums = dot(weights.to(d_a.dtype), d_a, v_sums, PRECISION)
        d_weights = dot(value, tl.trans(d_a), tl.zeros((BLOCK_L, BLOCK_C), tl.float32), PRECISION)
        d_logits = weights * (d_weights - pair_delta[None, :])
        k_sums = dot(d_logits.to(query.dtype), query, k_sums, PRECISION)
    part = (split.to(tl.int64) * num_images + image) * length + token
    _store_head_rows(d_k, k_sums * (softmax_scale * _LN_2), part, inside, head, DIM, HEAD, BLOCK_H)
    _store_head_rows(d_v, v_sums, part, inside, head, DIM, HEAD, BLOCK_H)


# ---------------------------------------------------------------------------------------------
# Projection and cosine
# ---------------------------------------------------------------------------------------------


@triton.jit
def _projected(
    pooled, weight, bias, pair, first, num_pairs,
    DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Channels `first` and on of o = W a + b; 0 past the last channel."""
    n = first + tl.arange(0, BLOCK_N)
    tile = product_tile(
        pooled, tl.minimum(pair, num_pairs - 1), weight, tl.minimum(n, DIM - 1),
        DIM, BLOCK_P, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    o = tile + tl.load(bias + n, mask=n < DIM, other=0.0)[None, :]
    return tl.where((n < DIM)[None, :], o, 0.0)


@triton.jit
def _texts(
    text, index, pair, first, first_column, num_columns, num_pairs,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """The same channels of each pair's unit text."""
    n = first + tl.arange(0, BLOCK_N)
    if HAS_INDEX:
        caption = tl.load(index + pair, mask=pair < num_pairs, other=0)
    else:
        caption = (first_column + pair % num_columns).to(tl.int64)
    inside = (pair < num_pairs)[:, None] & (n < DIM)[None, :]
    return tl.load(text + caption[:, None] * DIM + n[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def norm_kernel(
    pooled, weight, bias, norms, num_pairs,
    DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """|o| of a block of pairs; their o is made some channels at a time."""
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    square = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for first in range(0, DIM, BLOCK_N):
        o = _projected(
            pooled, weight, bias, pair, first, num_pairs,
            DIM, BLOCK_P, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        square += tl.sum(o * o, axis=1)
    tl.store(norms + pair, tl.sqrt(square), mask=pair < num_pairs)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def projection_gradient_kernel(
    pooled, weight, bias, text, index, along, across, d_o,
    first_column, num_columns, num_pairs,
    DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/do = along t - across o, a block of pairs times a block of channels."""
    blocks: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    pair = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(0) % blocks * BLOCK_N
    o = _projected(
        pooled, weight, bias, pair, first, num_pairs, DIM, BLOCK_P, BLOCK_N, BLOCK_D, PRECISION
    )
    t = _texts(
        text, index, pair, first, first_column, num_columns, num_pairs, DIM, BLOCK_N, HAS_INDEX
    )
    ok = pair < num_pairs
    to_text = tl.load(along + pair, mask=ok, other=0.0)[:, None]
    to_o = tl.load(across + pair, mask=ok, other=0.0)[:, None]
    n = first + tl.arange(0, BLOCK_N)
    place = pair.to(tl.int64)[:, None] * DIM + n[None, :]
    gradient = (to_text * t - to_o * o).to(d_o.dtype.element_ty)
    tl.store(d_o + place, gradient, mask=ok[:, None] & (n < DIM)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def sum_by_caption_kernel(
    rows, weights, order, starts, out,
    first_column, num_columns, num_images,
    DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """out[j] += the (weighted) sum of the rows of the pairs whose caption j is.

    Without an index they are one row an image; with one, `order` sorts the pairs by caption.
    """
    column = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.full((), 0, tl.int32), num_images
    if HAS_INDEX:
        start, end = tl.load(starts + column), tl.load(starts + column + 1)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        n = first + tl.arange(0, BLOCK_R)
        if HAS_INDEX:
            pair = tl.load(order + n, mask=n < end, other=0)
        else:
            pair = n.to(tl.int64) * num_columns + column
        inside = (n < end)[:, None] & (d < DIM)[None, :]
        row = tl.load(rows + pair[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        row = row.to(tl.float32)
        if HAS_WEIGHTS:
            row *= tl.load(weights + pair, mask=n < end, other=0.0)[:, None]
        total += tl.sum(row, axis=0)
    place = out + (first_column + column).to(tl.int64) * DIM + d
    tl.store(place, tl.load(place, mask=d < DIM, other=0.0) + total, mask=d < DIM)


# ---------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------

# Pairs x channels x channels summed over.
_NORM = {
    80: Config(128, 128, 64, 8, 3),
    86: Config(128, 128, 64, 8, 2),
    90: Config(128, 256, 64, 8, 3),
    100: Config(128, 128, 64, 8, 3),
}
# dL/do has the texts beside it.
_PROJECTION_GRADIENT = {**_NORM, 90: Config(128, 128, 64, 8, 3)}


# Captions, tokens and warps in 16 bits, for heads of 33 to 64 channels: of the kernels whose sums
# are the captions', and of the one whose two sums are the tokens'.
_ATTENTION = {80: (64, 64, 4), 86: (64, 64, 4), 90: (128, 64, 8), 100: (128, 64, 8)}
_KEY_VALUE = {80: (64, 32, 4), 86: (64, 32, 4), 90: (64, 64, 4), 100: (64, 64, 4)}


def _attention_tile(
    table: dict[int, tuple[int, int, int]],
    dtype: torch.dtype,
    precision: str,
    block_h: int,
    arch: int,
) -> Config:
    if INTERPRETED:
        return Config(16, 16, block_h, 4, 1)
    wide = block_h > 64
    if dtype == torch.float32:
        if wide and precision == "ieee":
            # Off the tensor cores a thread holds whole rows of its factors: it gets fewer of them.
            return Config(32, 32, block_h, 16, 1, maxnreg=128)
        return Config(32, 32, block_h, 8, 1, maxnreg=255)
    captions, tokens, warps = of_architecture(table, arch)
    if wide:
        captions, warps = 64, 8
    elif block_h <= 32:
        tokens = 64
    return Config(captions, tokens, block_h, warps, 2, maxnreg=255 if warps == 8 else None)


def _query_gradient_tile(dtype: torch.dtype, precision: str, block_h: int, arch: int) -> Config:
    tile = _attention_tile(_ATTENTION, dtype, precision, block_h, arch)
    if tile.num_warps == 16:
        # It takes two such products side by side, and half of the rows is still too much.
        return Config(16, 16, block_h, 8, 1, maxnreg=255)
    return tile


def _projection_tile(
    table: dict[int, Config], dtype: torch.dtype, precision: str, arch: int
) -> Config:
    if INTERPRETED:
        return Config(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return Config(64, 64, 32, 8, 2 if precision == "tf32" else 1, maxnreg=128)
    return of_architecture(table, arch)


# ---------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------


class _Pairs:
    """What is the same in every launch of one call."""

    def __init__(self, pool: Pool, text_index: Tensor | None):
        self.q, self.k, self.v = (x.contiguous() for x in (pool.q, pool.k, pool.v))
        self.num_images, self.length, self.dim = self.k.shape
        self.num_texts, self.num_heads = len(self.q), pool.num_heads
        self.head_dim = self.dim // pool.num_heads
        self.zero = pool.add_zero_attn
        self.text = pool.text.float().contiguous()
        self.weight = pool.out_weight.to(self.q.dtype).contiguous()
        self.bias = pool.out_bias.float().contiguous()
        # <o, t> = <W a + b, t> = <a, folded> + shift
        self.folded_text = (self.text @ self.weight.float()).contiguous()
        self.shift = self.text @ self.bias
        self.mask = self.empty = self.index = None
        if pool.image_mask is not None:
            self.mask = pool.image_mask.contiguous()
            self.empty = ~self.mask.any(dim=1)
        if text_index is not None:  # clamped: a bad one gives a bad score, no read out of bounds
            self.index = text_index.clamp(0, max(self.num_texts - 1, 0)).contiguous()
        self.columns = self.num_texts if self.index is None else self.index.shape[1]
        self.precision = float32_precision(self.q.dtype)
        arch = architecture(self.q.device)
        widths = self.q.dtype, self.precision, max(triton.next_power_of_2(self.head_dim), 16)
        self.attention = _attention_tile(_ATTENTION, *widths, arch)
        self.query_gradient = _query_gradient_tile(*widths, arch)
        self.key_value = _attention_tile(_KEY_VALUE, *widths, arch)
        self.norm, self.projection_gradient = (
            _projection_tile(table, self.q.dtype, self.precision, arch)
            for table in (_NORM, _PROJECTION_GRADIENT)
        )
        self.softmax_scale = self.head_dim**-0.5 * math.log2(math.e)

    def chunks(self) -> Iterator[_Chunk]:
        """All pairs, a few images times many captions at a time."""
        if 0 in (self.num_images, self.columns, self.length, self.num_texts):
            return  # no pair, or no token to pool: the scores are 0
        most = max(_CHUNK_ELEMENTS // self.dim, 1)
        # An index has one row an image, which is cheap to have whole.
        step = min(self.columns, most) if self.index is None else self.columns
        images = min(max(most // step, 1), _CHUNK_IMAGES)
        for i in range(0, self.num_images, images):
            for j in range(0, self.columns, step):
                yield _Chunk(
                    self,
                    slice(i, min(i + images, self.num_images)),
                    slice(j, min(j + step, self.columns)),
                )


class _Chunk:
    """Some images times some columns of the scores: their pairs, row by row."""

    def __init__(self, call: _Pairs, images: slice, columns: slice):
        self.call, self.images, self.columns = call, images, columns
        self.shape = (images.stop - images.start, columns.stop - columns.start)
        self.num_pairs = self.shape[0] * self.shape[1]
        self.index = None if call.index is None else call.index[images]
        self.mask = None if call.mask is None else call.mask[images]
        self.k, self.v = call.k[images], call.v[images]

    def rows(self) -> Tensor:
        """An empty (pairs, D)."""
        return self.call.q.new_empty(self.num_pairs, self.call.dim)

    def numbers(self, *more: int) -> Tensor:
        return self.call.text.new_empty(self.num_pairs, *more)

    def of(self, matrix: Tensor) -> Tensor:
        """This chunk's part of a matrix like the scores, one number a pair."""
        return matrix[self.images, self.columns].reshape(-1)

    def _attention(self, tile: Config) -> dict[str, object]:
        call = self.call
        return dict(
            k=self.k, v=self.v, q=call.q, mask=self.mask, index=self.index,
            first_column=self.columns.start, num_columns=self.shape[1], length=call.length,
            softmax_scale=call.softmax_scale,
            DIM=call.dim, HEAD=call.head_dim, BLOCK_H=tile.block_d, BLOCK_C=tile.block_m,
            BLOCK_L=tile.block_n, HAS_MASK=self.mask is not None,
            HAS_INDEX=self.index is not None, PRECISION=call.precision, **tile.launch,
        )  # fmt: skip

    def _projection(self, tile: Config) -> dict[str, object]:
        call = self.call
        return dict(
            weight=call.weight, bias=call.bias, num_pairs=self.num_pairs,
            DIM=call.dim, BLOCK_P=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
            PRECISION=call.precision, **tile.launch,
        )  # fmt: skip

    def _attention_grid(self, tile: Config) -> tuple[int, int, int]:
        blocks = triton.cdiv(self.shape[1], tile.block_m)
        return blocks, self.call.num_heads, self.shape[0]

    def attend(self) -> tuple[Tensor, Tensor]:
        """a (pairs, D), and the log-sum-exps (pairs, heads)."""
        pooled, lse = self.rows(), self.numbers(self.call.num_heads)
        attention_kernel[self._attention_grid(self.call.attention)](
            pooled=pooled, lse=lse, folded_text=None, along=None, ZERO=self.call.zero,
            SCORES=False, **self._attention(self.call.attention),
        )  # fmt: skip
        return pooled, lse

    def scores(self) -> tuple[Tensor, Tensor]:
        """The scores and |o|, (images, columns)."""
        call = self.call
        pooled, along, norms = self.rows(), self.numbers(call.num_heads), self.numbers()
        attention_kernel[self._attention_grid(self.call.attention)](
            pooled=pooled, lse=None, folded_text=call.folded_text, along=along, ZERO=call.zero,
            SCORES=True, **self._attention(call.attention),
        )  # fmt: skip
        norm_kernel[(triton.cdiv(self.num_pairs, call.norm.block_m),)](
            pooled, norms=norms, **self._projection(call.norm)
        )
        shift = call.shift[self.columns] if self.index is None else call.shift[self.index]
        norms = norms.view(self.shape)
        scores = (along.sum(dim=1).view(self.shape) + shift) * _inverse(norms)
        if call.empty is not None:
            scores.masked_fill_(call.empty[self.images, None], 0)
        return scores, norms

    def d_projected(self, pooled: Tensor, along: Tensor, across: Tensor) -> Tensor:
        """dL/do (pairs, D) = along t - across o."""
        d_o, tile = self.rows(), self.call.projection_gradient
        blocks = triton.cdiv(self.num_pairs, tile.block_m) * triton.cdiv(
            self.call.dim, tile.block_n
        )
        projection_gradient_kernel[(blocks,)](
            pooled, text=self.call.text, index=self.index, along=along, across=across, d_o=d_o,
            first_column=self.columns.start, num_columns=self.shape[1],
            HAS_INDEX=self.index is not None, **self._projection(tile),
        )  # fmt: skip
        return d_o

    def d_queries(
        self, pooled: Tensor, d_pooled: Tensor, lse: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dL/dq of each pair, written to out (pairs, D), and delta (pairs, heads)."""
        delta, tile = torch.empty_like(lse), self.call.query_gradient
        query_gradient_kernel[self._attention_grid(tile)](
            pooled=pooled, d_pooled=d_pooled, lse=lse, delta=delta, d_q=out,
            **self._attention(tile),
        )  # fmt: skip
        return out, delta

    def d_keys_and_values(
        self, d_pooled: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over this chunk's captions of dL/dk and dL/dv, (images, L, D) float32."""
        call, tile = self.call, self.call.key_value
        blocks = call.num_heads * triton.cdiv(call.length, tile.block_n)
        splits = max(_PROGRAMS // (blocks * self.shape[0]), 1)
        columns = triton.cdiv(triton.cdiv(self.shape[1], splits), tile.block_m) * tile.block_m
        splits = triton.cdiv(self.shape[1], columns)
        parts = call.text.new_empty(2, splits, *self.k.shape)
        key_value_gradient_kernel[(splits, blocks, self.shape[0])](
            d_pooled=d_pooled, lse=lse, delta=delta, d_k=parts[0], d_v=parts[1],
            num_images=self.shape[0], columns_a_split=columns, **self._attention(tile),
        )  # fmt: skip
        d_k, d_v = parts.sum(dim=1)
        return d_k, d_v

    def add_by_caption(self, rows: Tensor, weights: Tensor | None, out: Tensor) -> None:
        """out[j] (texts, D) += the sum of the rows of caption j's pairs, weighted."""
        order = starts = None
        captions, first = self.shape[1], self.columns.start
        if self.index is not None:
            by_caption, order = self.index.flatten().sort(stable=True)
            captions, first = self.call.num_texts, 0
            every = torch.arange(captions + 1, device=rows.device)
            starts = torch.searchsorted(by_caption, every).int()
        sum_by_caption_kernel[(captions, triton.cdiv(self.call.dim, 128))](
            rows, weights, order, starts, out, first, self.shape[1], self.shape[0],
            DIM=self.call.dim, BLOCK_R=8, BLOCK_D=128, HAS_INDEX=order is not None,
            HAS_WEIGHTS=weights is not None, num_warps=4,
        )  # fmt: skip


def _inverse(norm: Tensor) -> Tensor:
    """Of x / max(|x|, 1e-12), which is 0 at 0."""
    return torch.where(norm > 0, norm.clamp_min(1e-12).reciprocal(), 0.0)


def forward(pool: Pool, text_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos(o_ij, t_j) and |o_ij|: (I, J), or (I, P) for the captions text_index names."""
    call = _Pairs(pool, text_index)
    scores, norms = (call.text.new_zeros(call.num_images, call.columns) for _ in range(2))
    for chunk in call.chunks():
        place = chunk.images, chunk.columns
        scores[place], norms[place] = chunk.scores()
    return scores, norms


def backward(
    pool: Pool,
    text_index: Tensor | None,
    grad: Tensor,
    scores: Tensor,
    norms: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of `Need`; those not needed have no elements."""
    call = _Pairs(pool, text_index)
    grad = grad.float()
    if call.empty is not None:
        grad = grad.masked_fill(call.empty[:, None], 0)
    # Float16 has no room for the gradients of a large batch; relative to the largest it has.
    # An infinite one makes all of them NaN: a gradient scaler asks for one and skips the step.
    peak = grad.abs().amax() if grad.numel() else grad.new_zeros(())
    peak = torch.where(peak > 0, peak, 1.0)
    grad = grad / peak

    def zeros_if(wanted: bool, *shape: int) -> Tensor:
        return call.text.new_zeros(shape if wanted else 0)

    texts_shape = (call.num_texts, call.dim)
    d_q, d_text = zeros_if(need.q, *texts_shape), zeros_if(need.text, *texts_shape)
    d_k, d_v = zeros_if(need.k, *call.k.shape), zeros_if(need.v, *call.v.shape)
    d_weight, d_bias = (
        zeros_if(need.out_weight, call.dim, call.dim),
        zeros_if(need.out_bias, call.dim),
    )
    need_attention = need.q or need.k or need.v
    weight_of_text = zeros_if(need.text, call.num_texts)

    for chunk in call.chunks():
        pooled, lse = chunk.attend()
        norm = chunk.of(norms)
        inverse = _inverse(norm)
        along = chunk.of(grad) * inverse
        if need.text:
            chunk.add_by_caption(pooled, along, d_text)
            captions = chunk.columns if chunk.index is None else chunk.index
            add_rows(weight_of_text, captions, along.view(chunk.shape))
        if not (need_attention or need.out_weight or need.out_bias):
            continue
        # d<o, t>/|o|: t / |o| - score * o / |o|^2, the latter not where |o| is held at 1e-12.
        across = along * chunk.of(scores) * inverse * (norm >= 1e-12)
        d_o = chunk.d_projected(pooled, along, across)
        if need.out_bias:
            d_bias += d_o.sum(dim=0, dtype=torch.float32)
        if need.out_weight:
            sum_of_products(d_weight, d_o.T, pooled)
        if not need_attention:
            continue
        d_pooled = d_o @ call.weight
        # dL/do is not needed any more: its room takes dL/dq.
        rows, delta = chunk.d_queries(pooled, d_pooled, lse, out=d_o)
        if need.q:
            chunk.add_by_caption(rows, None, d_q)
        if need.k or need.v:
            keys, values = chunk.d_keys_and_values(d_pooled, lse, delta)
            if need.k:
                d_k[chunk.images] += keys
            if need.v:
                d_v[chunk.images] += values

    if need.text:
        # o = W a + b is linear in a, so the sum over pairs was taken before the product.
        weight = pool.out_weight.float()
        d_text = d_text @ weight.T + weight_of_text[:, None] * call.bias
    return (
        d_q.mul_(peak).to(pool.q.dtype),
        d_k.mul_(peak).to(pool.k.dtype),
        d_v.mul_(peak).to(pool.v.dtype),
        d_text.mul_(peak).to(pool.text.dtype),
        d_weight.mul_(peak).to(pool.out_weight.dtype),
        d_bias.mul_(peak).to(pool.out_bias.dtype),
    )


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------

_TOKENS = ("q", "k", "v", "pooled", "d_pooled", "d_q", "d_o", "weight", "rows")
_TYPES = {
    "mask": "*i1", "index": "*i64", "order": "*i64", "starts": "*i32", "softmax_scale": "fp32",
}  # fmt: skip


# Arguments that are None, and the flag with the value that says so.
_ABSENT = {
    "mask": ("HAS_MASK", False), "index": ("HAS_INDEX", False), "order": ("HAS_INDEX", False),
    "starts": ("HAS_INDEX", False), "weights": ("HAS_WEIGHTS", False),
    "folded_text": ("SCORES", False), "along": ("SCORES", False), "lse": ("SCORES", True),
}  # fmt: skip


def _case(kernel, dtype, config: Config, dim: int, label: str, has_product=True, **flags):
    absent = [
        name
        for name, (flag, value) in _ABSENT.items()
        if name in kernel.arg_names and flags.get(flag) is value
    ]

    def kind(name: str) -> str | None:
        if name in absent:
            return "constexpr"
        if name in _TOKENS:
            return "tokens"
        return _TYPES.get(name) or (None if name in _UNSPECIALIZED else "*fp32")

    constexprs: dict[str, object] = {**flags, **dict.fromkeys(absent), "DIM": dim}
    return tile_case(kernel, label, dtype, config, constexprs, kind, has_product)


def _attention_cases(
    dtype: torch.dtype, dim: int, head: int, masked: bool, arch: int
) -> Iterator[CompileCase]:
    block_h = triton.next_power_of_2(head)
    captions, tokens = (
        _attention_tile(table, dtype, "ieee", block_h, arch) for table in (_ATTENTION, _KEY_VALUE)
    )
    queries = _query_gradient_tile(dtype, "ieee", block_h, arch)
    label = f"D={dim} {dim // head} heads{' masked by index' * masked}"
    for kernel, config, more, name in (
        (attention_kernel, captions, dict(ZERO=True, SCORES=True), f"{label} scores"),
        (attention_kernel, captions, dict(ZERO=True, SCORES=False), label),
        (query_gradient_kernel, queries, {}, label),
        (key_value_gradient_kernel, tokens, {}, label),
    ):
        shape = dict(
            HEAD=head, BLOCK_H=block_h, BLOCK_C=config.block_m, BLOCK_L=config.block_n,
            HAS_MASK=masked, HAS_INDEX=masked, PRECISION="ieee", **more,
        )  # fmt: skip
        yield _case(kernel, dtype, config, dim, name, **shape)


def _projection_cases(
    dtype: torch.dtype, dim: int, has_index: bool, arch: int
) -> Iterator[CompileCase]:
    label = f"D={dim}{' by index' * has_index}"
    for kernel, table, flags in (
        (norm_kernel, _NORM, {}),
        (projection_gradient_kernel, _PROJECTION_GRADIENT, dict(HAS_INDEX=has_index)),
    ):
        config = _projection_tile(table, dtype, "ieee", arch)
        shape = dict(
            BLOCK_P=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            PRECISION="ieee", **flags,
        )  # fmt: skip
        yield _case(kernel, dtype, config, dim, label, **shape)


def compile_cases(arch: int) -> list[CompileCase]:
    """Heads of 32 to 128 channels, and of widths that no block has; float32."""
    half, single = torch.bfloat16, torch.float32
    cases = []
    # With a mask and an index or without: each has been the one that spills.
    for dtype, dim, head, masked in (
        (half, 512, 32, True),
        (half, 768, 48, True),
        (half, 512, 64, False),
        (half, 1024, 128, False),
        (half, 1024, 128, True),
        (single, 512, 64, False),
        (single, 768, 96, False),
    ):
        cases += _attention_cases(dtype, dim, head, masked, arch)
    for dtype, dim, has_index in (
        (half, 512, False), (half, 768, True), (half, 1024, False), (single, 512, False)
    ):  # fmt: skip
        cases += _projection_cases(dtype, dim, has_index, arch)
    rows = Config(8, 128, 0, 4, 3)
    for has_index in (False, True):
        flags = dict(BLOCK_R=8, BLOCK_D=128, HAS_INDEX=has_index, HAS_WEIGHTS=not has_index)
        label = "by index" if has_index else "by image"
        case = _case(sum_by_caption_kernel, torch.bfloat16, rows, 512, label, False, **flags)
        cases.append(case)
    return cases

"""Contrastive losses of plain features in Triton: a matrix product that ends in a loss.

A program multiplies one tile of similarities, as any matrix product does, and finishes with it
while it is in registers. The forward leaves one number a row and one a column of the tile behind,
the log-sum-exps; the gradient pass multiplies the tile again and leaves dL/dlogit in the features'
own dtype, a chunk of rows at a time, from which two products of cuBLAS make the gradients. A
sigmoid term knows its gradient at once: there one pass does both.

    softmax_sums_kernel    tile -> partial log-sum-exps, targets, sum of what smoothing takes
    merge_lse_kernel          partial log-sum-exps -> log-sum-exps
    softmax_gradient_kernel   tile -> dL/dlogit, and its sum times the similarity
    sigmoid_kernel            tile -> sum of softplus(-y z), dL/dlogit and its two sums

Logits are kept in units of log 2 (z log2 e), because the device's exponential is exp2; so are the
log-sum-exps that leave the forward. Sums over tiles go through one partial sum each, which PyTorch
adds up in a fixed order: no atomics, the same bits every run.

A fully fused backward has nowhere to put its sums: a tile's share of dL/dimages is 128 x D floats,
more than the registers of a whole multiprocessor hold beside the tile itself at D = 512, and adding
it to memory moves more bytes a second than L2 delivers (docs/kernels/contrastive.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .features import Features, slices, smoothing_shares
from .products import sum_of_products, wide_product
from .sigmoid_triton import sigmoid_loss_terms
from .tiles_triton import (
    Config,
    architecture,
    float32_precision,
    for_compiler,
    of_architecture,
    product_tile,
    tile_case,
)
from .tuning import choose_config, size_class

_LOG2_E = tl.constexpr(math.log2(math.e))

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "first_row", "num_rows", "num_columns", "target_offset", "captions_per_image", "sixteens",
    "parts", "length",
]  # fmt: skip

# Tiles of this many neighbouring rows are worked on before the next columns are: they share those
# columns' features in L2.
_GROUP = tl.constexpr(8)

# A row's sum of exponentials, relative to the tile's largest, above which no term that counts has
# underflowed: 2^-126 is the smallest number, 2^-24 the last bit, and a tile has 2^8 columns.
_SAFE_SUM = tl.constexpr(2.0**-80)


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


@triton.jit
def _place(first_row, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile: how many lie above it, its rows, and its first column."""
    row_tiles = tl.cdiv(num_rows - first_row, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    program = tl.program_id(0)
    group = program // (_GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * _GROUP, _GROUP)
    within = program - group * _GROUP * column_tiles
    row_tile = group * _GROUP + within % group_rows
    column_tile = within // group_rows
    r = first_row + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return row_tile, r, column_tile * BLOCK_N


@triton.jit
def _similarities(
    images, texts, r, first_column, first_row, num_rows, num_columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the tile; rows and columns past the end repeat the last.

    `images` holds rows first_row to num_rows only, `texts` all columns.
    """
    r = tl.minimum(r, num_rows - 1) - first_row
    c = tl.minimum(first_column + tl.arange(0, BLOCK_N), num_columns - 1)
    return product_tile(images, r, texts, c, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns. A thread holds some of both."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four pieces of a tile, from left to right.

    What follows the product is done a piece at a time: a whole tile's logits, exponentials and
    gradients at once are more than a thread's registers hold. Each piece but the first stands
    behind the question whether there is such a column at all, which also keeps the compiler from
    working on several at once.
    """
    left, right = _halves(tile, BLOCK_M, BLOCK_N)
    first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
    return first, second, third, fourth


@triton.jit
def _takes_part(
    pair_mask, r, c, positive, num_rows, num_columns, HAS_MASK: tl.constexpr
):  # fmt: skip
    """Which pairs of the piece the loss is made of. A positive can not be masked."""
    inside = (r < num_rows)[:, None] & (c < num_columns)[None, :]
    if HAS_MASK:
        row = pair_mask + r.to(tl.int64) * num_columns
        given = tl.load(row[:, None] + c.to(tl.int64)[None, :], mask=inside, other=0)
        inside = inside & ((given != 0) | positive)
    return inside


# ---------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------


@triton.jit
def _log2_sum_exp2(z, AXIS: tl.constexpr):
    """Along one axis; -inf if every element is."""
    top = tl.max(z, axis=AXIS)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return safe + tl.log2(tl.sum(tl.exp2(z - tl.expand_dims(safe, AXIS)), axis=AXIS))


@triton.jit
def _sums_of_piece(
    similarity, scale, pair_mask, row_shares, column_shares,
    row_parts, column_parts, targets, row_tile, r, first_column,
    first_row, num_rows, num_columns, target_offset,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr, COLUMNS: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """Store the log-sum-exps of a piece's rows and columns; return what smoothing takes of it."""
    z = similarity * scale
    c = first_column + tl.arange(0, WIDTH)
    row_ok, column_ok = r < num_rows, c < num_columns
    positive = r[:, None] + target_offset == c[None, :]
    takes_part = _takes_part(pair_mask, r, c, positive, num_rows, num_columns, HAS_MASK)
    first_target = first_row + row_tile * BLOCK_M + target_offset
    if (first_target < first_column + WIDTH) & (first_column < first_target + BLOCK_M):
        target = tl.sum(tl.where(positive, z, 0.0), axis=1)
        mine = (r + target_offset >= first_column) & (r + target_offset < first_column + WIDTH)
        tl.store(targets + r, target, mask=row_ok & mine)
    smoothed = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if SMOOTHING:
        share = tl.load(row_shares + r, mask=row_ok, other=0.0)[:, None]
        if COLUMNS:
            share += tl.load(column_shares + c, mask=column_ok, other=0.0)[None, :]
        smoothed = tl.sum(tl.where(takes_part, z * share, 0.0), axis=1)
    z = tl.where(takes_part, z, float("-inf"))

    # One exponential an element serves its row and its column, taken relative to the largest of the
    # whole piece. Where a row lies so far below it that its terms underflow, each takes its own.
    top = tl.max(z)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(z - top)
    row_sum = tl.sum(weights, axis=1)
    row_lse = top + tl.log2(row_sum)
    if tl.min(tl.where(row_ok, row_sum, 1.0)) < _SAFE_SUM:
        row_lse = _log2_sum_exp2(z, 1)
    row_place = (first_column // WIDTH).to(tl.int64) * (num_rows - first_row) + (r - first_row)
    tl.store(row_parts + row_place, row_lse, mask=row_ok)
    if COLUMNS:
        column_sum = tl.sum(weights, axis=0)
        column_lse = top + tl.log2(column_sum)
        if tl.min(tl.where(column_ok, column_sum, 1.0)) < _SAFE_SUM:
            column_lse = _log2_sum_exp2(z, 0)
        tl.store(column_parts + row_tile.to(tl.int64) * num_columns + c, column_lse, mask=column_ok)
    return smoothed


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def softmax_sums_kernel(
    images, texts, pair_mask, scale_ptr, row_shares, column_shares,
    row_parts, column_parts, targets, smoothed_parts,
    first_row, num_rows, num_columns, target_offset,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr, COLUMNS: tl.constexpr, SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rows first_row to num_rows: log-sum-exps of every piece's rows and tile's columns."""
    row_tile, r, first_column = _place(first_row, num_rows, num_columns, BLOCK_M, BLOCK_N)
    tile = _similarities(
        images, texts, r, first_column, first_row, num_rows, num_columns,
        D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr) * _LOG2_E
    WIDTH: tl.constexpr = BLOCK_N // 4
    first, second, third, fourth = _quarters(tile, BLOCK_M, BLOCK_N)
    smoothed = _sums_of_piece(
        first, scale, pair_mask, row_shares, column_shares,
        row_parts, column_parts, targets, row_tile, r, first_column,
        first_row, num_rows, num_columns, target_offset,
        BLOCK_M, WIDTH, HAS_MASK, COLUMNS, SMOOTHING,
    )  # fmt: skip
    if first_column + WIDTH < num_columns:
        smoothed += _sums_of_piece(
            second, scale, pair_mask, row_shares, column_shares,
            row_parts, column_parts, targets, row_tile, r, first_column + WIDTH,
            first_row, num_rows, num_columns, target_offset,
            BLOCK_M, WIDTH, HAS_MASK, COLUMNS, SMOOTHING,
        )  # fmt: skip
    if first_column + 2 * WIDTH < num_columns:
        smoothed += _sums_of_piece(
            third, scale, pair_mask, row_shares, column_shares,
            row_parts, column_parts, targets, row_tile, r, first_column + 2 * WIDTH,
            first_row, num_rows, num_columns, target_offset,
            BLOCK_M, WIDTH, HAS_MASK, COLUMNS, SMOOTHING,
        )  # fmt: skip
    if first_column + 3 * WIDTH < num_columns:
        smoothed += _sums_of_piece(
            fourth, scale, pair_mask, row_shares, column_shares,
            row_parts, column_parts, targets, row_tile, r, first_column + 3 * WIDTH,
            first_row, num_rows, num_columns, target_offset,
            BLOCK_M, WIDTH, HAS_MASK, COLUMNS, SMOOTHING,
        )  # fmt: skip
    if SMOOTHING:
        tl.store(smoothed_parts + tl.program_id(0), tl.sum(smoothed))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def merge_lse_kernel(
    partial, lse, parts, length,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, CONTINUE: tl.constexpr,
):  # fmt: skip
    """lse[j] = log-sum-exp over i of partial[i, j], and of lse[j] as it was if CONTINUE."""
    j = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = j < length
    top = tl.full((BLOCK_L,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_L,), dtype=tl.float32)
    if CONTINUE:
        top = tl.load(lse + j, mask=inside, other=0.0)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for first in range(0, parts, BLOCK_P):
        i = first + tl.arange(0, BLOCK_P)
        place = i.to(tl.int64)[:, None] * length + j[None, :]
        part = tl.load(
            partial + place, mask=(i < parts)[:, None] & inside[None, :], other=float("-inf")
        )
        # A NaN makes the sum NaN; -inf - -inf must not.
        new_top = tl.maximum(top, tl.max(part, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(part - safe[None, :]), axis=0)
        top = new_top
    tl.store(lse + j, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=inside)


@triton.jit
def _store_gradient(dlogits, d_z, r, c, first_row, num_rows, sixteens, magnification):
    """A piece of dL/dlogit, magnified and rounded, into rows of 16 * sixteens columns."""
    # Rows are that long, not num_columns, and are written whole, so that the compiler knows a
    # thread's store of several neighbours to be aligned and all inside.
    columns = sixteens * 16
    inside = (r < num_rows)[:, None] & (c < columns)[None, :]
    place = (r - first_row).to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(dlogits + place, (d_z * magnification).to(dlogits.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_piece(
    similarity, scale, pair_mask, row_shares, column_shares, row_lse, column_lse,
    dlogits, magnification, target_weight, r, first_column,
    first_row, num_rows, num_columns, target_offset, sixteens,
    WIDTH: tl.constexpr, HAS_MASK: tl.constexpr, COLUMNS: tl.constexpr, SMOOTHING: tl.constexpr,
    STORE: tl.constexpr, SUM_SCALE: tl.constexpr,
):  # fmt: skip
    """Store row softmax + column softmax - the targets' weight; return its sums with S by rows."""
    c = first_column + tl.arange(0, WIDTH)
    row_ok, column_ok = r < num_rows, c < num_columns
    positive = r[:, None] + target_offset == c[None, :]
    d_z = tl.exp2(similarity * scale - tl.load(row_lse + r, mask=row_ok, other=0.0)[:, None])
    if COLUMNS:
        lse = tl.load(column_lse + c, mask=column_ok, other=0.0)
        d_z += tl.exp2(similarity * scale - lse[None, :])
    if SMOOTHING:
        d_z -= tl.load(row_shares + r, mask=row_ok, other=0.0)[:, None]
        if COLUMNS:
            d_z -= tl.load(column_shares + c, mask=column_ok, other=0.0)[None, :]
    d_z -= tl.where(positive, target_weight, 0.0)
    takes_part = _takes_part(pair_mask, r, c, positive, num_rows, num_columns, HAS_MASK)
    d_z = tl.where(takes_part, d_z, 0.0)
    if STORE:
        _store_gradient(dlogits, d_z, r, c, first_row, num_rows, sixteens, magnification)
    return tl.sum(d_z * similarity, axis=1)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def softmax_gradient_kernel(
    images, texts, pair_mask, scale_ptr, row_shares, column_shares, row_lse, column_lse,
    dlogits, scale_parts, magnification, target_weight,
    first_row, num_rows, num_columns, target_offset, sixteens,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr, COLUMNS: tl.constexpr, SMOOTHING: tl.constexpr,
    STORE: tl.constexpr, SUM_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/dlogit of rows first_row to num_rows, and its sum with the similarities."""
    _, r, first_column = _place(first_row, num_rows, num_columns, BLOCK_M, BLOCK_N)
    tile = _similarities(
        images, texts, r, first_column, first_row, num_rows, num_columns,
        D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr) * _LOG2_E
    WIDTH: tl.constexpr = BLOCK_N // 4
    first, second, third, fourth = _quarters(tile, BLOCK_M, BLOCK_N)
    total = _gradient_of_piece(
        first, scale, pair_mask, row_shares, column_shares, row_lse, column_lse,
        dlogits, magnification, target_weight, r, first_column,
        first_row, num_rows, num_columns, target_offset, sixteens,
        WIDTH, HAS_MASK, COLUMNS, SMOOTHING, STORE, SUM_SCALE,
    )  # fmt: skip
    if first_column + WIDTH < num_columns:
        total += _gradient_of_piece(
            second, scale, pair_mask, row_shares, column_shares, row_lse, column_lse,
            dlogits, magnification, target_weight, r, first_column + WIDTH,
            first_row, num_rows, num_columns, target_offset, sixteens,
            WIDTH, HAS_MASK, COLUMNS, SMOOTHING, STORE, SUM_SCALE,
        )  # fmt: skip
    if first_column + 2 * WIDTH < num_columns:
        total += _gradient_of_piece(
            third, scale, pair_mask, row_shares, column_shares, row_lse, column_lse,
            dlogits, magnification, target_weight, r, first_column + 2 * WIDTH,
            first_row, num_rows, num_columns, target_offset, sixteens,
            WIDTH, HAS_MASK, COLUMNS, SMOOTHING, STORE, SUM_SCALE,
        )  # fmt: skip
    if first_column + 3 * WIDTH < num_columns:
        total += _gradient_of_piece(
            fourth, scale, pair_mask, row_shares, column_shares, row_lse, column_lse,
            dlogits, magnification, target_weight, r, first_column + 3 * WIDTH,
            first_row, num_rows, num_columns, target_offset, sixteens,
            WIDTH, HAS_MASK, COLUMNS, SMOOTHING, STORE, SUM_SCALE,
        )  # fmt: skip
    if SUM_SCALE:
        tl.store(scale_parts + tl.program_id(0), tl.sum(total))


# ---------------------------------------------------------------------------------------------
# Sigmoid
# ---------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid_of_piece(
    similarity, scale, bias, pair_mask, dlogits, magnification, r, first_column,
    first_row, num_rows, num_columns, captions_per_image, sixteens,
    WIDTH: tl.constexpr, HAS_MASK: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Store dL/dlogit; return the sums, by rows, of the loss, dL/dlogit * S and dL/dlogit."""
    c = first_column + tl.arange(0, WIDTH)
    z = similarity * scale + bias
    own = tl.minimum(r.to(tl.int64) * captions_per_image, num_columns).to(tl.int32)
    positive = (c[None, :] >= own[:, None]) & (c[None, :] < own[:, None] + captions_per_image)
    takes_part = _takes_part(pair_mask, r, c, positive, num_rows, num_columns, HAS_MASK)
    loss, miss = sigmoid_loss_terms(tl.where(positive, z, -z))
    d_z = tl.where(takes_part, tl.where(positive, -miss, miss), 0.0)
    if STORE:
        _store_gradient(dlogits, d_z, r, c, first_row, num_rows, sixteens, magnification)
    loss = tl.sum(tl.where(takes_part, loss, 0.0), axis=1)
    return loss, tl.sum(d_z * similarity, axis=1), tl.sum(d_z, axis=1)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def sigmoid_kernel(
    images, texts, pair_mask, scale_ptr, bias_ptr,
    loss_parts, dlogits, scale_parts, bias_parts, magnification,
    first_row, num_rows, num_columns, captions_per_image, sixteens,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr, STORE: tl.constexpr, SUM_SCALE: tl.constexpr, SUM_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rows first_row to num_rows: the tile's sum of softplus(-y z), and dL/dlogit."""
    _, r, first_column = _place(first_row, num_rows, num_columns, BLOCK_M, BLOCK_N)
    tile = _similarities(
        images, texts, r, first_column, first_row, num_rows, num_columns,
        D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)
    WIDTH: tl.constexpr = BLOCK_N // 4
    first, second, third, fourth = _quarters(tile, BLOCK_M, BLOCK_N)
    loss, by_scale, by_bias = _sigmoid_of_piece(
        first, scale, bias, pair_mask, dlogits, magnification, r, first_column,
        first_row, num_rows, num_columns, captions_per_image, sixteens, WIDTH, HAS_MASK, STORE,
    )  # fmt: skip
    if first_column + WIDTH < num_columns:
        more_loss, more_by_scale, more_by_bias = _sigmoid_of_piece(
            second, scale, bias, pair_mask, dlogits, magnification, r, first_column + WIDTH,
            first_row, num_rows, num_columns, captions_per_image, sixteens, WIDTH, HAS_MASK, STORE,
        )  # fmt: skip
        loss += more_loss
        by_scale += more_by_scale
        by_bias += more_by_bias
    if first_column + 2 * WIDTH < num_columns:
        more_loss, more_by_scale, more_by_bias = _sigmoid_of_piece(
            third, scale, bias, pair_mask, dlogits, magnification, r, first_column + 2 * WIDTH,
            first_row, num_rows, num_columns, captions_per_image, sixteens, WIDTH, HAS_MASK, STORE,
        )  # fmt: skip
        loss += more_loss
        by_scale += more_by_scale
        by_bias += more_by_bias
    if first_column + 3 * WIDTH < num_columns:
        more_loss, more_by_scale, more_by_bias = _sigmoid_of_piece(
            fourth, scale, bias, pair_mask, dlogits, magnification, r, first_column + 3 * WIDTH,
            first_row, num_rows, num_columns, captions_per_image, sixteens, WIDTH, HAS_MASK, STORE,
        )  # fmt: skip
        loss += more_loss
        by_scale += more_by_scale
        by_bias += more_by_bias
    tl.store(loss_parts + tl.program_id(0), tl.sum(loss))
    if SUM_SCALE:
        tl.store(scale_parts + tl.program_id(0), tl.sum(by_scale))
    if SUM_BIAS:
        tl.store(bias_parts + tl.program_id(0), tl.sum(by_bias))


# ---------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------

_TINY = Config(16, 64, 16, 4, 1)


def _tile(block_m: int, block_n: int, block_d: int, num_warps: int, num_stages: int) -> Config:
    return Config(block_m, block_n, block_d, num_warps, num_stages, maxnreg=255)


# By compute capability times ten, the default first; the others are for FASTGOAL_AUTOTUNE. What
# each was chosen for is in docs/kernels/contrastive.md.
_TABLES = {
    80: [_tile(128, 128, 64, 8, 3)],
    86: [_tile(128, 128, 64, 8, 2)],
    90: [_tile(128, 256, 64, 8, 3), _tile(128, 256, 64, 8, 4), _tile(64, 256, 64, 4, 3)],
    100: [_tile(128, 256, 64, 8, 3), _tile(128, 128, 64, 8, 3)],
}
_TABLES = {arch: for_compiler(tiles) for arch, tiles in _TABLES.items()}
# A mask, and label smoothing, are more for a thread to hold beside its part of the tile.
_NARROW = {stages: _tile(128, 128, 64, 8, stages) for stages in (2, 3)}
_NARROW_SUMS = {stages: _tile(128, 64, 64, 8, stages) for stages in (2, 3)}


def tiles(kernel: str, dtype: torch.dtype, precision: str, plain: bool, arch: int) -> list[Config]:
    """The tiles that suit, the default first. plain: neither mask nor label smoothing."""
    if INTERPRETED:
        return [_TINY]
    if dtype == torch.float32:
        # IEEE products run on the ordinary cores, where loads in flight would cost the registers.
        return [_tile(64, 64, 32, 8, 2 if precision == "tf32" else 1)]
    if plain:
        return of_architecture(_TABLES, arch)
    stages = of_architecture(_TABLES, arch)[0].num_stages
    return [(_NARROW_SUMS if kernel == "softmax_sums" else _NARROW)[stages]]


# ---------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------

# Rows of a forward launch. Its partial log-sum-exps, of each piece's rows and each tile's columns,
# take 800 bytes for each text.
_FORWARD_ROWS = 8192

# dL/dlogit waits for its two products in a buffer of so many bytes for each element of the texts.
# Beside the texts' float32 sums and normalised copy that stays below 16 bytes an element, and it is
# tall enough for adding to those sums to cost little beside the products.
_GRADIENT_BYTES = 4
# Where the images' float32 gradients are kept as well.
_SIGMOID_GRADIENT_BYTES = 2


def _magnification(dtype: torch.dtype) -> float:
    """What dL/dlogit, 2 at most, is multiplied by before it is rounded to `dtype`.

    Of a large batch most of it lies far below float16's smallest normal number, 6e-5.
    """
    return 2.0**14 if dtype == torch.float16 else 1.0


class _Logits:
    """What is the same in every launch over the logits of one call."""

    def __init__(
        self, kernel: str, images: Features, texts: Features, pair_mask: Tensor | None,
        label_smoothing: float = 0.0,
    ):  # fmt: skip
        self.kernel, self.images, self.text = kernel, images, texts.all()
        self.plain = pair_mask is None and not label_smoothing
        self.pair_mask = None if pair_mask is None else pair_mask.contiguous()
        self.precision = float32_precision(self.text.dtype)

    def config(self, rows: int, launch: Callable[[Config, slice, Tensor], object]) -> Config:
        """The tile for `launch(config, rows, their images)` of about so many rows."""
        text, first = self.text, slice(0, rows)
        kind = (
            text.dtype, self.precision, text.shape[1], self.plain,
            size_class(rows), size_class(len(text)),
        )  # fmt: skip
        arch = architecture(text.device)
        table = tiles(self.kernel, text.dtype, self.precision, self.plain, arch)
        image = self.images.part(first)
        return choose_config(
            self.kernel, kind, table, lambda config: launch(config, first, image), text.device
        )

    def grid(self, config: Config, rows: int) -> tuple[int, int]:
        """How many tiles so many rows are high, and how many the texts are wide."""
        return triton.cdiv(rows, config.block_m), triton.cdiv(len(self.text), config.block_n)

    def constexprs(self, config: Config) -> dict[str, object]:
        return dict(
            D=self.text.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=config.block_d, HAS_MASK=self.pair_mask is not None, PRECISION=self.precision,
            **config.launch,
        )  # fmt: skip


def _merge(parts: Tensor, lse: Tensor, goes_on: bool) -> None:
    length = len(lse)
    merge_lse_kernel[(triton.cdiv(length, 128),)](
        parts, lse, len(parts), length, BLOCK_P=16, BLOCK_L=128, CONTINUE=goes_on, num_warps=4
    )


def softmax_forward(
    images: Features,
    texts: Features,
    scale: Tensor,
    pair_mask: Tensor | None,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row log-sum-exps, column log-sum-exps); the latter in units of log 2."""
    logits = _Logits("softmax_sums", images, texts, pair_mask, label_smoothing)
    num_rows, num_columns = len(images), len(texts)
    new = scale.new_empty
    row_lse, column_lse, targets = (
        new(num_rows),
        new(num_columns if both_ways else 0),
        new(num_rows),
    )
    row_shares, column_shares = smoothing_shares(
        label_smoothing, pair_mask, num_rows, num_columns, target_offset, scale
    )
    smoothed = scale.new_zeros(())

    def launch(
        config: Config, rows: slice, image: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        high, wide = logits.grid(config, len(image))
        row_parts = new(triton.cdiv(num_columns, config.block_n // 4), len(image))
        column_parts = new(high, num_columns) if both_ways else None
        smoothed_parts = new(high * wide) if label_smoothing else None
        softmax_sums_kernel[(high * wide,)](
            image, logits.text, logits.pair_mask, scale, row_shares, column_shares,
            row_parts, column_parts, targets, smoothed_parts,
            rows.start, rows.stop, num_columns, target_offset,
            COLUMNS=both_ways, SMOOTHING=label_smoothing > 0, **logits.constexprs(config),
        )  # fmt: skip
        return row_parts, column_parts, smoothed_parts

    if num_rows:
        config = logits.config(min(_FORWARD_ROWS, num_rows), launch)
        for rows in slices(num_rows, _FORWARD_ROWS):
            row_parts, column_parts, smoothed_parts = launch(config, rows, images.part(rows))
            _merge(row_parts, row_lse[rows], False)
            if column_parts is not None:
                _merge(column_parts, column_lse, rows.start > 0)
            if smoothed_parts is not None:
                smoothed += smoothed_parts.sum()
    loss = row_lse - (1 - label_smoothing) * targets
    if both_ways:
        loss = (loss + (column_lse - (1 - label_smoothing) * targets)) / 2
        smoothed /= 2
    loss = (loss.mean() - smoothed / max(num_rows, 1)) * math.log(2)
    return loss, row_lse, column_lse


class _Gradients:
    """The features' gradients, from dL/dlogit of some rows at a time."""

    def __init__(
        self, logits: _Logits, texts: Features, bytes_each: int, dtype: torch.dtype | None,
        need_image: bool, need_text: bool,
    ):  # fmt: skip
        """dtype: of the gradients; None = each side's own."""
        self.logits, self.texts, self.need_text, self.dtype = logits, texts, need_text, dtype
        self.image = logits.images.new_gradient(dtype) if need_image else None
        self.text_sums: Tensor | None = None
        self.magnification = _magnification(logits.text.dtype)
        self.rows = len(logits.images)
        self.dlogits: Tensor | None = None
        if need_image or need_text:
            text = logits.text
            columns = 16 * triton.cdiv(len(text), 16)
            fitting = bytes_each * text.numel() // max(columns * text.element_size(), 1)
            # Whole tiles, whatever their size.
            self.rows = min(max(fitting // 128 * 128, 128), self.rows)
            self.dlogits = text.new_empty(self.rows, columns)

    @property
    def launch(self) -> dict[str, object]:
        """What the kernels want to know of it."""
        dlogits = self.dlogits
        return dict(
            dlogits=dlogits, magnification=self.magnification,
            sixteens=0 if dlogits is None else dlogits.shape[1] // 16, STORE=dlogits is not None,
        )  # fmt: skip

    def add(self, rows: slice, image: Tensor, factor: Tensor | float) -> None:
        """Of these rows of logits, whose gradient the kernel left, and their images."""
        if self.dlogits is None:
            return
        dlogits = self.dlogits[: len(image), : len(self.texts)]
        if self.need_text:
            self.text_sums = sum_of_products(self.text_sums, dlogits.T, image)
        if self.image is not None:
            sums = wide_product(dlogits, self.logits.text)
            self.logits.images.finish(sums, factor / self.magnification, rows, self.image)

    def text(self, factor: Tensor | float) -> Tensor | None:
        """The texts' gradient, when all rows have been added."""
        self.dlogits = None
        if not self.need_text:
            return None
        sums = self.text_sums
        if sums is None:  # no images
            return self.texts.new_gradient(self.dtype).zero_()
        same = sums.dtype == (self.dtype or self.texts.given.dtype)
        out = sums if same else self.texts.new_gradient(self.dtype)
        self.texts.finish(sums, factor / self.magnification, slice(0, len(sums)), out)
        return out


def softmax_backward(
    upstream: Tensor,
    images: Features,
    texts: Features,
    scale: Tensor,
    pair_mask: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of images, texts and scale."""
    logits = _Logits("softmax_gradient", images, texts, pair_mask, label_smoothing)
    gradients = _Gradients(logits, texts, _GRADIENT_BYTES, None, need_image, need_text)
    num_rows, num_columns = len(images), len(texts)
    row_shares, column_shares = smoothing_shares(
        label_smoothing, pair_mask, num_rows, num_columns, target_offset, scale
    )
    ways = 2 if both_ways else 1
    d_scale = torch.zeros_like(scale)

    def launch(config: Config, rows: slice, image: Tensor) -> Tensor:
        high, wide = logits.grid(config, len(image))
        scale_parts = scale.new_empty(high * wide if need_scale else 0)
        softmax_gradient_kernel[(high * wide,)](
            image, logits.text, logits.pair_mask, scale, row_shares, column_shares,
            row_lse, column_lse, scale_parts=scale_parts,
            target_weight=ways * (1 - label_smoothing),
            first_row=rows.start, num_rows=rows.stop, num_columns=num_columns,
            target_offset=target_offset,
            COLUMNS=both_ways, SMOOTHING=label_smoothing > 0, SUM_SCALE=need_scale,
            **gradients.launch, **logits.constexprs(config),
        )  # fmt: skip
        return scale_parts

    factor = upstream / max(ways * num_rows, 1)
    if num_rows:
        config = logits.config(gradients.rows, launch)
        for rows in slices(num_rows, gradients.rows):
            image = images.part(rows)
            d_scale += launch(config, rows, image).sum()
            gradients.add(rows, image, factor * scale)
    return gradients.image, gradients.text(factor * scale), d_scale * factor if need_scale else None


def sigmoid(
    images: Features,
    texts: Features,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    captions_per_image: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(sum of softplus(-y z), its gradients by images, texts, scale and bias, in float32)."""
    logits = _Logits("sigmoid", images, texts, pair_mask)
    gradients = _Gradients(
        logits, texts, _SIGMOID_GRADIENT_BYTES, scale.dtype, need_image, need_text
    )
    total, d_scale, d_bias = (torch.zeros_like(scale) for _ in range(3))

    def launch(config: Config, rows: slice, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        high, wide = logits.grid(config, len(image))
        loss_parts = scale.new_empty(high * wide)
        scale_parts = scale.new_empty(high * wide if need_scale else 0)
        bias_parts = scale.new_empty(high * wide if need_bias else 0)
        sigmoid_kernel[(high * wide,)](
            image, logits.text, logits.pair_mask, scale, bias,
            loss_parts, scale_parts=scale_parts, bias_parts=bias_parts,
            first_row=rows.start, num_rows=rows.stop, num_columns=len(texts),
            captions_per_image=captions_per_image, SUM_SCALE=need_scale, SUM_BIAS=need_bias,
            **gradients.launch, **logits.constexprs(config),
        )  # fmt: skip
        return loss_parts, scale_parts, bias_parts

    if len(images) and len(texts):
        config = logits.config(gradients.rows, launch)
        for rows in slices(len(images), gradients.rows):
            image = images.part(rows)
            loss_parts, scale_parts, bias_parts = launch(config, rows, image)
            total += loss_parts.sum()
            d_scale += scale_parts.sum()
            d_bias += bias_parts.sum()
            gradients.add(rows, image, scale)
    elif gradients.image is not None:
        gradients.image.zero_()
    return (
        total, gradients.image, gradients.text(scale),
        d_scale if need_scale else None, d_bias if need_bias else None,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------

_SCALARS = {"magnification": "fp32", "target_weight": "fp32"}


def _case(kernel, dtype: torch.dtype, config: Config, dim: int, label: str, **flags):
    def kind(name: str) -> str | None:
        if name in ("images", "texts", "dlogits"):
            return "tokens"
        if name == "pair_mask":
            return "*i1" if flags["HAS_MASK"] else "constexpr"
        return _SCALARS.get(name) or (None if name in _UNSPECIALIZED else "*fp32")

    constexprs = dict(
        D=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d, **flags
    )
    if not flags["HAS_MASK"]:
        constexprs["pair_mask"] = None
    return tile_case(kernel, f"D={dim}{label}", dtype, config, constexprs, kind)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every tile of the tables in bfloat16, the default ones in the other dtypes."""
    cases = []
    sums = dict(STORE=True, SUM_SCALE=True)
    kernels = (
        ("softmax_sums", softmax_sums_kernel, dict(COLUMNS=True)),
        ("softmax_gradient", softmax_gradient_kernel, dict(sums, COLUMNS=True)),
        ("sigmoid", sigmoid_kernel, dict(sums, SUM_BIAS=True)),
    )
    for name, kernel, flags in kernels:
        table = partial(tiles, name, arch=arch)
        plain = table(torch.bfloat16, "ieee", True)
        wanted = [(torch.bfloat16, config, 512, "ieee", True) for config in plain]
        wanted += [
            (torch.float16, plain[0], 512, "ieee", True),
            # A width that no tile divides, and all that a thread may have to hold.
            (torch.bfloat16, table(torch.bfloat16, "ieee", False)[0], 1000, "ieee", False),
            (torch.float32, table(torch.float32, "ieee", False)[0], 512, "ieee", False),
            (torch.float32, table(torch.float32, "tf32", True)[0], 512, "tf32", True),
        ]
        for dtype, config, dim, precision, is_plain in wanted:
            smoothing = {} if name == "sigmoid" else dict(SMOOTHING=not is_plain)
            cases.append(
                _case(
                    kernel, dtype, config, dim, "" if is_plain else " masked",
                    HAS_MASK=not is_plain, PRECISION=precision, **flags, **smoothing,
                )
            )  # fmt: skip
    cases.append(_merge_case())
    return cases


def _merge_case() -> CompileCase:
    constexprs = dict(BLOCK_P=16, BLOCK_L=128, CONTINUE=True)
    signature = {
        name: "constexpr" if name in constexprs else "i32" if name in _UNSPECIALIZED else "*fp32"
        for name in merge_lse_kernel.arg_names
    }
    return CompileCase(
        name=merge_lse_kernel.__name__, label="", kernel=merge_lse_kernel, signature=signature,
        constexprs=constexprs, num_warps=4, num_stages=3, uses_matrix_unit=False,
        aligned=frozenset({"partial", "lse"}),
    )  # fmt: skip

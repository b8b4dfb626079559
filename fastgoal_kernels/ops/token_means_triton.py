"""Means of rectangles of tokens in Triton, one launch each way.

    means_kernel    one mean by a block of channels; reads the rectangle's cells alone
    spread_kernel   a block of an item's cells by a block of channels; goes over the rectangles
                    of that item, in ascending order, and writes every cell once: no atomics

Of 256 images of 196 patches, D 768 in 16 bits, with a box of a quarter of each, the forward reads
19 MB and the backward writes 77 MB, all of a gradient that is mostly zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .item_rows import item_rows
from .tiles_triton import Config, tile_case

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = ["rows_per_item", "num_rows", "width"]

# Cells at once, and channels.
_CONFIG = Config(4 if INTERPRETED else 16, 0, 16 if INTERPRETED else 128, 4, num_stages=1)


@triton.jit
def _rectangle(rectangles, m):
    """First column, end column, first row, end row."""
    rectangles += m * 4
    first_column = tl.load(rectangles).to(tl.int32)  # to divide 64-bit numbers takes far longer
    end_column = tl.load(rectangles + 1).to(tl.int32)
    first_row, end_row = tl.load(rectangles + 2).to(tl.int32), tl.load(rectangles + 3).to(tl.int32)
    return first_column, end_column, first_row, end_row


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def means_kernel(
    tokens, items, rectangles, means, rows_per_item, width,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means[m], a block of its channels."""
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    m = (tl.program_id(0) // channel_blocks).to(tl.int64)
    d = tl.program_id(0) % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens += tl.load(items + m) * rows_per_item * D
    first_column, end_column, first_row, end_row = _rectangle(rectangles, m)
    columns = end_column - first_column
    cells = columns * (end_row - first_row)
    sums = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for first in range(0, cells, BLOCK_P):
        cell = first + tl.arange(0, BLOCK_P)
        place = (first_row + cell // columns) * width + first_column + cell % columns
        given = (cell < cells)[:, None] & (d < D)[None, :]
        x = tl.load(tokens + place[:, None] * D + d[None, :], mask=given, other=0.0)
        sums += x.to(tl.float32)
    mean = tl.sum(sums, axis=0) / cells.to(tl.float32)
    tl.store(means + m * D + d, mean.to(means.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def spread_kernel(
    grads, order, bounds, rectangles, tokens_grad, num_rows, width,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of an item's cells, a block of their channels.

    order[bounds[item]] to order[bounds[item + 1] - 1] are the rectangles of an item.
    """
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row_blocks = tl.cdiv(num_rows, BLOCK_P)
    program = tl.program_id(0)
    d = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    place = program // channel_blocks % row_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    item = (program // channel_blocks // row_blocks).to(tl.int64)
    row, column = place // width, place % width
    gradient = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for number in range(tl.load(bounds + item), tl.load(bounds + item + 1)):
        m = tl.load(order + number)
        first_column, end_column, first_row, end_row = _rectangle(rectangles, m)
        cells = (end_column - first_column) * (end_row - first_row)
        g = tl.load(grads + m * D + d, mask=d < D, other=0.0).to(tl.float32) / cells.to(tl.float32)
        inside = (column >= first_column) & (column < end_column)
        inside = inside & (row >= first_row) & (row < end_row)
        gradient += tl.where(inside[:, None], g[None, :], 0.0)
    tl.store(
        tokens_grad + (item * num_rows + place)[:, None] * D + d[None, :],
        gradient.to(tokens_grad.dtype.element_ty),
        mask=(place < num_rows)[:, None] & (d < D)[None, :],
    )


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------

_BLOCKS = dict(BLOCK_P=_CONFIG.block_m, BLOCK_D=_CONFIG.block_d)


def forward(tokens: Tensor, item: Tensor, rectangles: Tensor, width: int) -> Tensor:
    """Means (M, D) in the dtype of the tokens; zeros where there is no item at all."""
    dim = tokens.shape[2]
    means = tokens.new_empty((len(item), dim))
    if not tokens.numel():
        return means.zero_()
    tokens, rows_per_item = item_rows(tokens)
    if len(item):
        means_kernel[(len(item) * triton.cdiv(dim, _CONFIG.block_d),)](
            tokens, item.contiguous(), rectangles.contiguous(), means, rows_per_item, width,
            D=dim, **_BLOCKS, **_CONFIG.launch,
        )  # fmt: skip
    return means


def backward(
    upstream: Tensor, item: Tensor, rectangles: Tensor, width: int, num_items: int, num_rows: int
) -> Tensor:
    """The gradient of the tokens (num_items, num_rows, D)."""
    dim = upstream.shape[1]
    gradient = upstream.new_empty((num_items, num_rows, dim))
    if gradient.numel():
        item, order = torch.sort(item, stable=True)
        bounds = torch.searchsorted(item, torch.arange(num_items + 1, device=item.device))
        programs = num_items * triton.cdiv(num_rows, _CONFIG.block_m)
        spread_kernel[(programs * triton.cdiv(dim, _CONFIG.block_d),)](
            upstream.contiguous(), order, bounds, rectangles.contiguous(), gradient,
            num_rows, width, D=dim, **_BLOCKS, **_CONFIG.launch,
        )  # fmt: skip
    return gradient


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def _pointer_type(name: str) -> str | None:
    if name in ("tokens", "means", "grads", "tokens_grad"):
        return "tokens"
    return None if name in _UNSPECIALIZED else "*i64"


def compile_cases(arch: int) -> list[CompileCase]:
    """Both kernels in bfloat16, and in float32 of a width that no block divides."""
    return [
        tile_case(kernel, f"D={dim}", dtype, _CONFIG, dict(_BLOCKS, D=dim), _pointer_type, False)
        for kernel in (means_kernel, spread_kernel)
        for dtype, dim in ((torch.bfloat16, 768), (torch.float32, 500))
    ]

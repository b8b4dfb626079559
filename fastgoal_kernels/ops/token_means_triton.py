"""Means of boxes and spans of tokens in Triton, one launch each way.

    region_kernel   one mean by a block of channels: places the box, reads the cells under it alone
    span_kernel     the same of a span of words, a rectangle in a grid one column wide
    spread_kernel   a block of an item's cells by a block of channels; goes over the rectangles
                    of that item, in ascending order, and writes every cell once: no atomics

Placing a box would be 67 launches of PyTorch on a few hundred numbers each. Here every program that
needs the box places it again: two float64 divisions, one number each of four lanes. The forward
notes the rectangles that it found, 16 bytes each, for the backward.

Of 256 images of 196 patches, D 768 in 16 bits, with a box of a quarter of each, the forward reads
19 MB and the backward writes 77 MB, all of a gradient that is mostly zeros. Where boxes name their
images, each program of the backward looks through all the names for its own: of 256 images with
10,000 boxes, 10,000 programs read 80 KB each, from L2. Sorting them would be a dozen launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .item_rows import item_rows
from .tiles_triton import Config, tile_case

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "rows_per_item", "num_items", "num_means", "num_rows", "height", "width", "model_size"
]  # fmt: skip

# Cells at once, and channels.
_CONFIG = Config(4 if INTERPRETED else 16, 0, 16 if INTERPRETED else 256, 4, num_stages=1)
# Names of items that the backward looks through at once.
_BLOCK_M = 2 if INTERPRETED else 256

# Added to a number from 0 to 2^31 it leaves no bits for a fraction, which rounds half to even.
_WHOLE = tl.constexpr(2.0**52)


@triton.jit
def _clamp_item(item, num_items):
    return tl.minimum(tl.maximum(item.to(tl.int64), 0), num_items - 1)


@triton.jit
def _item_of(items, m, num_items):
    """Range m lies in item m, unless items say otherwise."""
    if items is None:
        item = m
    else:
        item = _clamp_item(tl.load(items + m), num_items)
    return item


@triton.jit
def _clamp(x, high):
    """x in [0, high]; NaN becomes 0."""
    return tl.where(x > 0, tl.where(x < high, x, high), 0.0)


@triton.jit
def _corner(values, corner):
    return tl.sum(tl.where(tl.arange(0, 4) == corner, values, 0), axis=0)


@triton.jit
def _cell_at(low, high, cells, side):
    """The cell under the middle of a scaled box, of one axis."""
    return tl.floor(_clamp((low + high) / 2, side - 1) * cells / side).to(tl.int32)


@triton.jit
def _region(box, size, height, width, model_size):
    """First column, end column, first row, end row: `reference.region_grid`, step by step.

    Clamped before it is rounded, to whole numbers, which is the same. Inside the grid, and of one
    cell at least, whatever the numbers are.
    """
    side = model_size.to(tl.float64)
    corner = tl.arange(0, 4)  # x1 y1 x2 y2
    is_end = corner >= 2
    cells = tl.where(corner % 2 == 0, width, height).to(tl.float64)
    scaled = tl.load(box + corner).to(tl.float64) * side / tl.load(size + corner % 2).to(tl.float64)
    pixel = _clamp(scaled, tl.where(is_end, side, side - 1)) + _WHOLE - _WHOLE
    edge = pixel * cells / side
    edge = tl.where(is_end, tl.ceil(edge), tl.floor(edge)).to(tl.int32)
    first_column, first_row = _corner(edge, 0), _corner(edge, 1)
    end_column, end_row = _corner(edge, 2), _corner(edge, 3)
    if (end_column <= first_column) | (end_row <= first_row):
        first_column = _cell_at(_corner(scaled, 0), _corner(scaled, 2), width, side)
        first_row = _cell_at(_corner(scaled, 1), _corner(scaled, 3), height, side)
        end_column, end_row = first_column + 1, first_row + 1
    return first_column, end_column, first_row, end_row


@triton.jit
def _span(span, lengths, item, context):
    """First and end token: clipped to the context, or the last one of the text."""
    start = tl.minimum(tl.maximum(tl.load(span), 0), context).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(span + 1), 0), context).to(tl.int32)
    if end <= start:
        end = context
        if lengths is not None:
            end = tl.minimum(tl.maximum(tl.load(lengths + item), 1), context).to(tl.int32)
        start = end - 1
    return start, end


@triton.jit
def _mean(
    tokens, mean, rectangle, first_column, end_column, first_row, end_row, width, channel_block,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of channels of a rectangle's mean; the first one notes the rectangle, too."""
    if channel_block == 0:
        tl.store(rectangle, first_column)
        tl.store(rectangle + 1, end_column)
        tl.store(rectangle + 2, first_row)
        tl.store(rectangle + 3, end_row)
    d = channel_block * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = end_column - first_column
    cells = columns * (end_row - first_row)
    sums = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for first in range(0, cells, BLOCK_P):
        cell = first + tl.arange(0, BLOCK_P)
        place = (first_row + cell // columns) * width + first_column + cell % columns
        given = (cell < cells)[:, None] & (d < D)[None, :]
        x = tl.load(tokens + place[:, None] * D + d[None, :], mask=given, other=0.0)
        sums += x.to(tl.float32)
    total = tl.sum(sums, axis=0) / cells.to(tl.float32)
    tl.store(mean + d, total.to(mean.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def region_kernel(
    tokens, items, boxes, sizes, means, rectangles,
    rows_per_item, num_items, height, width, model_size,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means[m], a block of its channels, and rectangles[m]."""
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    m = (tl.program_id(0) // channel_blocks).to(tl.int64)
    item = _item_of(items, m, num_items)
    first_column, end_column, first_row, end_row = _region(
        boxes + m * 4, sizes + item * 2, height, width, model_size
    )
    _mean(
        tokens + item * rows_per_item * D, means + m * D, rectangles + m * 4,
        first_column, end_column, first_row, end_row, width,
        tl.program_id(0) % channel_blocks, D, BLOCK_P, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def span_kernel(
    tokens, items, spans, lengths, means, rectangles, rows_per_item, num_items, num_rows,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means[m], a block of its channels, and rectangles[m]."""
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    m = (tl.program_id(0) // channel_blocks).to(tl.int64)
    item = _item_of(items, m, num_items)
    start, end = _span(spans + m * 2, lengths, item, num_rows)
    _mean(
        tokens + item * rows_per_item * D, means + m * D, rectangles + m * 4,
        0, 1, start, end, 1, tl.program_id(0) % channel_blocks, D, BLOCK_P, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _spread(gradient, grads, rectangles, m, row, column, d, D: tl.constexpr):
    """gradient + what the cells (row, column) get of mean m."""
    first_column, end_column = tl.load(rectangles + m * 4), tl.load(rectangles + m * 4 + 1)
    first_row, end_row = tl.load(rectangles + m * 4 + 2), tl.load(rectangles + m * 4 + 3)
    cells = (end_column - first_column) * (end_row - first_row)
    g = tl.load(grads + m * D + d, mask=d < D, other=0.0).to(tl.float32) / cells.to(tl.float32)
    inside = (column >= first_column) & (column < end_column)
    inside = inside & (row >= first_row) & (row < end_row)
    return gradient + tl.where(inside[:, None], g[None, :], 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def spread_kernel(
    grads, items, rectangles, tokens_grad, num_items, num_means, num_rows, width,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of an item's cells, a block of their channels."""
    channel_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row_blocks = tl.cdiv(num_rows, BLOCK_P)
    program = tl.program_id(0)
    d = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    place = program // channel_blocks % row_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    item = (program // channel_blocks // row_blocks).to(tl.int64)
    row, column = place // width, place % width
    gradient = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    if items is None:
        gradient = _spread(gradient, grads, rectangles, item, row, column, d, D)
    else:
        for first in range(0, num_means, BLOCK_M):
            index = first + tl.arange(0, BLOCK_M)
            owner = tl.load(items + index, mask=index < num_means, other=0)
            mine = (index < num_means) & (_clamp_item(owner, num_items) == item)
            left = tl.where(mine, index, num_means)
            m = tl.min(left, axis=0)
            while m < num_means:
                gradient = _spread(gradient, grads, rectangles, m.to(tl.int64), row, column, d, D)
                left = tl.where(left > m, left, num_means)
                m = tl.min(left, axis=0)
    tl.store(
        tokens_grad + (item * num_rows + place)[:, None] * D + d[None, :],
        gradient.to(tokens_grad.dtype.element_ty),
        mask=(place < num_rows)[:, None] & (d < D)[None, :],
    )


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------

_BLOCKS = dict(BLOCK_P=_CONFIG.block_m, BLOCK_D=_CONFIG.block_d)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    tokens: Tensor, item: Tensor | None, ranges: Tensor, sizes: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Means (M, D) in the dtype of the tokens, and rectangles; zeros where there is no item."""
    num_items, num_rows, dim = tokens.shape
    means = tokens.new_empty((len(ranges), dim))
    rectangles = tokens.new_empty((len(ranges), 4), dtype=torch.int32)
    if not tokens.numel():
        return means.zero_(), rectangles.zero_()
    tokens, rows_per_item = item_rows(tokens)
    pointers = (
        tokens, _contiguous(item), ranges.contiguous(), _contiguous(sizes), means, rectangles
    )  # fmt: skip
    if len(ranges):
        kernel, numbers = (region_kernel, grid) if grid else (span_kernel, (num_rows,))
        kernel[(len(ranges) * triton.cdiv(dim, _CONFIG.block_d),)](
            *pointers, rows_per_item, num_items, *numbers, D=dim, **_BLOCKS, **_CONFIG.launch
        )
    return means, rectangles


def backward(
    upstream: Tensor,
    item: Tensor | None,
    rectangles: Tensor,
    width: int,
    num_items: int,
    num_rows: int,
) -> Tensor:
    """The gradient of the tokens (num_items, num_rows, D)."""
    num_means, dim = upstream.shape
    gradient = upstream.new_empty((num_items, num_rows, dim))
    if gradient.numel():
        programs = num_items * triton.cdiv(num_rows, _CONFIG.block_m)
        spread_kernel[(programs * triton.cdiv(dim, _CONFIG.block_d),)](
            upstream.contiguous(), _contiguous(item), rectangles, gradient,
            num_items, num_means, num_rows, width,
            D=dim, BLOCK_M=_BLOCK_M, **_BLOCKS, **_CONFIG.launch,
        )  # fmt: skip
    return gradient


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


_TYPES = {
    "items": "*i64", "spans": "*i64", "lengths": "*i64", "rectangles": "*i32", "sizes": "*i64",
    **dict.fromkeys(("tokens", "means", "grads", "tokens_grad"), "tokens"),
}  # fmt: skip


def compile_cases(arch: int) -> list[CompileCase]:
    """Each kernel in bfloat16, one range an item; and in float32 of a width that no block divides,
    with ranges that name their items."""
    cases = []
    for kernel in (region_kernel, span_kernel, spread_kernel):
        for dtype, dim, named, boxes in (
            (torch.bfloat16, 768, False, "*fp32"),
            (torch.float32, 500, True, "*fp64"),
        ):
            constexprs: dict[str, object] = dict(_BLOCKS, D=dim)
            if kernel is spread_kernel:
                constexprs["BLOCK_M"] = _BLOCK_M
            if not named:
                constexprs["items"] = None
            types = {**_TYPES, "boxes": boxes}
            label = f"D={dim}" + " named" * named
            cases.append(tile_case(kernel, label, dtype, _CONFIG, constexprs, types.get, False))
    return cases

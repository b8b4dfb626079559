"""Farthest points in Triton: one launch, one program a set, the greedy loop inside it.

A sample needs the distances of all points from the one that was chosen last, by direct
differences: the program reads its set once for each sample and multiplies nothing that a matrix
unit could. Of the published size, 197 x 768 in 16 bits, a set is 303 KB and 64 readings of all 256
sets are 4.96 GB. So what counts is where the set lies meanwhile:

- It does not fit into a multiprocessor's shared memory (227 KB), nor into registers.
- From L2, at some 5.5 TB/s, 4.96 GB are 0.9 ms. 132 sets in flight, 40 MB, do stay there.
- The first level cache is 256 KB less what shared memory takes, which is next to nothing here. A
  set that is read from end to end over and over would throw itself out of it; so only the first
  channels are read through that cache, as many as fit (7 of 12 lines of a row), and the others pass
  it by. That leaves 2.1 GB for L2, 0.4 ms, which overlap with the arithmetic.

That arithmetic is 3.6 instructions an element on rows padded to 256, with bfloat16 widened as
pairs in the integer that holds both: 0.4 ms of an H200's issue slots. 16 warps need more than 64
registers a thread, so one set at a time lies in a multiprocessor's cache. In float32 a set is twice
the size; 132 of them pass L2's too, and the time is memory's: points that are 16 bits wide should
come as such. None of these times is measured.

The winner is found in one reduction of 64-bit numbers: a squared distance is never negative, so its
bits order it as an integer does, with NaN above infinity, as `argmax` has it; below the distance
stands the row, the lower the larger, and whether it is still to be taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .item_rows import item_rows
from .tiles_triton import Config, architecture, of_architecture, tile_case

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = ["rows_per_item", "num_points", "num_samples", "start", "near_blocks"]

# Bytes of a set that are kept in the first level cache, of 192 KB (sm_80), 128 KB (sm_86) and
# 256 KB (sm_90 and later), the rest of which is for what passes through.
_NEAR_BYTES = {80: 128 << 10, 86: 80 << 10, 90: 184 << 10}

_NAN_KEY = tl.constexpr(0x7FC00000)
_LAST_ROW = tl.constexpr(0x7FFFFFFF)
_NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _add_square(total, x, chosen):
    difference = x - chosen[None, :]
    return tl.fma(difference, difference, total)


@triton.jit
def _add_squares(
    total, rows, row, inside, chosen_row, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """total + (the rows - the chosen one)^2, of BLOCK_D columns from `first`."""
    d = first + tl.arange(0, BLOCK_D)
    if D % BLOCK_D == 0:
        chosen = tl.load(chosen_row + d)
        given = inside[:, None]
    else:
        chosen = tl.load(chosen_row + d, mask=d < D, other=0)
        given = inside[:, None] & (d < D)[None, :]
    x = tl.load(rows + (row[:, None] * D + d[None, :]), mask=given, other=0, cache_modifier=CACHE)
    if PAIRS:  # a bfloat16 is the upper half of a float32
        total = _add_square(
            total,
            (x << 16).to(tl.float32, bitcast=True),
            (chosen << 16).to(tl.float32, bitcast=True),
        )
        x = (x & -65536).to(tl.float32, bitcast=True)
        chosen = (chosen & -65536).to(tl.float32, bitcast=True)
    return _add_square(total, x.to(tl.float32), chosen.to(tl.float32))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def farthest_points_kernel(
    points, mask, distances, taken, indices,
    rows_per_item, num_points, num_samples, start, near_blocks,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """indices[item] of one item. distances and taken are where it keeps its points' state.

    PAIRS: points are D pairs of bfloat16, as int32.
    """
    item = tl.program_id(0).to(tl.int64)
    points += item * rows_per_item * D
    distances += item * num_points
    taken += item * num_points
    indices += item * num_samples
    local = tl.arange(0, BLOCK_L)
    left = num_points - 1  # how many may still be taken
    if HAS_MASK:
        mask += item * num_points
        real = tl.zeros((BLOCK_L,), dtype=tl.int32)
        for first in range(0, num_points, BLOCK_L):
            row = first + local
            real += (tl.load(mask + row, mask=row < num_points, other=0) != 0).to(tl.int32)
        left = tl.sum(real) - (tl.load(mask + start) != 0).to(tl.int32)
    tl.store(indices, tl.cast(start, tl.int64))

    chosen = start
    for sample in range(1, num_samples):
        chosen_row = points + tl.cast(chosen, tl.int64) * D
        best = tl.full((BLOCK_L,), _NOTHING, dtype=tl.int64)
        for first in range(0, num_points, BLOCK_L):
            row = first + local
            inside = row < num_points
            rows = points + tl.cast(first, tl.int64) * D
            squares = tl.zeros((BLOCK_L, BLOCK_D), dtype=tl.float32)
            for d in range(0, near_blocks * BLOCK_D, BLOCK_D):
                squares = _add_squares(
                    squares, rows, local, inside, chosen_row, d, D, BLOCK_D, PAIRS, ""
                )
            for d in range(near_blocks * BLOCK_D, D, BLOCK_D):
                squares = _add_squares(
                    squares, rows, local, inside, chosen_row, d, D, BLOCK_D, PAIRS, ".cg"
                )
            # Several threads may do this for one row, one of them late: it changes nothing then.
            known = inside & (sample > 1)
            distance = tl.minimum(
                tl.load(distances + row, mask=known, other=float("inf")),
                tl.sum(squares, axis=1),
                propagate_nan=tl.PropagateNan.ALL,
            )
            done = (tl.load(taken + row, mask=known, other=0) != 0) | (row == chosen)
            tl.store(distances + row, distance, mask=inside)
            tl.store(taken + row, done.to(tl.int8), mask=inside)
            key = tl.where(distance != distance, _NAN_KEY, distance.to(tl.int32, bitcast=True))
            if HAS_MASK:
                key = tl.where(tl.load(mask + row, mask=inside, other=0) != 0, key, -1)
            place = (row ^ _LAST_ROW).to(tl.int64) * 2 + (1 - done.to(tl.int64))
            best = tl.maximum(best, tl.where(inside, (key.to(tl.int64) << 32) | place, _NOTHING))
        tl.debug_barrier()  # the stores are seen by whoever loads them next
        winner = tl.max(best, axis=0)
        row = ((winner >> 1) & _LAST_ROW).to(tl.int32) ^ _LAST_ROW
        chosen = tl.where(left > 0, row, start)
        left -= tl.where(left > 0, (winner & 1).to(tl.int32), 0)
        tl.store(indices + sample, chosen.to(tl.int64))


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------


def _config(num_points: int, columns: int, column_bytes: int) -> Config:
    """Columns that are a cache line of a row, and warps for the rows.

    Rows that are no multiple of 8 bytes are read element by element, each of which has its address
    in registers: fewer columns at once.
    """
    if INTERPRETED:
        return Config(8, 0, 8, num_warps=4, num_stages=1)
    block_d = 16 if columns * column_bytes % 8 else 128 // column_bytes
    if num_points <= 64:
        return Config(64, 0, block_d, num_warps=8, num_stages=1, maxnreg=128)
    return Config(256, 0, block_d, num_warps=16, num_stages=1)


def _near_blocks(points: Tensor, config: Config) -> int:
    """How many blocks of columns are read through the first level cache."""
    num_points, columns = points.shape[1:]
    budget = 64 if INTERPRETED else of_architecture(_NEAR_BYTES, architecture(points.device))
    fit = budget // (num_points * points.element_size())
    return triton.cdiv(columns, config.block_d) if fit >= columns else fit // config.block_d


def _as_pairs(points: Tensor) -> bool:
    """Whether two neighbours can be read as one int32, which halves the work of widening them."""
    if points.dtype != torch.bfloat16 or points.shape[2] % 2:
        return False
    return not (points.storage_offset() % 2 or points.data_ptr() % 4)


def sample(points: Tensor, num_samples: int, start: int, mask: Tensor | None) -> Tensor:
    """(N, num_samples) int64 indices into points (N, L, D)."""
    batch, num_points = points.shape[:2]
    indices = torch.empty((batch, num_samples), dtype=torch.long, device=points.device)
    if not batch:
        return indices
    points, rows_per_item = item_rows(points)
    pairs = _as_pairs(points)
    if pairs:
        points = points.view(torch.int32)
    config = _config(num_points, points.shape[2], points.element_size())
    farthest_points_kernel[(batch,)](
        points,
        None if mask is None else mask.contiguous(),
        torch.empty((batch, num_points), dtype=torch.float32, device=points.device),
        torch.empty((batch, num_points), dtype=torch.int8, device=points.device),
        indices,
        rows_per_item, num_points, num_samples, start, _near_blocks(points, config),
        D=points.shape[2], BLOCK_L=config.block_m, BLOCK_D=config.block_d,
        HAS_MASK=mask is not None, PAIRS=pairs, **config.launch,
    )  # fmt: skip
    return indices


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------

_TYPES = {"mask": "*i1", "distances": "*fp32", "taken": "*i8", "indices": "*i64"}


def compile_cases(arch: int) -> list[CompileCase]:
    """Sets of both sizes, masked or not, in pairs or not, of rows less and less aligned."""
    cases = []
    for dtype, num_points, dim, pairs, masked in (
        (torch.bfloat16, 197, 768, True, False),
        (torch.float32, 197, 768, False, True),
        (torch.float16, 197, 768, False, False),
        (torch.float32, 50, 768, False, False),
        (torch.bfloat16, 50, 500, True, True),
        (torch.float16, 197, 500, False, True),
        (torch.bfloat16, 197, 502, True, True),
        (torch.bfloat16, 197, 501, False, True),
        (torch.float32, 50, 501, False, True),
    ):
        columns, width = (dim // 2, 4) if pairs else (dim, dtype.itemsize)
        config = _config(num_points, columns, width)
        constexprs: dict[str, object] = dict(
            D=columns, BLOCK_L=config.block_m, BLOCK_D=config.block_d,
            HAS_MASK=masked, PAIRS=pairs,
        )  # fmt: skip
        if not masked:
            constexprs["mask"] = None
        types = {**_TYPES, "points": "*i32" if pairs else "tokens"}
        label = f"D={dim}" + " in pairs" * pairs + " masked" * masked
        kernel = farthest_points_kernel
        cases.append(tile_case(kernel, label, dtype, config, constexprs, types.get, False))
    return cases

"""Who chose me: the winners of MaxSim, turned round, in Triton.

For an own item's rows the index lists the other side's rows that chose each of them, in ascending
order, with the share g * w that each contributes to the gradient. Entries without a share (padding,
items without a gradient) are in no list.

It is a counting sort, made of parts that no run can reorder: blocks of other rows are sorted by
winner each on its own, the blocks' counts are summed in order, and every entry goes to the place
that the sums name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .token_rows import TokenRows

# Other rows that are sorted at once.
_BLOCK = 16 if INTERPRETED else 1024
_BINS_AT_ONCE = 64 if INTERPRETED else 256

# The key of an entry without a share, behind all others. A key is winner * block + place in it.
_UNLISTED = tl.constexpr(0x7FFFFFFF)
_MOST_BINS = 0x7FFFFFFF // _BLOCK

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "first_item", "other_rows", "num_bins", "num_blocks", "grad_own_stride", "grad_other_stride",
]  # fmt: skip


@triton.jit
def _share(grad_row, grad_other_stride, row_items, row_weights, s, inside):
    """g * w of the other rows s."""
    item = tl.load(row_items + s, mask=inside, other=0).to(tl.int64)
    weight = tl.load(row_weights + s, mask=inside, other=0.0)
    g = tl.load(grad_row + item * grad_other_stride, mask=weight != 0.0, other=0.0)
    return g * weight


@triton.jit
def _smaller_keys(keys, bound, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """How many of the block's sorted keys are below each bound, by bisection."""
    count = tl.zeros((BINS,), dtype=tl.int32)
    step = BLOCK // 2
    while step > 0:
        key = tl.load(keys + count + step - 1)
        count = tl.where(key < bound, count + step, count)
        step = step // 2
    return count + (tl.load(keys + count) < bound).to(tl.int32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def sort_winners_kernel(
    keys, counts, run_ends, own_lengths, winners, grad, row_items, row_weights,
    first_item, other_rows, num_bins, num_blocks, grad_own_stride, grad_other_stride,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Sort one block of other rows by the own row they chose; count the entries of each.

    run_ends says where in the sorted block the entries of an own row end.
    """
    block = tl.program_id(0)
    slot = tl.program_id(1)
    item = (first_item + slot).to(tl.int64)
    local = tl.arange(0, BLOCK)
    s = block * BLOCK + local
    # An item without a valid token scores 0 and takes no part.
    inside = s < tl.where(tl.load(own_lengths + item) > 0, other_rows, 0)
    share = _share(
        grad + item * grad_own_stride, grad_other_stride, row_items, row_weights, s, inside
    )
    listed = share != 0.0
    winner = tl.load(winners + item * other_rows + s, mask=listed, other=0).to(tl.int32)
    key = tl.sort(tl.where(listed, winner * BLOCK + local, _UNLISTED))
    keys += (tl.cast(slot, tl.int64) * num_blocks + block) * BLOCK
    tl.store(keys + local, key)
    tl.debug_barrier()  # all keys are in sight
    for first_bin in range(0, num_bins, BINS):
        bin = first_bin + tl.arange(0, BINS)
        begin = _smaller_keys(keys, bin * BLOCK, BLOCK, BINS)
        end = _smaller_keys(keys, (bin + 1) * BLOCK, BLOCK, BINS)
        at = (tl.cast(slot, tl.int64) * num_bins + bin) * num_blocks + block
        tl.store(counts + at, end - begin, mask=bin < num_bins)
        tl.store(run_ends + at, end, mask=bin < num_bins)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def place_entries_kernel(
    entry_rows, entry_shares, keys, list_ends, run_ends, grad, row_items, row_weights,
    first_item, other_rows, num_bins, num_blocks, grad_own_stride, grad_other_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Put one sorted block's entries where its part of each list is."""
    block = tl.program_id(0)
    slot = tl.program_id(1)
    item = (first_item + slot).to(tl.int64)
    local = tl.arange(0, BLOCK)
    key = tl.load(keys + (tl.cast(slot, tl.int64) * num_blocks + block) * BLOCK + local)
    listed = key != _UNLISTED
    at = (tl.cast(slot, tl.int64) * num_bins + key // BLOCK) * num_blocks + block
    list_end = tl.load(list_ends + at, mask=listed, other=0)
    run_end = tl.load(run_ends + at, mask=listed, other=0)
    s = block * BLOCK + key % BLOCK
    share = _share(
        grad + item * grad_own_stride, grad_other_stride, row_items, row_weights, s, listed
    )
    place = tl.cast(slot, tl.int64) * other_rows + list_end - run_end + local
    tl.store(entry_rows + place, s, mask=listed)
    tl.store(entry_shares + place, share, mask=listed)


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """The lists of the rows of some own items: entries of one item stand one behind the other."""

    rows: Tensor  # (items, other rows) int32
    shares: Tensor  # (items, other rows) float32
    list_ends: Tensor  # (items, own.longest, blocks) int32: with its last block a list ends
    lengths: Tensor  # (items, own.longest) int32


def _blocks(other: TokenRows) -> int:
    return triton.cdiv(other.total, _BLOCK)


def index_bytes(own: TokenRows, other: TokenRows) -> int | None:
    """What the index of one own item takes while it is made; None if it can not be made."""
    if own.longest > _MOST_BINS:
        return None
    # Entries and keys; counts, ends of lists and of runs; lengths.
    return 12 * _blocks(other) * _BLOCK + 12 * own.longest * _blocks(other) + 8 * own.longest


def inverted_index(
    own: TokenRows, other: TokenRows, winners: Tensor, grad: Tensor, first: int, items: int
) -> Index:
    """Of own items first, first + 1, ...; winners (own items, other rows), grad dL/dS (own items,
    other items).
    """
    blocks, bins = _blocks(other), own.longest

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=other.rows.device)

    keys, counts, run_ends = (
        new(items, blocks, _BLOCK), new(items, bins, blocks), new(items, bins, blocks)
    )  # fmt: skip
    looked_up = grad, other.row_item, other.row_weight
    sizes = first, other.total, bins, blocks, *grad.stride()
    sort_winners_kernel[(blocks, items)](
        keys, counts, run_ends, own.lengths, winners, *looked_up, *sizes,
        BLOCK=_BLOCK, BINS=_BINS_AT_ONCE, num_warps=4,
    )  # fmt: skip
    list_ends = counts.view(items, -1).cumsum(1, dtype=torch.int32).view_as(counts)
    rows, shares = new(items, other.total), new(items, other.total, dtype=torch.float32)
    place_entries_kernel[(blocks, items)](
        rows, shares, keys, list_ends, run_ends, *looked_up, *sizes, BLOCK=_BLOCK, num_warps=4
    )
    return Index(rows, shares, list_ends, counts.sum(2, dtype=torch.int32))


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def compile_cases(arch: int) -> list[CompileCase]:
    """The one configuration of each kernel, with one-byte winners."""
    types = {"winners": "*u8", "grad": "*fp32", "row_weights": "*fp32", "entry_shares": "*fp32"}
    sizes = dict.fromkeys(_UNSPECIALIZED, "i32")
    cases = []
    for kernel, constexprs in (
        (sort_winners_kernel, {"BLOCK": _BLOCK, "BINS": _BINS_AT_ONCE}),
        (place_entries_kernel, {"BLOCK": _BLOCK}),
    ):
        known = {**types, **sizes, **dict.fromkeys(constexprs, "constexpr")}
        signature = {name: known.get(name, "*i32") for name in kernel.arg_names}
        cases.append(
            CompileCase(
                name=kernel.__name__,
                label=f"blocks of {_BLOCK}",
                kernel=kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=4,
                num_stages=3,
                uses_matrix_unit=False,
                aligned=frozenset(n for n, kind in signature.items() if kind.startswith("*")),
            )
        )
    return cases

"""The MaxSim backward of queries, by gathering, in Triton.

    d own[q] = w_q * sum over the other items x of g[x] * other[x, winner[x, q]]

A program owns a block of rows of one item and walks the other items in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .tiles_triton import Config, tile_case
from .token_rows import TokenRows

# Pairs of items whose gradients are looked through for zeros at once: 21 bytes each.
_PAIRS_AT_ONCE = 24 if INTERPRETED else 1 << 20

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "first_item", "end_item", "num_others", "own_rows", "grad_own_stride", "grad_other_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_gather_gradient_kernel(
    own_grad, block_items, block_firsts, own_starts, own_lengths, own_weights,
    others, other_starts, other_lengths, winners, grad, live_items, live_counts,
    first_item, end_item, num_others, own_rows, grad_own_stride, grad_other_stride,
    D: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_D: tl.constexpr, LISTED: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of one item's rows, a block of channels.

    LISTED: only the other items of the item's list, live_counts of them, have a gradient.
    ADD: to what own_grad holds.
    """
    item = tl.load(block_items + tl.program_id(1)).to(tl.int64)
    if (item < first_item) | (item >= end_item):
        return
    start = tl.load(own_starts + item)
    own = tl.load(block_firsts + tl.program_id(1)) + tl.arange(0, BLOCK_OWN)
    inside = own < tl.load(own_lengths + item)
    own += start
    weight = tl.load(own_weights + own, mask=inside, other=0.0)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros((BLOCK_OWN, BLOCK_D), dtype=tl.float32)
    grad += item * grad_own_stride
    count = num_others
    if LISTED:
        live_items += (item - first_item) * num_others
        count = tl.load(live_counts + item - first_item)
    for i in range(0, count):
        other = tl.cast(i, tl.int64)
        if LISTED:
            other = tl.load(live_items + i).to(tl.int64)
        # An item without a valid token scores 0 and takes no part.
        alive = tl.where(weight != 0.0, tl.load(other_lengths + other), 0) > 0
        winner = tl.load(winners + other * own_rows + own, mask=alive, other=0)
        place = tl.load(other_starts + other) + winner.to(tl.int32)
        won = tl.load(
            others + place[:, None] * D + d[None, :],
            mask=alive[:, None] & (d < D)[None, :],
            other=0.0,
        )
        gradient += tl.load(grad + other * grad_other_stride) * won.to(tl.float32)
    gradient *= weight[:, None]
    at = own_grad + own[:, None] * D + d[None, :]
    valid = inside[:, None] & (d < D)[None, :]
    if ADD:
        gradient += tl.load(at, mask=valid, other=0.0).to(tl.float32)
    tl.store(at, gradient.to(own_grad.dtype.element_ty), mask=valid)


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------


def _config(dtype: torch.dtype) -> Config:
    """Own rows x 1 x channels: 256 bytes of each row."""
    if INTERPRETED:
        return Config(32, 1, 64, 4, 1)
    return Config(64, 1, 64 if dtype == torch.float32 else 128, 8, 1, maxnreg=96)


def _live_items(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the columns that are not 0, in order, and how many they are."""
    live = grad != 0
    count = live.cumsum(dim=1, dtype=torch.int32)
    # Behind the last column is room for those that are in no list.
    columns = torch.empty(grad.shape[0], grad.shape[1] + 1, dtype=torch.int32, device=grad.device)
    column = torch.arange(grad.shape[1], dtype=torch.int32, device=grad.device)
    place = torch.where(live, count - 1, grad.shape[1]).long()
    columns.scatter_(1, place, column.expand_as(grad))
    return columns[:, :-1].contiguous(), count[:, -1].contiguous()


def gather_gradient(
    own: TokenRows,
    other: TokenRows,
    winners: Tensor,
    grad: Tensor,
    gradient: Tensor,
    add: bool,
    skip_zeros: bool,
) -> None:
    """Write d own.rows into `gradient`, or add it to what is there.

    winners (other items, own rows); grad is dL/dS (own items, other items), of which few are not 0
    if skip_zeros.
    """
    dim = own.rows.shape[1]
    config = _config(own.rows.dtype)
    block_items, block_firsts = own.blocks(config.block_m)
    # The programs of all channels of a block run together, and read the same winners.
    grid = (triton.cdiv(dim, config.block_d), len(block_items))
    at_once = max(1, _PAIRS_AT_ONCE // other.items) if skip_zeros else own.items
    for first in range(0, own.items, at_once):
        end = min(first + at_once, own.items)
        # What a kernel does not look at still has to be a tensor.
        lists = _live_items(grad[first:end]) if skip_zeros else (block_items, block_items)
        maxsim_gather_gradient_kernel[grid](
            gradient, block_items, block_firsts, own.starts, own.lengths, own.row_weight,
            other.rows, other.starts, other.lengths, winners, grad, *lists,
            first, end, other.items, own.total, *grad.stride(),
            D=dim, BLOCK_OWN=config.block_m, BLOCK_D=config.block_d, LISTED=skip_zeros, ADD=add,
            **config.launch,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def compile_cases(arch: int) -> list[CompileCase]:
    """Every configuration the launcher picks: at a width of CLIP's, and at one no tile divides."""
    pointer_types = {
        "own_grad": "tokens", "others": "tokens", "block_items": "*i32", "block_firsts": "*i32",
        "own_starts": "*i64", "own_lengths": "*i32", "own_weights": "*fp32",
        "other_starts": "*i64", "other_lengths": "*i32", "winners": "*u8", "grad": "*fp32",
        "live_items": "*i32", "live_counts": "*i32",
    }  # fmt: skip
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        config = _config(dtype)
        for dim, listed, add in ((512, False, False), (512, True, True), (1000, False, True)):
            constexprs: dict[str, object] = dict(
                D=dim, BLOCK_OWN=config.block_m, BLOCK_D=config.block_d, LISTED=listed, ADD=add
            )
            label = f"D={dim}" + " listed" * listed + " add" * add
            cases.append(
                tile_case(
                    maxsim_gather_gradient_kernel,
                    label,
                    dtype,
                    config,
                    constexprs,
                    pointer_types.get,
                    has_product=False,
                )
            )
    return cases

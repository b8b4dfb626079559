"""The MaxSim backward as one matrix product, in Triton: what a side gets as queries and as keys.

With s a row of the other side, x its item, k a row of the own side, i its item, w their shares in
the means:

    d own[k] = sum over s of share[k, s] * other[s]
    share[k, s] =   [winner of query s in i is k] * g[i, x] * w_s       what k gets as a key
                  + [winner of query k in x is s] * h[i, x] * w_k       what k gets as a query

The shares are built in registers and fed to the matrix unit. Building one costs about as much as
multiplying it with a hundred channels, so that a tile of shares meets as many channels as the
registers can hold sums of. Both sides stand in slots (see `slots`): 16 slots belong to one item,
so that winners and gradients are looked up for granules, not for each element of the tile.

The price does not depend on the winners, and grows with both sides' rows: see
`maxsim_backward_triton` for when it is worth it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .slots import Slots, slots
from .tiles_triton import Config, architecture, dot, float32_precision, tile_case
from .token_rows import TokenRows

GRANULE = 16
_GRANULE = tl.constexpr(GRANULE)

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "own_items", "other_items", "own_rows", "other_rows", "grad_own_stride", "grad_other_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_product_gradient_kernel(
    own_grad, own_slot_rows, own_slot_items, own_slot_weights, own_item_slots, own_slot_places,
    others, other_slot_rows, other_slot_items, other_slot_weights, other_item_slots,
    other_slot_places,
    gather_winners, gather_grad, scatter_winners, scatter_grad,
    own_items, other_items, own_rows, other_rows, grad_own_stride, grad_other_stride,
    D: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of own slots, in a block of channels.

    GATHER: own rows are queries of a direction, SCATTER: they are keys of one.
    """
    OWN_GRANULES: tl.constexpr = BLOCK_OWN // _GRANULE
    OTHER_GRANULES: tl.constexpr = BLOCK_OTHER // _GRANULE
    own_end = tl.load(own_item_slots + own_items)
    other_end = tl.load(other_item_slots + other_items)
    first_own = tl.program_id(1) * BLOCK_OWN
    if (first_own >= own_end) | (other_end == 0):
        return
    k_slot = tl.minimum(first_own + tl.arange(0, BLOCK_OWN), own_end - 1)
    k_row = tl.load(own_slot_rows + k_slot)
    k_place = tl.load(own_slot_places + first_own + tl.arange(0, BLOCK_OWN))
    live = k_place >= 0
    k_place = tl.reshape(k_place, (OWN_GRANULES, _GRANULE, 1, 1))
    # A granule begins with a valid row, and all valid rows of an item weigh the same.
    granule = tl.minimum(first_own + tl.arange(0, OWN_GRANULES) * _GRANULE, own_end - 1)
    own_item = tl.load(own_slot_items + granule).to(tl.int64)
    own_weight = tl.load(own_slot_weights + granule)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros((BLOCK_OWN, BLOCK_D), dtype=tl.float32)

    # Bytes can not be copied ahead by the pipeline: the winners are loaded one turn early instead.
    scatter_ptrs = scatter_winners + own_item[:, None] * other_rows
    gather_ptrs = gather_winners + k_row[:, None]
    next_slot = tl.minimum(tl.arange(0, BLOCK_OTHER), other_end - 1)
    next_granule = tl.minimum(tl.arange(0, OTHER_GRANULES) * _GRANULE, other_end - 1)
    next_keys = tl.zeros((OWN_GRANULES, BLOCK_OTHER), dtype=scatter_winners.dtype.element_ty)
    next_queries = tl.zeros((BLOCK_OWN, OTHER_GRANULES), dtype=gather_winners.dtype.element_ty)
    if SCATTER:
        next_keys = tl.load(scatter_ptrs + tl.load(other_slot_rows + next_slot)[None, :])
    if GATHER:
        x = tl.load(other_slot_items + next_granule).to(tl.int64)
        next_queries = tl.load(gather_ptrs + x[None, :] * own_rows)
    for first in range(0, other_end, BLOCK_OTHER):
        slot = first + tl.arange(0, BLOCK_OTHER)
        s_place = tl.load(other_slot_places + slot)
        s_row = tl.load(other_slot_rows + tl.minimum(slot, other_end - 1))
        x_slot = tl.minimum(first + tl.arange(0, OTHER_GRANULES) * _GRANULE, other_end - 1)
        item = tl.load(other_slot_items + x_slot).to(tl.int64)
        pairs = own_item[:, None] * grad_own_stride + item[None, :] * grad_other_stride
        share = tl.zeros((OWN_GRANULES, _GRANULE, OTHER_GRANULES, _GRANULE), dtype=tl.float32)
        next_slot = tl.minimum(slot + BLOCK_OTHER, other_end - 1)
        if SCATTER:
            winner = tl.reshape(next_keys.to(tl.int32), (OWN_GRANULES, 1, OTHER_GRANULES, _GRANULE))
            next_keys = tl.load(scatter_ptrs + tl.load(other_slot_rows + next_slot)[None, :])
            g = tl.load(scatter_grad + pairs) * tl.load(other_slot_weights + x_slot)[None, :]
            share += tl.where(winner == k_place, g[:, None, :, None], 0.0)
        if GATHER:
            place = tl.reshape(s_place, (1, 1, OTHER_GRANULES, _GRANULE))
            winner = next_queries.to(tl.int32)
            winner = tl.reshape(winner, (OWN_GRANULES, _GRANULE, OTHER_GRANULES, 1))
            next_granule = tl.minimum(x_slot + BLOCK_OTHER, other_end - 1)
            x = tl.load(other_slot_items + next_granule).to(tl.int64)
            next_queries = tl.load(gather_ptrs + x[None, :] * own_rows)
            h = tl.load(gather_grad + pairs) * own_weight[:, None]
            share += tl.where(winner == place, h[:, None, :, None], 0.0)
        share = tl.reshape(share, (BLOCK_OWN, BLOCK_OTHER))
        # A repeated row, which has no place, has the shares of another: it counts as 0.
        counts = (s_place >= 0)[:, None]
        if D % BLOCK_D != 0:
            counts = counts & (d < D)[None, :]
        other = tl.load(others + s_row.to(tl.int64)[:, None] * D + d[None, :], counts, other=0.0)
        if others.dtype.element_ty == tl.bfloat16:
            gradient = dot(share.to(tl.bfloat16), other, gradient, PRECISION)
        else:
            # float16 would lose small shares to its exponent; TF32 holds all of its digits.
            gradient = dot(share, other.to(tl.float32), gradient, PRECISION)

    tl.store(
        own_grad + k_row.to(tl.int64)[:, None] * D + d[None, :],
        gradient.to(own_grad.dtype.element_ty),
        mask=live[:, None] & (d < D)[None, :],
    )


def config(dtype: torch.dtype, arch: int) -> Config:
    """Own slots x other slots x channels."""
    if INTERPRETED:
        return Config(32, 32, 32, 4, 1)
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2, maxnreg=168)
    if dtype == torch.float16:  # the product runs in TF32, with operands twice as wide
        return Config(64, 32, 64, 8, 2)
    if arch < 90:
        return Config(128, 32, 128, 8, 3)
    return Config(128, 64, 256, 8, 3)


def _places(side: TokenRows, line: Slots, block: int) -> Tensor:
    """A slot's row as the winners name it, within its item; -1 where a row is repeated and behind
    the end, up to whole blocks.
    """
    place = (line.row - side.starts[line.item]).int()
    slot = torch.arange(len(place), dtype=torch.int32, device=place.device)
    place.masked_fill_((line.weight == 0) | (slot >= line.item_slots[-1]), -1)
    return torch.nn.functional.pad(place, (0, -len(place) % block), value=-1)


def product_gradient(
    own: TokenRows,
    other: TokenRows,
    gather: tuple[Tensor, Tensor] | None,
    scatter: tuple[Tensor, Tensor] | None,
    gradient: Tensor,
) -> None:
    """Write d own.rows; `gradient` is 0 where own rows are padding.

    gather, scatter: (winners, dL/dS (own items, other items)) of the direction own rows are
    queries in, and of the one they are keys in. One may be missing.
    """
    dtype, dim = own.rows.dtype, own.rows.shape[1]
    shape = config(dtype, architecture(own.rows.device))
    present = gather or scatter
    assert present is not None
    own_slots, other_slots = slots(own, GRANULE), slots(other, GRANULE)
    # Programs that run together share the other side's rows: the channels of a block, then blocks.
    grid = (triton.cdiv(dim, shape.block_d), triton.cdiv(len(own_slots.row), shape.block_m))
    maxsim_product_gradient_kernel[grid](
        gradient, *own_slots, _places(own, own_slots, shape.block_m),
        other.rows, *other_slots, _places(other, other_slots, shape.block_n),
        *(gather or present), *(scatter or present),
        own.items, other.items, own.total, other.total, *present[1].stride(),
        D=dim, BLOCK_OWN=shape.block_m, BLOCK_OTHER=shape.block_n, BLOCK_D=shape.block_d,
        GATHER=gather is not None, SCATTER=scatter is not None,
        PRECISION="tf32" if dtype == torch.float16 else float32_precision(dtype),
        **shape.launch,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def _pointer_type(name: str) -> str | None:
    """What the kernel's parameter points at; None = it is a size or a stride."""
    if name in ("others", "own_grad"):
        return "tokens"
    if name.endswith(("slot_rows", "slot_items", "slot_places", "item_slots")):
        return "*i32"
    if name.endswith("winners"):
        return "*u8"
    if name.endswith(("weights", "gather_grad", "scatter_grad")):
        return "*fp32"
    return None


def compile_cases(arch: int) -> list[CompileCase]:
    """Every configuration the launcher picks: at a width of CLIP's, and at one no tile divides."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        precision = "tf32" if dtype == torch.float16 else "ieee"
        wanted = [
            (512, True, False, precision),
            (512, False, True, precision),
            (512, True, True, precision),
            (1000, True, True, precision),
        ]
        if dtype == torch.float32:  # what torch.set_float32_matmul_precision("high") allows
            wanted.append((512, True, True, "tf32"))
        for dim, gather, scatter, precision in wanted:
            shape = config(dtype, arch)
            label = f"D={dim}" + " gather" * gather + " scatter" * scatter
            constexprs: dict[str, object] = dict(
                D=dim, BLOCK_OWN=shape.block_m, BLOCK_OTHER=shape.block_n, BLOCK_D=shape.block_d,
                GATHER=gather, SCATTER=scatter, PRECISION=precision,
            )  # fmt: skip
            cases.append(
                tile_case(
                    maxsim_product_gradient_kernel, label, dtype, shape, constexprs, _pointer_type
                )
            )
    return cases

"""The MaxSim backward in Triton. The winners say everything; nothing is multiplied again.

With g = dL/dS and w a query token's share in its mean:

    gather   d query[q] = w_q * sum over keys' items x of g[x] * key[x, winner[x, q]]
    scatter  d key[k]   = sum over all query rows s with winner[s] = k of g * w_s * query[s]

Each program owns a block of output rows, walks the other side in a fixed order and writes once: no
atomics, the same bits every run. The scatter is a product with the matrix whose entry (k, s) is
g * w_s where winner[s] = k and 0 elsewhere, which is built in registers and fed to the matrix unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .tiles_triton import Config, dot, float32_precision, matrix_case
from .token_rows import TokenRows

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = ["num_others", "own_rows", "other_rows", "grad_own_stride", "grad_other_stride"]


@triton.jit
def _scattered(
    gradient, own, s, inside, others, other_weights, winner_row, g, d, d_inside,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient + what own rows get from the other rows s, whose items' gradients are g."""
    weight = tl.load(other_weights + s, mask=inside, other=0.0)
    live = weight != 0.0
    winner = tl.load(winner_row + s, mask=live, other=0).to(tl.int32)
    rows = tl.load(
        others + s[:, None].to(tl.int64) * D + d[None, :],
        mask=live[:, None] & d_inside[None, :],
        other=0.0,
    )
    share = tl.where(live, g * weight, 0.0)
    share = tl.where(own[:, None] == winner[None, :], share[None, :], 0.0)
    if others.dtype.element_ty == tl.bfloat16:
        return dot(share.to(tl.bfloat16), rows, gradient, PRECISION)
    # float16 would lose small shares to its exponent; TF32 holds all of its digits.
    return dot(share, rows.to(tl.float32), gradient, PRECISION)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_gradient_kernel(
    own_grad, block_items, block_firsts, own_starts, own_lengths, own_weights,
    others, other_starts, other_lengths, other_items, other_weights,
    gather_winners, gather_grad, gather_list, gather_counts,
    scatter_winners, scatter_grad, scatter_list, scatter_counts,
    num_others, own_rows, other_rows, grad_own_stride, grad_other_stride,
    D: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one side's tokens: a block of one item's rows, a block of channels.

    GATHER adds what the side gets as queries, SCATTER what it gets as keys. LISTED: only the other
    items of the lists, of which an own item has gather_counts and scatter_counts, have a gradient.
    """
    item = tl.load(block_items + tl.program_id(0)).to(tl.int64)
    if item < 0:
        return
    first = tl.load(block_firsts + tl.program_id(0))
    start = tl.load(own_starts + item)
    length = tl.load(own_lengths + item)
    own = first + tl.arange(0, BLOCK_OWN)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_inside = d < D
    gradient = tl.zeros((BLOCK_OWN, BLOCK_D), dtype=tl.float32)

    if GATHER:
        own_weight = tl.load(own_weights + start + own, mask=own < length, other=0.0)
        grad_row = gather_grad + item * grad_own_stride
        count = num_others
        if LISTED:
            count = tl.load(gather_counts + item)
        for i in range(0, count):
            other = tl.cast(i, tl.int64)
            if LISTED:
                other = tl.load(gather_list + item * num_others + i).to(tl.int64)
            # An item without a valid token scores 0 and takes no part.
            alive = tl.where(own_weight != 0.0, tl.load(other_lengths + other), 0) > 0
            winner = tl.load(gather_winners + other * own_rows + start + own, mask=alive, other=0)
            place = tl.load(other_starts + other) + winner.to(tl.int32)
            won = tl.load(
                others + place[:, None] * D + d[None, :],
                mask=alive[:, None] & d_inside[None, :],
                other=0.0,
            )
            gradient += tl.load(grad_row + other * grad_other_stride) * won.to(tl.float32)
        gradient *= own_weight[:, None]

    if SCATTER:
        winner_row = scatter_winners + item * other_rows
        grad_row = scatter_grad + item * grad_own_stride
        within = tl.arange(0, BLOCK_OTHER)
        if LISTED:
            for i in range(0, tl.load(scatter_counts + item)):
                other = tl.load(scatter_list + item * num_others + i).to(tl.int64)
                other_start = tl.load(other_starts + other)
                other_length = tl.load(other_lengths + other)
                g = tl.load(grad_row + other * grad_other_stride)
                for first_other in range(0, other_length, BLOCK_OTHER):
                    s = first_other + within
                    gradient = _scattered(
                        gradient, own, other_start + s, s < other_length, others, other_weights,
                        winner_row, g, d, d_inside, D, PRECISION,
                    )  # fmt: skip
        else:
            for first_other in range(0, other_rows, BLOCK_OTHER):
                s = first_other + within
                inside = s < other_rows
                other_item = tl.load(other_items + s, mask=inside, other=0).to(tl.int64)
                g = tl.load(grad_row + other_item * grad_other_stride, mask=inside, other=0.0)
                gradient = _scattered(
                    gradient, own, s, inside, others, other_weights,
                    winner_row, g, d, d_inside, D, PRECISION,
                )  # fmt: skip

    tl.store(
        own_grad + (start + own)[:, None] * D + d[None, :],
        gradient.to(own_grad.dtype.element_ty),
        mask=(own < length)[:, None] & d_inside[None, :],
    )


# ---------------------------------------------------------------------------------------------
# Configurations and launchers
# ---------------------------------------------------------------------------------------------


def _config(dtype: torch.dtype) -> Config:
    """Own rows x other rows x channels."""
    if INTERPRETED:
        return Config(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2, maxnreg=168)
    if dtype == torch.float16:  # the product runs in TF32, with operands twice as wide
        return Config(64, 32, 64, 8, 2)
    return Config(64, 64, 128, 8, 2)


def _listed(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Per row the columns that are not 0, in order, and how many they are."""
    live = grad != 0
    place = live.cumsum(dim=1) - 1
    # Behind the last column is room for those that are in no list.
    columns = torch.empty(grad.shape[0], grad.shape[1] + 1, dtype=torch.int32, device=grad.device)
    column = torch.arange(grad.shape[1], dtype=torch.int32, device=grad.device)
    columns.scatter_(1, torch.where(live, place, grad.shape[1]), column.expand_as(grad))
    return columns[:, :-1].contiguous(), live.sum(dim=1).int()


def _side_gradient(
    own: TokenRows,
    other: TokenRows,
    gather: tuple[Tensor, Tensor] | None,
    scatter: tuple[Tensor, Tensor] | None,
    skip_zeros: bool,
) -> Tensor:
    """d own.rows, from (winners, dL/dS (own items, other items)) of the direction it queries in
    and of the other one.
    """
    gradient = torch.zeros_like(own.rows)
    if gradient.numel() == 0 or other.total == 0:
        return gradient
    dtype, dim = own.rows.dtype, own.rows.shape[1]
    config = _config(dtype)
    block_items, block_firsts = own.blocks(config.block_m)
    present = gather or scatter
    assert present is not None

    def inputs(direction: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        winners, grad = direction or present
        # What a kernel does not look at still has to be a tensor.
        lists = _listed(grad) if direction and skip_zeros else (own.lengths, own.lengths)
        return winners, grad, *lists

    grid = (len(block_items), triton.cdiv(dim, config.block_d))
    maxsim_gradient_kernel[grid](
        gradient, block_items, block_firsts, own.starts, own.lengths, own.row_weight,
        other.rows, other.starts, other.lengths, other.row_item, other.row_weight,
        *inputs(gather), *inputs(scatter),
        other.items, own.total, other.total, *present[1].stride(),
        D=dim, BLOCK_OWN=config.block_m, BLOCK_OTHER=config.block_n, BLOCK_D=config.block_d,
        GATHER=gather is not None, SCATTER=scatter is not None, LISTED=skip_zeros,
        PRECISION="tf32" if dtype == torch.float16 else float32_precision(dtype),
        **config.launch,
    )  # fmt: skip
    return gradient


def backward(
    images: TokenRows,
    texts: TokenRows,
    t2i: tuple[Tensor, Tensor] | None,
    i2t: tuple[Tensor, Tensor] | None,
    need_image: bool,
    need_text: bool,
    skip_zeros: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both sides' rows from (winners, dL/dS (images, texts)) of each direction.

    skip_zeros: many dL/dS are 0, so that it pays to look for the others first.
    """
    i2t_of_text = (i2t[0], i2t[1].T) if i2t else None
    t2i_of_text = (t2i[0], t2i[1].T) if t2i else None
    image_grad = _side_gradient(images, texts, i2t, t2i, skip_zeros) if need_image else None
    text_grad = (
        _side_gradient(texts, images, t2i_of_text, i2t_of_text, skip_zeros) if need_text else None
    )
    return image_grad, text_grad


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def _pointer_type(name: str) -> str | None:
    """What the kernel's parameter points at; None = it is a size or a stride."""
    if name in ("others", "own_grad"):
        return "tokens"
    if name.endswith("starts"):
        return "*i64"
    if name.endswith(("lengths", "items", "firsts", "list", "counts")):
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
            (512, True, False, False, precision),
            (512, False, True, False, precision),
            (512, True, True, False, precision),
            (512, True, True, True, precision),
            (1000, True, True, False, precision),
        ]
        if dtype == torch.float32:  # what torch.set_float32_matmul_precision("high") allows
            wanted.append((512, True, True, False, "tf32"))
        for dim, gather, scatter, listed, precision in wanted:
            config = _config(dtype)
            label = f"D={dim}" + " gather" * gather + " scatter" * scatter + " listed" * listed
            constexprs: dict[str, object] = dict(
                D=dim, BLOCK_OWN=config.block_m, BLOCK_OTHER=config.block_n,
                BLOCK_D=config.block_d, GATHER=gather, SCATTER=scatter, LISTED=listed,
                PRECISION=precision,
            )  # fmt: skip
            cases.append(
                matrix_case(
                    maxsim_gradient_kernel,
                    label,
                    dtype,
                    config,
                    constexprs,
                    _pointer_type,
                    has_product=scatter,
                )
            )
    return cases

"""The token similarity loss in Triton: two launches forward, one backward.

    similarity_kernel            lengths and cosine of each of some rows, from one reading of both
    loss_kernel                  the mean of (cosine - 1)^2, by one program: in a fixed order
    similarity_gradient_kernel   (v - c u) / |p| times dL/dc, and the same of the other side

With u = p / |p|, v = l / |l| and c = <u, v>. A single program that read all vectors itself would
wait longer for them than a launch takes.

Between the means of tokens and this loss lie a tower's own norm and projection, and they stay
PyTorch's. Its norm is one launch forward and two backward (of its input; of weight and bias), on
256 x 768 numbers; made in the kernel of the means it would save one each way. For that one program
would hold all channels of a box, so that 256 of them had to keep 132 multiprocessors busy where now
there are three times as many, and the op would take the norm's parameters past its module, whose
hooks are how FSDP gathers them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .tiles_triton import Config, tile_case

_UNSPECIALIZED = ["num_rows"]

_EPS = tl.constexpr(1e-12)

# Rows at once, and channels.
_CONFIG = Config(4, 0, 16 if INTERPRETED else 128, 4, num_stages=1)
# Cosines that the loss adds at once.
_LOSS_CONFIG = Config(4 if INTERPRETED else 1024, 0, 0, 4, num_stages=1)


@triton.jit
def _block(x, row, d, num_rows, D: tl.constexpr):
    given = (row < num_rows)[:, None] & (d < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(x + place, mask=given, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def similarity_kernel(
    pooled, local, rows, num_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows[:, n] = cosine, |pooled|, |local|. A zero vector has cosine 0 with everything."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    pooled_squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    local_squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        p = _block(pooled, row, d, num_rows, D)
        q = _block(local, row, d, num_rows, D)
        products = tl.fma(p, q, products)
        pooled_squares = tl.fma(p, p, pooled_squares)
        local_squares = tl.fma(q, q, local_squares)
    pooled_length = tl.sqrt(tl.sum(pooled_squares, axis=1))
    local_length = tl.sqrt(tl.sum(local_squares, axis=1))
    cosine = tl.sum(products, axis=1)
    # One after the other: the product of two small lengths is no number.
    cosine = cosine / tl.where(pooled_length < _EPS, _EPS, pooled_length)
    cosine = cosine / tl.where(local_length < _EPS, _EPS, local_length)
    inside = row < num_rows
    tl.store(rows + row, cosine, mask=inside)
    tl.store(rows + num_rows + row, pooled_length, mask=inside)
    tl.store(rows + 2 * num_rows + row, local_length, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def loss_kernel(rows, loss, num_rows, BLOCK_N: tl.constexpr):
    """The loss, from the cosines. Of no rows it is NaN."""
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, num_rows, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        gap = tl.load(rows + row, mask=row < num_rows, other=1.0) - 1.0
        squares = tl.fma(gap, gap, squares)
    tl.store(loss, tl.sum(squares, axis=0) / num_rows)


@triton.jit
def _through_length(x, other, along, length, factor):
    """factor * (other - along * x) / length, x and other of length one; 0 of a zero vector."""
    floored = tl.where(length < _EPS, _EPS, length)
    along = tl.where(length < _EPS, 0.0, along)
    gradient = (other - along[:, None] * x) * (factor / floored)[:, None]
    return tl.where((length == 0.0)[:, None], 0.0, gradient)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def similarity_gradient_kernel(
    upstream, pooled, local, rows, pooled_grad, local_grad, num_rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NEED_POOLED: tl.constexpr, NEED_LOCAL: tl.constexpr,
):  # fmt: skip
    """The gradients of some rows."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < num_rows
    cosine = tl.load(rows + row, mask=inside, other=0.0)
    pooled_length = tl.load(rows + num_rows + row, mask=inside, other=1.0)
    local_length = tl.load(rows + 2 * num_rows + row, mask=inside, other=1.0)
    factor = tl.load(upstream) * 2.0 * (cosine - 1.0) / num_rows
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        p = _block(pooled, row, d, num_rows, D)
        q = _block(local, row, d, num_rows, D)
        p = p / tl.where(pooled_length < _EPS, _EPS, pooled_length)[:, None]
        q = q / tl.where(local_length < _EPS, _EPS, local_length)[:, None]
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        given = inside[:, None] & (d < D)[None, :]
        if NEED_POOLED:
            gradient = _through_length(p, q, cosine, pooled_length, factor)
            tl.store(pooled_grad + place, gradient.to(pooled_grad.dtype.element_ty), mask=given)
        if NEED_LOCAL:
            gradient = _through_length(q, p, cosine, local_length, factor)
            tl.store(local_grad + place, gradient.to(local_grad.dtype.element_ty), mask=given)


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------

_BLOCKS = dict(BLOCK_N=_CONFIG.block_m, BLOCK_D=_CONFIG.block_d)


def forward(pooled: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and (3, N): cosine, |pooled|, |local|."""
    num_rows, dim = pooled.shape
    rows = pooled.new_empty((3, num_rows), dtype=torch.float32)
    if num_rows:
        similarity_kernel[(triton.cdiv(num_rows, _CONFIG.block_m),)](
            pooled.contiguous(), local.contiguous(), rows, num_rows,
            D=dim, **_BLOCKS, **_CONFIG.launch,
        )  # fmt: skip
    loss = rows.new_empty(())
    loss_kernel[(1,)](rows, loss, num_rows, BLOCK_N=_LOSS_CONFIG.block_m, **_LOSS_CONFIG.launch)
    return loss, rows


def backward(
    upstream: Tensor,
    pooled: Tensor,
    local: Tensor,
    rows: Tensor,
    need_pooled: bool,
    need_local: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (pooled, local); one that is not needed has no elements."""
    num_rows, dim = pooled.shape
    pooled_grad = pooled.new_empty(pooled.shape if need_pooled else 0)
    local_grad = local.new_empty(local.shape if need_local else 0)
    if num_rows:
        similarity_gradient_kernel[(triton.cdiv(num_rows, _CONFIG.block_m),)](
            upstream.contiguous(), pooled.contiguous(), local.contiguous(), rows,
            pooled_grad, local_grad, num_rows,
            D=dim, NEED_POOLED=need_pooled, NEED_LOCAL=need_local, **_BLOCKS, **_CONFIG.launch,
        )  # fmt: skip
    return pooled_grad, local_grad


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def _pointer_type(name: str) -> str | None:
    if name in _UNSPECIALIZED:
        return None
    return "*fp32" if name in ("rows", "upstream", "loss") else "tokens"


def compile_cases(arch: int) -> list[CompileCase]:
    """Each kernel on vectors in bfloat16, and in float32 of a width that no block divides."""
    needs = dict(NEED_POOLED=True, NEED_LOCAL=True)
    blocks: dict[str, object] = {"BLOCK_N": _LOSS_CONFIG.block_m}
    cases = [
        tile_case(loss_kernel, "mean", torch.float32, _LOSS_CONFIG, blocks, _pointer_type, False)
    ]
    for kernel, flags in ((similarity_kernel, {}), (similarity_gradient_kernel, needs)):
        for dtype, dim in ((torch.bfloat16, 512), (torch.float32, 500)):
            constexprs: dict[str, object] = {"D": dim, **_BLOCKS, **flags}
            cases.append(
                tile_case(kernel, f"D={dim}", dtype, _CONFIG, constexprs, _pointer_type, False)
            )
    return cases

"""The score losses in Triton: log-sum-exps in one pass, gradients written in another.

Every program owns a block of rows (log-sum-exp) or a tile (loss, gradient). Sums over a whole
matrix, for the loss, the scale and the bias, go through one partial sum a tile that PyTorch adds
up in a fixed order: no atomics, the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_cases import CompileCase
from .score_loss_torch import softmax_total
from .sigmoid_triton import sigmoid_loss_terms

_UNSPECIALIZED = ["num_rows", "num_columns", "row_stride", "column_stride", "captions_per_image"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def score_lse_kernel(
    scores, pair_mask, lse, scale_ptr, bias_ptr,
    num_rows, num_columns, row_stride, column_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row of the logits; of each column when the strides are exchanged."""
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_offset = r.to(tl.int64)[:, None] * row_stride
    top = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, num_columns, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (r < num_rows)[:, None] & (c < num_columns)[None, :]
        offset = row_offset + c.to(tl.int64)[None, :] * column_stride
        z = tl.load(scores + offset, mask=inside, other=0.0) * scale + bias
        if HAS_MASK:
            takes_part = tl.load(pair_mask + offset, mask=inside, other=0) != 0
            inside = inside & (takes_part | (r[:, None] == c[None, :]))
        z = tl.where(inside, z, float("-inf"))
        # A NaN makes the maximum or the sum NaN; -inf - -inf must not.
        new_top = tl.maximum(top, tl.max(z, axis=1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), axis=1)
        top = new_top
    tl.store(lse + r, top + tl.log(total), mask=r < num_rows)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def score_sigmoid_kernel(
    scores, pair_mask, partial_loss, scale_ptr, bias_ptr,
    num_rows, num_columns, captions_per_image,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """A tile's sum of -log sigmoid(y z)."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (r < num_rows) & (c < num_columns)
    offset = r.to(tl.int64) * num_columns + c
    z = tl.load(scores + offset, mask=inside, other=0.0) * tl.load(scale_ptr) + tl.load(bias_ptr)
    positive = r == c // captions_per_image
    if HAS_MASK:
        inside = inside & ((tl.load(pair_mask + offset, mask=inside, other=0) != 0) | positive)
    yz = tl.where(positive, z, -z)
    loss, _ = sigmoid_loss_terms(yz)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_loss + tile, tl.sum(tl.where(inside, loss, 0.0)))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def score_gradient_kernel(
    grad_ptr, scores, pair_mask, row_lse, column_lse, d_scores, partial_scale, partial_bias,
    scale_ptr, bias_ptr, divisor, filter_below,
    num_rows, num_columns, captions_per_image,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_MASK: tl.constexpr,
    SIGMOID: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """dL/dscores of a tile, and its sums of dL/dz * S and dL/dz, upstream gradient left out."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (r < num_rows) & (c < num_columns)
    offset = r.to(tl.int64) * num_columns + c
    scale = tl.load(scale_ptr)
    score = tl.load(scores + offset, mask=inside, other=0.0)
    z = score * scale + tl.load(bias_ptr)
    positive = r == c // captions_per_image
    takes_part = inside
    if HAS_MASK:
        takes_part = inside & ((tl.load(pair_mask + offset, mask=inside, other=0) != 0) | positive)
    if SIGMOID:
        yz = tl.where(positive, z, -z)
        _, miss = sigmoid_loss_terms(yz)
        d_z = tl.where(positive, -miss, miss)
    else:
        target = tl.where(positive, 1.0, 0.0)
        d_z = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        if ROWS:
            d_z += tl.exp(z - tl.load(row_lse + r, mask=r < num_rows, other=0.0)) - target
        if COLUMNS:
            d_z += tl.exp(z - tl.load(column_lse + c, mask=c < num_columns, other=0.0)) - target
    d_z = tl.where(takes_part, d_z / divisor, 0.0)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_scale + tile, tl.sum(d_z * score))
    tl.store(partial_bias + tile, tl.sum(d_z))
    if FILTER:
        d_z = tl.where(tl.abs(d_z) * num_columns < filter_below, 0.0, d_z)
    tl.store(d_scores + offset, d_z * (scale * tl.load(grad_ptr)), mask=inside)


# ---------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------

_BLOCK_R, _BLOCK_C, _WARPS = 16, 128, 4
# More than the gradient wants: without a limit ptxas aims at an occupancy, and spills to reach it.
_MOST_REGISTERS = 255


def _tiles(scores: Tensor) -> tuple[int, int]:
    return triton.cdiv(scores.shape[0], _BLOCK_R), triton.cdiv(scores.shape[1], _BLOCK_C)


def _lse(
    scores: Tensor, scale: Tensor, bias: Tensor, pair_mask: Tensor | None, axis: int
) -> Tensor:
    num_rows, num_columns = scores.shape[axis], scores.shape[1 - axis]
    lse = scores.new_empty(num_rows)
    if num_rows:
        score_lse_kernel[(triton.cdiv(num_rows, _BLOCK_R),)](
            scores, pair_mask, lse, scale, bias,
            num_rows, num_columns, scores.stride(axis), scores.stride(1 - axis),
            BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C, HAS_MASK=pair_mask is not None, num_warps=_WARPS,
        )  # fmt: skip
    return lse


def forward(
    row_scores: Tensor,
    column_scores: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    objective: str,
    captions_per_image: int,
) -> tuple[Tensor, Tensor, Tensor]:
    row_scores = row_scores.contiguous()
    columns = row_scores if column_scores is None else column_scores.contiguous()
    pair_mask = None if pair_mask is None else pair_mask.contiguous()
    num_images, num_texts = row_scores.shape
    if objective == "sigmoid":
        matrices = [row_scores] if column_scores is None else [row_scores, columns]
        total = row_scores.new_zeros(())
        for scores in matrices if row_scores.numel() else ():
            tiles = _tiles(scores)
            partial = scores.new_empty(tiles)
            score_sigmoid_kernel[tiles](
                scores, pair_mask, partial, scale, bias, num_images, num_texts, captions_per_image,
                BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C, HAS_MASK=pair_mask is not None,
                num_warps=_WARPS,
            )  # fmt: skip
            total += partial.sum()
        empty = row_scores.new_empty(0)
        return total / (len(matrices) * max(num_texts, 1)), empty, empty.clone()
    row_lse = _lse(row_scores, scale, bias, pair_mask, 0)
    column_lse = _lse(columns, scale, bias, pair_mask, 1)
    loss = softmax_total(row_scores, columns, row_lse, column_lse, scale, bias)
    return loss, row_lse, column_lse


def backward(
    grad: Tensor,
    row_scores: Tensor,
    column_scores: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    objective: str,
    captions_per_image: int,
    grad_filter_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    pair_mask = None if pair_mask is None else pair_mask.contiguous()
    sigmoid, one_matrix = objective == "sigmoid", column_scores is None
    num_images, num_texts = row_scores.shape
    gradients = []
    d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias)
    for scores, rows, columns in (
        (row_scores, True, one_matrix),
        (column_scores, False, True),
    ):
        if scores is None:
            gradients.append(row_scores.new_empty(0))
            continue
        scores = scores.contiguous()
        gradients.append(torch.empty_like(scores))
        if scores.numel() == 0:
            continue
        tiles = _tiles(scores)
        partial_scale, partial_bias = scores.new_empty(tiles), scores.new_empty(tiles)
        divisor = num_texts * (1 if one_matrix else 2) if sigmoid else 2 * num_images
        score_gradient_kernel[tiles](
            grad, scores, pair_mask, row_lse, column_lse, gradients[-1],
            partial_scale, partial_bias, scale, bias, float(divisor), float(grad_filter_eps),
            num_images, num_texts, captions_per_image,
            BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C, HAS_MASK=pair_mask is not None,
            SIGMOID=sigmoid, ROWS=rows, COLUMNS=columns, FILTER=grad_filter_eps > 0,
            num_warps=_WARPS, maxnreg=_MOST_REGISTERS,
        )  # fmt: skip
        d_scale += partial_scale.sum()
        d_bias += partial_bias.sum()
    return gradients[0], gradients[1], d_scale * grad, d_bias * grad


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------

_SCALARS = {"divisor": "fp32", "filter_below": "fp32"}


def _case(kernel, label: str, constexprs: dict) -> CompileCase:
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in _SCALARS or name in _UNSPECIALIZED:
            signature[name] = _SCALARS.get(name, "i32")
        else:
            signature[name] = "*i1" if name == "pair_mask" else "*fp32"
    return CompileCase(
        name=kernel.__name__,
        label=label,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=_WARPS,
        num_stages=3,
        maxnreg=_MOST_REGISTERS if kernel is score_gradient_kernel else None,
        uses_matrix_unit=False,
        aligned=frozenset(name for name, kind in signature.items() if kind.startswith("*")),
    )


def compile_cases(arch: int) -> list[CompileCase]:
    """Every kernel with its mask; without one it does less."""
    base = dict(BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C, HAS_MASK=True)
    cases = [_case(score_lse_kernel, "lse", base), _case(score_sigmoid_kernel, "sigmoid", base)]
    for sigmoid, rows, columns in (
        (True, True, False), (False, True, False), (False, False, True), (False, True, True),
    ):  # fmt: skip
        label = "sigmoid" if sigmoid else "softmax" + " rows" * rows + " columns" * columns
        flags = dict(SIGMOID=sigmoid, ROWS=rows, COLUMNS=columns, FILTER=True)
        cases.append(_case(score_gradient_kernel, label, {**base, **flags}))
    return cases

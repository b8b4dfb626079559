"""Contrastive losses of score matrices, as a custom operator.

    fastgoal::score_loss           (row scores, column scores) -> loss, row LSE, column LSE
    fastgoal::score_loss_backward  -> d row scores, d column scores, d scale, d bias

z = logit_scale * S + logit_bias. "softmax": half of [cross-entropy over the rows of the row scores
+ over the columns of the column scores], targets on the diagonal. "sigmoid": -sum log sigmoid(yz)
divided by the number of texts, averaged over the two matrices. The two are the same matrix when a
loss looks at one direction only. The definition is in `reference.py`.

A score matrix is small beside the tokens it came from, but a careless loss still makes a dozen
copies of it. Both engines read it twice: once for the log-sum-exps, once to write its gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .autograd_rules import register_first_derivative
from .context import on_device_of


def _engine(backend: str) -> ModuleType:
    if backend == "triton":
        from . import score_loss_triton

        return score_loss_triton
    from . import score_loss_torch

    return score_loss_torch


@torch.library.custom_op("fastgoal::score_loss", mutates_args=())
def score_loss(
    row_scores: Tensor,
    column_scores: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    objective: str,
    captions_per_image: int,
    grad_filter_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), row LSE (I,), column LSE (J,)); the LSEs are empty for the sigmoid objective.

    column_scores None: one matrix serves rows and columns. scale and bias are 0-dim tensors of the
    scores' dtype and device. grad_filter_eps only matters to the backward.
    """
    with on_device_of(row_scores):
        return _engine(backend).forward(
            row_scores, column_scores, scale, bias, pair_mask, objective, captions_per_image
        )


@score_loss.register_fake
def _(row_scores, column_scores, scale, bias, pair_mask, objective, captions, eps, backend):
    softmax = objective == "softmax"
    return (
        row_scores.new_empty(()),
        row_scores.new_empty(row_scores.shape[0] if softmax else 0),
        row_scores.new_empty(row_scores.shape[1] if softmax else 0),
    )


@torch.library.custom_op("fastgoal::score_loss_backward", mutates_args=())
def score_loss_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d row scores, d column scores, d scale, d bias); d column scores is empty for one matrix."""
    with on_device_of(row_scores):
        return _engine(backend).backward(
            grad, row_scores, column_scores, scale, bias, pair_mask, row_lse, column_lse,
            objective, captions_per_image, grad_filter_eps,
        )  # fmt: skip


@score_loss_backward.register_fake
def _(
    grad, row_scores, column_scores, scale, bias, pair_mask, row_lse, column_lse,
    objective, captions, eps, backend,
):  # fmt: skip
    return (
        torch.empty_like(row_scores, memory_format=torch.contiguous_format),
        row_scores.new_empty(0 if column_scores is None else row_scores.shape),
        scale.new_empty(()),
        bias.new_empty(()),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.objective, ctx.captions_per_image, ctx.grad_filter_eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1], output[2])


def _backward(ctx, grad, _row_lse_grad, _column_lse_grad):
    row_scores, column_scores, scale, bias, pair_mask, row_lse, column_lse = ctx.saved_tensors
    d_rows, d_columns, d_scale, d_bias = score_loss_backward(
        grad, row_scores, column_scores, scale, bias, pair_mask, row_lse, column_lse,
        ctx.objective, ctx.captions_per_image, ctx.grad_filter_eps, ctx.backend,
    )  # fmt: skip
    d_columns = None if column_scores is None else d_columns
    return d_rows, d_columns, d_scale, d_bias, None, None, None, None, None


register_first_derivative(score_loss, score_loss_backward, _backward, _setup_context)

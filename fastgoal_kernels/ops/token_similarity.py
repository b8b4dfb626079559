"""FAST-GOAL's token similarity loss, "diagonal", as custom operators, for the Triton engine.

    fastgoal::token_similarity            pooled, local -> loss, and three numbers of each row
    fastgoal::token_similarity_backward   the gradients of both, from those numbers

The definition is `reference.token_similarity_loss`. On other backends, and for "matrix", the loss
is plain PyTorch with every derivative (`functional.token_ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd_rules import register_first_derivative
from .context import on_device_of


@torch.library.custom_op("fastgoal::token_similarity", mutates_args=())
def token_similarity(pooled: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of (cosine - 1)^2 over the rows of two (N, D) tensors of one dtype, 0-dim float32.

    And (3, N) float32: the cosine of each row and the lengths of its two vectors.
    """
    from . import token_similarity_triton  # Triton exists on Linux only, and imports slowly

    with on_device_of(pooled):
        return token_similarity_triton.forward(pooled, local)


@token_similarity.register_fake
def _(pooled, local):
    rows = pooled.new_empty((3, pooled.shape[0]), dtype=torch.float32)
    return pooled.new_empty((), dtype=torch.float32), rows


@torch.library.custom_op("fastgoal::token_similarity_backward", mutates_args=())
def token_similarity_backward(
    upstream: Tensor,
    pooled: Tensor,
    local: Tensor,
    rows: Tensor,
    need_pooled: bool,
    need_local: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (pooled, local) in their dtype; one that is not needed has no elements."""
    from . import token_similarity_triton

    with on_device_of(pooled):
        return token_similarity_triton.backward(
            upstream, pooled, local, rows, need_pooled, need_local
        )


@token_similarity_backward.register_fake
def _(upstream, pooled, local, rows, need_pooled, need_local):
    return (
        pooled.new_empty(pooled.shape if need_pooled else 0),
        local.new_empty(local.shape if need_local else 0),
    )


def _setup_context(ctx, inputs, output):
    _, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, rows)


def _backward(ctx, upstream, _):
    if upstream is None:
        return None, None
    gradients = token_similarity_backward(upstream, *ctx.saved_tensors, *ctx.needs_input_grad)
    wanted = zip(gradients, ctx.needs_input_grad, strict=True)
    return tuple(gradient if need else None for gradient, need in wanted)


register_first_derivative(token_similarity, token_similarity_backward, _backward, _setup_context)

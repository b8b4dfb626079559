"""Soft cluster pooling as custom operators, for the Triton engine.

    fastgoal::cluster_pool            tokens, logits -> means, and the sums that they took
    fastgoal::cluster_pool_backward   makes the weights again from those, and then the gradients

The definition, `reference.soft_cluster_pool`, is vectorised and holds nothing large: it serves as
the torch backend, with every derivative PyTorch has. What the kernels save is its float32 copy of
the tokens, and the weights, which PyTorch writes and reads several times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd_rules import register_first_derivative
from .context import on_device_of


@torch.library.custom_op("fastgoal::cluster_pool", mutates_args=())
def cluster_pool(tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means (N, M, D) of tokens (N, L, D) weighted by the softmax of logits (N, L, M) over M.

    And, in float32: the largest logit of each token (N, L), its sum of exponentials relative to
    that (N, L), and the sum of each cluster's weights (N, M).
    """
    from . import cluster_pool_triton  # Triton exists on Linux only, and imports slowly

    with on_device_of(tokens):
        return cluster_pool_triton.forward(tokens, logits)


@cluster_pool.register_fake
def _(tokens, logits):
    batch, length, clusters = logits.shape
    return (
        tokens.new_empty((batch, clusters, tokens.shape[2])),
        tokens.new_empty((batch, length), dtype=torch.float32),
        tokens.new_empty((batch, length), dtype=torch.float32),
        tokens.new_empty((batch, clusters), dtype=torch.float32),
    )


@torch.library.custom_op("fastgoal::cluster_pool_backward", mutates_args=())
def cluster_pool_backward(
    upstream: Tensor,
    tokens: Tensor,
    logits: Tensor,
    tops: Tensor,
    totals: Tensor,
    masses: Tensor,
    need_tokens: bool,
    need_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of (tokens, logits) in their dtypes; one that is not needed has no elements."""
    from . import cluster_pool_triton

    with on_device_of(tokens):
        return cluster_pool_triton.backward(
            upstream, tokens, logits, tops, totals, masses, need_tokens, need_logits
        )


@cluster_pool_backward.register_fake
def _(upstream, tokens, logits, tops, totals, masses, need_tokens, need_logits):
    return (
        tokens.new_empty(tokens.shape if need_tokens else 0),
        logits.new_empty(logits.shape if need_logits else 0),
    )


def _setup_context(ctx, inputs, output):
    _, *sums = output
    ctx.mark_non_differentiable(*sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *sums)


def _backward(ctx, upstream, *_):
    if upstream is None:
        return None, None
    gradients = cluster_pool_backward(upstream, *ctx.saved_tensors, *ctx.needs_input_grad)
    wanted = zip(gradients, ctx.needs_input_grad, strict=True)
    return tuple(gradient if need else None for gradient, need in wanted)


register_first_derivative(cluster_pool, cluster_pool_backward, _backward, _setup_context)

"""Means of rectangles of tokens as custom operators, for the Triton engine.

    fastgoal::token_means            tokens, rectangles -> means
    fastgoal::token_means_backward   their gradient, each token's from the rectangles that hold it

A span of words is a rectangle in a grid one column wide. On other backends the means are sums of
`embedding_bag`, plain PyTorch with every derivative (`functional.token_ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd_rules import register_first_derivative
from .context import on_device_of


@torch.library.custom_op("fastgoal::token_means", mutates_args=())
def token_means(tokens: Tensor, item: Tensor, rectangles: Tensor, width: int) -> Tensor:
    """Means (M, D) of tokens (N, P, D), whose P rows are those of a grid `width` columns wide.

    Mean m is of item[m] (M,) int64 and of the cells rectangles[m] (M, 4) int64: first column, end
    column, first row, end row. Every one has a cell and lies inside; nobody looks.
    """
    from . import token_means_triton  # Triton exists on Linux only, and imports slowly

    with on_device_of(tokens):
        return token_means_triton.forward(tokens, item, rectangles, width)


@token_means.register_fake
def _(tokens, item, rectangles, width):
    return tokens.new_empty((item.shape[0], tokens.shape[2]))


@torch.library.custom_op("fastgoal::token_means_backward", mutates_args=())
def token_means_backward(
    upstream: Tensor, item: Tensor, rectangles: Tensor, width: int, num_items: int, num_rows: int
) -> Tensor:
    """The gradient of the tokens (num_items, num_rows, D), in the dtype of `upstream` (M, D)."""
    from . import token_means_triton

    with on_device_of(upstream):
        return token_means_triton.backward(upstream, item, rectangles, width, num_items, num_rows)


@token_means_backward.register_fake
def _(upstream, item, rectangles, width, num_items, num_rows):
    return upstream.new_empty((num_items, num_rows, upstream.shape[1]))


def _setup_context(ctx, inputs, output):
    tokens, item, rectangles, ctx.width = inputs
    ctx.sizes = tokens.shape[:2]  # the tokens themselves need not be kept
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(item, rectangles)


def _backward(ctx, upstream):
    if upstream is None or not ctx.needs_input_grad[0]:
        return (None,) * 4
    return token_means_backward(upstream, *ctx.saved_tensors, ctx.width, *ctx.sizes), *[None] * 3


register_first_derivative(token_means, token_means_backward, _backward, _setup_context)

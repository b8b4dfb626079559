"""Means of boxes and spans of tokens as custom operators: one autograd rule, two engines.

    fastgoal::token_means            tokens, boxes or spans -> means, and the rectangles they are of
    fastgoal::token_means_backward   their gradient, each token's from the rectangles that hold it

A span of words is a rectangle in a grid one column wide. The definitions are
`reference.region_mean` and `reference.span_mean`; the engines, `token_means_triton` and
`token_means_torch`, share their signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .autograd_rules import register_first_derivative
from .context import on_device_of


def _engine(backend: str) -> ModuleType:
    if backend == "triton":
        from . import token_means_triton  # Triton exists on Linux only, and imports slowly

        return token_means_triton
    from . import token_means_torch

    return token_means_torch


@torch.library.custom_op("fastgoal::token_means", mutates_args=())
def token_means(
    tokens: Tensor,
    item: Tensor | None,
    ranges: Tensor,
    sizes: Tensor | None,
    grid: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Means (M, D) of tokens (N, P, D), and the rectangles (M, 4) int32 that they are of.

    Range m lies in item[m], clamped to [0, N), or without `item` in item m. Ranges are either boxes
    (M, 4), with sizes (N, 2) of the images and, as `grid`, the patches' height and width and the
    model's side; or, without a grid, spans (M, 2), and `sizes` the lengths (N,) of the texts or
    None. A rectangle is first column, end column, first row, end row; each has a cell, and lies
    inside.
    """
    with on_device_of(tokens):
        return _engine(backend).forward(tokens, item, ranges, sizes, grid)


@token_means.register_fake
def _(tokens, item, ranges, sizes, grid, backend):
    count = ranges.shape[0]
    rectangles = tokens.new_empty((count, 4), dtype=torch.int32)
    return tokens.new_empty((count, tokens.shape[2])), rectangles


@torch.library.custom_op("fastgoal::token_means_backward", mutates_args=())
def token_means_backward(
    upstream: Tensor,
    item: Tensor | None,
    rectangles: Tensor,
    width: int,
    num_items: int,
    num_rows: int,
    backend: str,
) -> Tensor:
    """The gradient of the tokens (num_items, num_rows, D), in the dtype of `upstream` (M, D)."""
    with on_device_of(upstream):
        return _engine(backend).backward(upstream, item, rectangles, width, num_items, num_rows)


@token_means_backward.register_fake
def _(upstream, item, rectangles, width, num_items, num_rows, backend):
    return upstream.new_empty((num_items, num_rows, upstream.shape[1]))


def _setup_context(ctx, inputs, output):
    tokens, item, _, _, grid, ctx.backend = inputs
    _, rectangles = output
    ctx.width = grid[1] if grid else 1
    ctx.sizes = tokens.shape[:2]  # the tokens themselves need not be kept
    ctx.mark_non_differentiable(rectangles)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(item, rectangles)


def _backward(ctx, upstream, _):
    if upstream is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    gradient = token_means_backward(
        upstream, *ctx.saved_tensors, ctx.width, *ctx.sizes, ctx.backend
    )
    return gradient, *[None] * 5


register_first_derivative(token_means, token_means_backward, _backward, _setup_context)

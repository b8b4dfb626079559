"""Text-conditioned pooling scores as custom operators: cos(o_ij, t_j) of every wanted pair.

    fastgoal::text_conditioned_scores           (q, k, v, text, output projection) -> scores
    fastgoal::text_conditioned_scores_backward  dL/dscores -> the gradient of each of those

The operators begin after the input projection: an image's keys and values and a caption's query do
not depend on the pair, so they are made once, in plain differentiable PyTorch. What follows does
depend on it (attention weights, output projection, cosine) and is never held for all pairs.
The definition is `reference.text_conditioned_scores`.

The Triton engine keeps |o_ij| beside the scores for its backward, so that o is not made twice more;
the torch engine, whose backward makes o again anyway, leaves `norms` without elements.

Shapes: q (J, D), k and v (I, L, D), text (J, D) of unit length (or zero), out_weight (D, D),
out_bias (D,), image_mask (I, L) bool, text_index (I, P) int64 or None for every caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..reference import score_dtype
from .autograd_rules import register_first_derivative
from .context import on_device_of
from .text_conditioned_pool import Need, Pool


def _engine(backend: str) -> ModuleType:
    """Imported where it is used: Triton does not exist everywhere."""
    if backend == "triton":
        from . import text_conditioned_triton as engine
    else:
        from . import text_conditioned_torch as engine
    return engine


@torch.library.custom_op("fastgoal::text_conditioned_scores", mutates_args=())
def text_conditioned_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    image_mask: Tensor | None,
    text_index: Tensor | None,
    num_heads: int,
    add_zero_attn: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(scores, norms), each (I, J), or (I, P) of the captions that text_index names."""
    with on_device_of(q):
        pool = Pool(q, k, v, text, out_weight, out_bias, image_mask, num_heads, add_zero_attn)
        return _engine(backend).forward(pool, text_index)


@text_conditioned_scores.register_fake
def _(
    q, k, v, text, out_weight, out_bias, image_mask, text_index, num_heads, add_zero_attn, backend
):  # fmt: skip
    shape = (k.shape[0], q.shape[0] if text_index is None else text_index.shape[1])
    dtype = score_dtype(q.dtype)
    scores = q.new_empty(shape, dtype=dtype)
    return scores, q.new_empty(shape if backend == "triton" else 0, dtype=dtype)


@torch.library.custom_op("fastgoal::text_conditioned_scores_backward", mutates_args=())
def text_conditioned_scores_backward(
    grad: Tensor,
    scores: Tensor,
    norms: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    image_mask: Tensor | None,
    text_index: Tensor | None,
    num_heads: int,
    add_zero_attn: bool,
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, text, out_weight, out_bias; those not needed have no elements."""
    with on_device_of(q):
        pool = Pool(q, k, v, text, out_weight, out_bias, image_mask, num_heads, add_zero_attn)
        return _engine(backend).backward(pool, text_index, grad, scores, norms, Need(*need))


@text_conditioned_scores_backward.register_fake
def _(
    grad, scores, norms, q, k, v, text, out_weight, out_bias, image_mask, text_index,
    num_heads, add_zero_attn, backend, need,
):  # fmt: skip
    inputs = (q, k, v, text, out_weight, out_bias)
    return tuple(
        x.new_empty(x.shape if wanted else 0) for x, wanted in zip(inputs, need, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, num_heads, add_zero_attn, backend = inputs
    ctx.options = num_heads, add_zero_attn, backend
    scores, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(scores, norms, *tensors)


def _backward(ctx, grad, _):
    need = list(ctx.needs_input_grad[:6])
    gradients = text_conditioned_scores_backward(grad, *ctx.saved_tensors, *ctx.options, need)
    gradients = (g if wanted else None for g, wanted in zip(gradients, need, strict=True))
    return *gradients, None, None, None, None, None


register_first_derivative(
    text_conditioned_scores, text_conditioned_scores_backward, _backward, _setup_context
)

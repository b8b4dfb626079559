"""The text-conditioned sigmoid loss as one custom operator, for the torch backend.

    fastgoal::text_conditioned_loss           inputs -> sum of softplus(-y z), and its gradients
    fastgoal::text_conditioned_loss_backward  scales those gradients

The slope of a sigmoid term needs that term alone. So whatever a pair has to give to the gradients
is known while the pair is at hand, and the operator makes them in its one pass when they are
wanted: nothing is kept of a pair, and nothing is made twice.

The projection o = W a + b of a pair is wanted for two numbers only:

    <o, t> = <a, u> + c            with u = W't and c = <b, t>
    |o|^2  = <a, y> + <a, h> + e   with y = G a + h, G = W'W, h = W'b and e = |b|^2

y is W'o, and so what the gradient of |o| needs as well: one product of D x D forward and one
backward, where o itself would take two and two. The queries, and the layer norms' gains and shifts
in the weights of the keys and the values, are prepared outside, in plain differentiable PyTorch.
`text_conditioned_sigmoid_loss` in reference.py is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import text_conditioned_loss_torch as engine
from .autograd_rules import register_first_derivative
from .context import on_device_of

# Of the operator's arguments these come first, and may have gradients.
_DIFFERENTIABLE = 11


@torch.library.custom_op("fastgoal::text_conditioned_loss", mutates_args=())
def text_conditioned_loss(
    q: Tensor,
    tokens: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    text: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_mask: Tensor | None,
    text_index: Tensor | None,
    num_heads: int,
    add_zero_attn: bool,
    captions_per_image: int,
    need: Sequence[bool],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """The sum, then the gradient of each of the first 11 inputs; those not needed are empty.

    All of one dtype, float32 or float64: q (J, D), tokens (I, L, D) before their layer norm, text
    (J, D) of unit length (or zero), weights (D, D), biases (D,), scale and bias of the logits
    scalars. text_index as in `text_conditioned_scores`; captions_per_image 0: all pairs are
    negatives.
    """
    with on_device_of(q):
        inputs = engine.Inputs(
            q, tokens, k_weight, k_bias, v_weight, v_bias, text, out_weight, out_bias, scale, bias,
            image_mask, text_index, num_heads, add_zero_attn, captions_per_image,
        )  # fmt: skip
        return cast("Any", engine.loss_and_gradients(inputs, engine.Need(*need)))


@text_conditioned_loss.register_fake
def _(*arguments):
    *inputs, need = arguments
    shapes = [
        x.shape if wanted else 0 for x, wanted in zip(inputs[:_DIFFERENTIABLE], need, strict=True)
    ]
    scale = inputs[9]
    return scale.new_empty(()), *(scale.new_empty(shape) for shape in shapes)


# An operator of its own for a few multiplications, so that a second derivative is an error, where
# plain PyTorch would take the gradients for constants.
@torch.library.custom_op("fastgoal::text_conditioned_loss_backward", mutates_args=())
def text_conditioned_loss_backward(
    upstream: Tensor,
    q: Tensor,
    tokens: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    text: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """What the forward found for each of these, times the upstream gradient."""
    gradients = (
        q, tokens, k_weight, k_bias, v_weight, v_bias, text, out_weight, out_bias, scale, bias
    )  # fmt: skip
    return cast("Any", tuple(upstream * gradient for gradient in gradients))


@text_conditioned_loss_backward.register_fake
def _(upstream, *gradients):
    return tuple(torch.empty_like(gradient) for gradient in gradients)


def _setup_context(ctx, inputs, output) -> None:
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.given = len(inputs)
    ctx.save_for_backward(*gradients)


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * ctx.given
    scaled = text_conditioned_loss_backward(upstream, *ctx.saved_tensors)
    wanted = ctx.needs_input_grad[:_DIFFERENTIABLE]
    return (
        *(grad if want else None for grad, want in zip(scaled, wanted, strict=True)),
        *[None] * (ctx.given - _DIFFERENTIABLE),
    )


register_first_derivative(
    text_conditioned_loss, text_conditioned_loss_backward, _backward, _setup_context
)

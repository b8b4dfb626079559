"""Contrastive losses of plain features as custom operators: one schema each, two engines.

    fastgoal::softmax_loss            features -> loss, log-sum-exp of every row and column
    fastgoal::softmax_loss_backward   multiplies the logits again and turns them into gradients
    fastgoal::sigmoid_loss            features -> summed loss and, where wanted, the gradients
    fastgoal::sigmoid_loss_backward   scales those gradients

Nothing of size images x texts is ever held. The softmax needs whole rows and columns before its
first gradient, so it goes over the logits twice: four matrix products, where an eager loss that
keeps its logits needs three. A sigmoid term knows its gradient at once: three products, one pass.

Beyond inputs and gradients a call holds at most 16 bytes for each element of a side's features.
The engines, `feature_loss_triton` and `feature_loss_torch`, share their signatures. The definitions
are `reference.clip_contrastive_loss` and `reference.sigmoid_contrastive_loss`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .autograd_rules import register_first_derivative
from .context import on_device_of
from .features import Features


def _engine(backend: str) -> ModuleType:
    if backend == "triton":
        from . import feature_loss_triton  # Triton exists on Linux only, and imports slowly

        return feature_loss_triton
    from . import feature_loss_torch

    return feature_loss_torch


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


# ---------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------


@torch.library.custom_op("fastgoal::softmax_loss", mutates_args=())
def softmax_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pair_mask: Tensor | None,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row log-sum-exp, column log-sum-exp) of (M, D) images and (N, D) texts of one dtype.

    The target of row i is column i + target_offset. `both_ways`: half of [mean row cross-entropy +
    mean column cross-entropy], for M = N and no offset. Else the rows' alone, M <= N, and the
    column result has no elements: what one rank of several computes of its own rows. The
    log-sum-exps are for the same engine's backward, in the units it likes.
    """
    with on_device_of(image):
        return _engine(backend).softmax_forward(
            Features(image, normalize), Features(text, normalize), scale, pair_mask,
            label_smoothing, both_ways, target_offset,
        )  # fmt: skip


@softmax_loss.register_fake
def _(
    image, text, scale, pair_mask, label_smoothing, both_ways, target_offset, normalize, backend
):  # fmt: skip
    return (
        scale.new_empty(()),
        scale.new_empty(image.shape[0]),
        scale.new_empty(text.shape[0] if both_ways else 0),
    )


@torch.library.custom_op("fastgoal::softmax_loss_backward", mutates_args=())
def softmax_loss_backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pair_mask: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
    normalize: bool,
    backend: str,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (image, text, scale); one that is not needed has no elements.

    dL/dlogit is row softmax + column softmax - twice the target, over twice the batch.
    """
    with on_device_of(image):
        image_grad, text_grad, scale_grad = _engine(backend).softmax_backward(
            upstream, Features(image, normalize), Features(text, normalize), scale, pair_mask,
            row_lse, column_lse, label_smoothing, both_ways, target_offset,
            need_image, need_text, need_scale,
        )  # fmt: skip
    return _or_empty(image_grad, image), _or_empty(text_grad, text), _or_empty(scale_grad, scale)


@softmax_loss_backward.register_fake
def _(
    upstream, image, text, scale, pair_mask, row_lse, column_lse, label_smoothing, both_ways,
    target_offset, normalize, backend, need_image, need_text, need_scale,
):  # fmt: skip
    return (
        image.new_empty(image.shape if need_image else 0),
        text.new_empty(text.shape if need_text else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _softmax_setup_context(ctx, inputs, output):
    *tensors, label_smoothing, both_ways, target_offset, normalize, backend = inputs
    ctx.options = label_smoothing, both_ways, target_offset, normalize, backend
    _, row_lse, column_lse = output
    ctx.mark_non_differentiable(row_lse, column_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, row_lse, column_lse)


def _softmax_backward(ctx, upstream, *_):
    need_image, need_text, need_scale, *_ = ctx.needs_input_grad
    if upstream is None:
        return (None,) * 9
    image_grad, text_grad, scale_grad = softmax_loss_backward(
        upstream, *ctx.saved_tensors, *ctx.options, need_image, need_text, need_scale
    )
    return (
        image_grad if need_image else None,
        text_grad if need_text else None,
        scale_grad if need_scale else None,
        *[None] * 6,
    )


register_first_derivative(
    softmax_loss, softmax_loss_backward, _softmax_backward, _softmax_setup_context
)


# ---------------------------------------------------------------------------------------------
# Sigmoid
# ---------------------------------------------------------------------------------------------


@torch.library.custom_op("fastgoal::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    captions_per_image: int,
    normalize: bool,
    backend: str,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of softplus(-y z), its gradients by image, text, scale and bias, in float32).

    Of (M, D) images and (N, D) texts of one dtype; text j belongs to image floor(j / K), to none
    for K = 0. A gradient that is not needed has no elements and costs nothing.
    """
    with on_device_of(image):
        total, *gradients = _engine(backend).sigmoid(
            Features(image, normalize), Features(text, normalize), scale, bias, pair_mask,
            captions_per_image, need_image, need_text, need_scale, need_bias,
        )  # fmt: skip
    image_grad, text_grad, scale_grad, bias_grad = (_or_empty(g, scale) for g in gradients)
    return total, image_grad, text_grad, scale_grad, bias_grad


@sigmoid_loss.register_fake
def _(
    image, text, scale, bias, pair_mask, captions_per_image, normalize, backend,
    need_image, need_text, need_scale, need_bias,
):  # fmt: skip
    return (
        scale.new_empty(()),
        scale.new_empty(image.shape if need_image else 0),
        scale.new_empty(text.shape if need_text else 0),
        scale.new_empty(() if need_scale else 0),
        scale.new_empty(() if need_bias else 0),
    )


# An operator of its own for a few multiplications, because it has no autograd rule: a second
# derivative through it is an error, where plain PyTorch would take the gradients for constants.
@torch.library.custom_op("fastgoal::sigmoid_loss_backward", mutates_args=())
def sigmoid_loss_backward(
    upstream: Tensor,
    image_grad: Tensor,
    text_grad: Tensor,
    scale_grad: Tensor,
    bias_grad: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward found times the upstream gradient, the towers' in the features' dtype."""
    return (
        (upstream * image_grad).to(dtype),
        (upstream * text_grad).to(dtype),
        upstream * scale_grad,
        upstream * bias_grad,
    )


@sigmoid_loss_backward.register_fake
def _(upstream, image_grad, text_grad, scale_grad, bias_grad, dtype):
    return (
        torch.empty_like(image_grad, dtype=dtype),
        torch.empty_like(text_grad, dtype=dtype),
        torch.empty_like(scale_grad),
        torch.empty_like(bias_grad),
    )


def _sigmoid_setup_context(ctx, inputs, output):
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*gradients)


def _sigmoid_backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 12
    gradients = sigmoid_loss_backward(upstream, *ctx.saved_tensors, ctx.dtype)
    wanted = ctx.needs_input_grad[:4]
    return (
        *(grad if want else None for grad, want in zip(gradients, wanted, strict=True)),
        *[None] * 8,
    )


register_first_derivative(
    sigmoid_loss, sigmoid_loss_backward, _sigmoid_backward, _sigmoid_setup_context
)

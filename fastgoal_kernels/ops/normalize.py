"""L2 normalisation of tokens, as a custom operator that keeps nothing but its input.

y = x / max(|x|, 1e-12), norms in float32 whatever the input. A zero vector stays zero and gets no
gradient. Eager PyTorch keeps two float32 copies of half-precision tokens for its backward; this
keeps none and works a slab of rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import score_dtype
from .autograd_rules import register_first_derivative

_SLAB_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_EPS = 1e-12


def _slabs(x: Tensor) -> range:
    elements = _SLAB_ELEMENTS.get(x.device.type, _SLAB_ELEMENTS["cuda"])
    return range(0, x.shape[0], max(1, elements // max(x.shape[1], 1)))


def unit_rows(x: Tensor) -> Tensor:
    """(N, D) -> contiguous rows of unit length, in x's dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    slabs = _slabs(x)
    for first in slabs:
        part = x[first : first + slabs.step].to(score_dtype(x.dtype))
        norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        out[first : first + slabs.step] = part / norm.clamp_min_(_EPS)
    return out


def gradient_through_length(grad: Tensor, x: Tensor) -> Tensor:
    """dx = (g - y <y, g>) / |x| for rows x; below the floor of the norm, g / 1e-12; at zero, zero.

    `grad` is float32 (float64 for float64 x), and so is the result.
    """
    part = x.to(score_dtype(x.dtype))
    norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
    floored = norm.clamp_min(_EPS)
    unit = part / floored
    along = torch.where(norm >= _EPS, (unit * grad).sum(dim=1, keepdim=True), 0.0)
    return torch.where(norm > 0, (grad - unit * along) / floored, 0.0)


@torch.library.custom_op("fastgoal::l2_normalize", mutates_args=())
def l2_normalize(x: Tensor) -> Tensor:
    """Unit vectors along the last axis of x, in its dtype."""
    return unit_rows(x.reshape(-1, x.shape[-1])).view(x.shape)


@l2_normalize.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastgoal::l2_normalize_backward", mutates_args=())
def l2_normalize_backward(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dx in x's dtype."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    slabs = _slabs(rows)
    for first in slabs:
        part = slice(first, first + slabs.step)
        out[part] = gradient_through_length(grads[part].to(score_dtype(x.dtype)), rows[part])
    return out.view(x.shape)


@l2_normalize_backward.register_fake
def _(grad, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return l2_normalize_backward(grad, *ctx.saved_tensors)


register_first_derivative(l2_normalize, l2_normalize_backward, _backward, _setup_context)

"""MaxSim as a custom operator: one schema, one autograd rule, two engines.

    fastgoal::maxsim           tokens -> scores of one or both directions, and their winners
    fastgoal::maxsim_backward  dL/dscores and winners -> dL/dtokens

The engines, `maxsim_triton` and `maxsim_torch`, share their signatures and the layout of the
winners: (images, text rows) for text_to_image, (texts, image rows) for image_to_text, so that
ragged batches hold no padding. The definition is `reference.maxsim_scores`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..reference import score_dtype
from .autograd_rules import register_first_derivative
from .context import on_device_of
from .token_rows import TokenRows, token_rows, winner_dtype

# Winners that a backward which has to find them again holds at a time. What saving them all would
# have cost is what such a backward is asked to avoid.
_RECOMPUTED_BYTES = 4 << 20


def _engine(backend: str) -> ModuleType:
    if backend == "triton":
        from . import maxsim_triton  # Triton exists on Linux only, and imports slowly

        return maxsim_triton
    from . import maxsim_torch

    return maxsim_torch


def _rows(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_offsets: Tensor | None,
    text_offsets: Tensor | None,
    max_image_tokens: int,
    max_text_tokens: int,
    mean: bool,
) -> tuple[TokenRows, TokenRows]:
    images = token_rows(image_tokens, image_mask, image_offsets, max_image_tokens, mean)
    return images, token_rows(text_tokens, text_mask, text_offsets, max_text_tokens, mean)


def _items(tokens: Tensor, offsets: Tensor | None) -> int:
    return tokens.shape[0] if offsets is None else offsets.shape[0] - 1


def _total(tokens: Tensor) -> int:
    return tokens.shape[0] if tokens.ndim == 2 else tokens.shape[0] * tokens.shape[1]


@torch.library.custom_op("fastgoal::maxsim", mutates_args=())
def maxsim(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_offsets: Tensor | None,
    text_offsets: Tensor | None,
    max_image_tokens: int,
    max_text_tokens: int,
    direction: str,
    mean: bool,
    save_winners: bool,
    backend: str,
    skip_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t2i scores, i2t scores, t2i winners, i2t winners); what is not wanted has no elements.

    `max_*_tokens` bound the lengths; of padded tokens they are ignored. `skip_zeros` is for the
    backward: most gradients of the scores will be 0.
    """
    images, texts = _rows(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        max_image_tokens, max_text_tokens, mean,
    )  # fmt: skip
    with on_device_of(image_tokens):
        return _engine(backend).forward(images, texts, direction, save_winners)


@maxsim.register_fake
def _(
    image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
    max_image_tokens, max_text_tokens, direction, mean, save_winners, backend, skip_zeros=False,
):  # fmt: skip
    num_images, num_texts = _items(image_tokens, image_offsets), _items(text_tokens, text_offsets)
    longest_image = max_image_tokens if image_tokens.ndim == 2 else image_tokens.shape[1]
    longest_text = max_text_tokens if text_tokens.ndim == 2 else text_tokens.shape[1]
    t2i, i2t = direction != "image_to_text", direction != "text_to_image"
    scores = {"dtype": score_dtype(image_tokens.dtype)}
    new = image_tokens.new_empty
    return (
        new((num_images, num_texts) if t2i else 0, **scores),
        new((num_images, num_texts) if i2t else 0, **scores),
        new(
            (num_images, _total(text_tokens)) if t2i and save_winners else 0,
            dtype=winner_dtype(longest_image),
        ),
        new(
            (num_texts, _total(image_tokens)) if i2t and save_winners else 0,
            dtype=winner_dtype(longest_text),
        ),
    )


@torch.library.custom_op("fastgoal::maxsim_backward", mutates_args=())
def maxsim_backward(
    t2i_grad: Tensor | None,
    i2t_grad: Tensor | None,
    t2i_winners: Tensor,
    i2t_winners: Tensor,
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_offsets: Tensor | None,
    text_offsets: Tensor | None,
    max_image_tokens: int,
    max_text_tokens: int,
    mean: bool,
    need_image: bool,
    need_text: bool,
    backend: str,
    skip_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """(dL/d image_tokens, dL/d text_tokens); the one that is not needed has no elements.

    Winners without elements were not saved, and are found again.
    """
    images, texts = _rows(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        max_image_tokens, max_text_tokens, mean,
    )  # fmt: skip
    t2i_grad = None if t2i_grad is None else t2i_grad.contiguous()
    i2t_grad = None if i2t_grad is None else i2t_grad.contiguous()
    with on_device_of(image_tokens):
        if t2i_winners.numel() or i2t_winners.numel():
            image_grad, text_grad = _engine(backend).backward(
                images, texts,
                None if t2i_grad is None else (t2i_winners, t2i_grad),
                None if i2t_grad is None else (i2t_winners, i2t_grad),
                need_image, need_text, skip_zeros,
            )  # fmt: skip
        else:
            image_grad, text_grad = _backward_without_winners(
                images, texts, t2i_grad, i2t_grad, need_image, need_text, backend, skip_zeros
            )
    none = image_tokens.new_empty(0)
    return (
        none if image_grad is None else image_grad.view(image_tokens.shape),
        none.clone() if text_grad is None else text_grad.view(text_tokens.shape),
    )


def _backward_without_winners(
    images: TokenRows,
    texts: TokenRows,
    t2i_grad: Tensor | None,
    i2t_grad: Tensor | None,
    need_image: bool,
    need_text: bool,
    backend: str,
    skip_zeros: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Find the winners again, of a few items at a time, and forget them.

    The images' gradients take the images by and by, the texts' the texts: a sum that is left half
    done would have to wait in float32. So two more forwards if both are wanted, unless all winners
    fit at once. Of ragged tokens a CUDA device synchronises.
    """
    engine = _engine(backend)
    direction = "both"
    if t2i_grad is None or i2t_grad is None:
        direction = "image_to_text" if t2i_grad is None else "text_to_image"

    def backward(images, texts, t2i_grad, i2t_grad, need_image, need_text):
        _, _, t2i_winners, i2t_winners = engine.forward(images, texts, direction, True)
        return engine.backward(
            images, texts,
            None if t2i_grad is None else (t2i_winners, t2i_grad.contiguous()),
            None if i2t_grad is None else (i2t_winners, i2t_grad.contiguous()),
            need_image, need_text, skip_zeros,
        )  # fmt: skip

    def winner_bytes(images: TokenRows, texts: TokenRows) -> int:
        t2i = images.items * texts.total * winner_dtype(images.longest).itemsize
        i2t = texts.items * images.total * winner_dtype(texts.longest).itemsize
        return t2i * (t2i_grad is not None) + i2t * (i2t_grad is not None)

    total = winner_bytes(images, texts)
    if total <= _RECOMPUTED_BYTES:
        return backward(images, texts, t2i_grad, i2t_grad, need_image, need_text)

    def in_parts(own: TokenRows, axis: int) -> Tensor:
        step = max(1, own.items * _RECOMPUTED_BYTES // total)
        bounds, gradient = own.bounds(), torch.zeros_like(own.rows)
        for first in range(0, own.items, step):
            items = slice(first, min(first + step, own.items))
            rows = slice(bounds[items.start], bounds[items.stop])
            part = own.part(items, rows)
            t2i = None if t2i_grad is None else t2i_grad.narrow(axis, first, part.items)
            i2t = None if i2t_grad is None else i2t_grad.narrow(axis, first, part.items)
            if axis == 0:
                some, _ = backward(part, texts, t2i, i2t, True, False)
            else:
                _, some = backward(images, part, t2i, i2t, False, True)
            gradient[rows] = some
        return gradient

    return in_parts(images, 0) if need_image else None, in_parts(texts, 1) if need_text else None


@maxsim_backward.register_fake
def _(
    t2i_grad, i2t_grad, t2i_winners, i2t_winners, image_tokens, text_tokens,
    image_mask, text_mask, image_offsets, text_offsets, max_image_tokens, max_text_tokens,
    mean, need_image, need_text, backend, skip_zeros,
):  # fmt: skip
    return (
        image_tokens.new_empty(image_tokens.shape if need_image else 0),
        text_tokens.new_empty(text_tokens.shape if need_text else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.max_tokens = inputs[6:8]
    ctx.direction, ctx.mean, _, ctx.backend, ctx.skip_zeros = inputs[8:]
    ctx.save_for_backward(*inputs[:6], output[2], output[3])


def _backward(ctx, t2i_grad, i2t_grad, _t2i_winners_grad, _i2t_winners_grad):
    *tensors, t2i_winners, i2t_winners = ctx.saved_tensors
    need_image, need_text = ctx.needs_input_grad[:2]
    image_grad, text_grad = maxsim_backward(
        None if ctx.direction == "image_to_text" else t2i_grad,
        None if ctx.direction == "text_to_image" else i2t_grad,
        t2i_winners, i2t_winners, *tensors, *ctx.max_tokens, ctx.mean,
        need_image, need_text, ctx.backend, ctx.skip_zeros,
    )  # fmt: skip
    return (
        image_grad if need_image else None,
        text_grad if need_text else None,
        *(None,) * 11,
    )


register_first_derivative(maxsim, maxsim_backward, _backward, _setup_context)

"""Compile the Triton kernels of a training step before the first step needs them."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import check_choice
from .functional.contrastive import clip_contrastive_loss, sigmoid_contrastive_loss
from .functional.maxsim import DIRECTIONS, maxsim_contrastive_loss, maxsim_scores
from .functional.text_conditioned import text_conditioned_sigmoid_loss
from .functional.token_ops import region_mean, span_mean, token_similarity_loss
from .modules import TextConditionedPool

LOSSES = (
    "maxsim_contrastive_loss",
    "clip_contrastive_loss",
    "sigmoid_contrastive_loss",
    "text_conditioned_sigmoid_loss",
    "token_similarity_loss",
)
LAYOUTS = ("padded", "masked", "ragged")


def warmup(
    dim: int,
    *,
    losses: Iterable[str] = LOSSES[:1],
    dtype: torch.dtype = torch.bfloat16,
    directions: Iterable[str] = ("both",),
    text_layouts: Iterable[str] = LAYOUTS,
    objective: str = "softmax",
    max_image_tokens: int = 256,
    max_text_tokens: int = 256,
    grad_filter_eps: float | None = None,
    num_heads: int = 8,
    device: torch.device | str | None = None,
) -> float:
    """Run each loss and its backward, and the scores, once on two tiny pairs of each kind.

    Kernels are compiled for a dtype, a width and a layout, but not for a batch size or a caption's
    length, so two pairs compile what a training step will run. Triton keeps the result on disk:
    call this in one process before others start, or in each. On a device that Triton does not
    serve there is nothing to compile, and the call only checks its arguments.

    Args:
        dim: channels of a token, or of a feature.
        losses: any of "maxsim_contrastive_loss", "clip_contrastive_loss",
            "sigmoid_contrastive_loss", "text_conditioned_sigmoid_loss" (both kinds of negatives)
            and "token_similarity_loss" (with the means of regions and spans), as their options
            have them by default. The options below are MaxSim's, unless they say otherwise.
        dtype: of the tokens as the loss sees them (under autocast, its dtype).
        directions: any of "both", "text_to_image", "image_to_text".
        text_layouts: any of "padded", "masked", "ragged"; images are taken as padded.
        objective: "softmax" or "sigmoid".
        max_image_tokens, max_text_tokens: give the lengths you train with. The backward chooses
            its kernels by them, and up to 256 and up to 65,536 tokens winners are kept in one and
            two bytes, by kernels of their own.
        grad_filter_eps: give it if you train with it: skipping pairs has kernels of its own.
        num_heads: of the text-conditioned pool; must divide `dim`.
        device: default: the current CUDA device, or the CPU where there is none.

    Returns:
        Seconds spent.

    Raises:
        ValueError: an unknown loss, direction, layout or objective, a dim or a length below 1,
            heads that do not divide the dim.
    """
    losses, directions, text_layouts = tuple(losses), tuple(directions), tuple(text_layouts)
    for loss in losses:
        check_choice("losses", loss, LOSSES)
    for direction in directions:
        check_choice("directions", direction, DIRECTIONS)
    for layout in text_layouts:
        check_choice("text_layouts", layout, LAYOUTS)
    check_choice("objective", objective, ("softmax", "sigmoid"))
    for name, value in (
        ("dim", dim),
        ("max_image_tokens", max_image_tokens),
        ("max_text_tokens", max_text_tokens),
        ("num_heads", num_heads),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1; got {value!r}")
    if "text_conditioned_sigmoid_loss" in losses and dim % num_heads:
        raise ValueError(f"num_heads must divide dim; got {num_heads} heads for {dim}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)

    start = time.perf_counter()
    if device.type == "cuda":
        for layout in text_layouts if "maxsim_contrastive_loss" in losses else ():
            for direction in directions:
                _one_step(
                    dim, dtype, direction, layout, objective,
                    max_image_tokens, max_text_tokens, grad_filter_eps, device,
                )  # fmt: skip
        for loss in (clip_contrastive_loss, sigmoid_contrastive_loss):
            if loss.__name__ in losses:
                features = torch.ones(2, dim, dtype=dtype, device=device, requires_grad=True)
                scale = torch.ones((), device=device, requires_grad=True)
                loss(features, features, scale, scale).backward()
        if "text_conditioned_sigmoid_loss" in losses:
            _one_pooling_step(dim, num_heads, dtype, max_image_tokens, device)
        if "token_similarity_loss" in losses:
            _one_similarity_step(dim, dtype, device)
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _one_step(
    dim: int, dtype: torch.dtype, direction: str, layout: str, objective: str,
    max_image_tokens: int, max_text_tokens: int, grad_filter_eps: float | None,
    device: torch.device,
) -> None:  # fmt: skip
    def tokens(longest: int) -> Tensor:
        return torch.ones(2, longest, dim, dtype=dtype, device=device, requires_grad=True)

    image, text = tokens(max_image_tokens), tokens(max_text_tokens)
    text_options: dict = {}
    if layout == "masked":
        text_options["text_mask"] = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    elif layout == "ragged":
        text = text.detach().flatten(0, 1).requires_grad_()
        text_options["text_offsets"] = torch.arange(3, device=device) * max_text_tokens
        text_options["max_text_tokens"] = max_text_tokens
    scale = torch.ones((), device=device, requires_grad=True)
    loss = maxsim_contrastive_loss(
        image, text, scale, scale, direction=direction, objective=objective,
        grad_filter_eps=grad_filter_eps, **text_options,
    )  # fmt: skip
    loss.backward()
    with torch.no_grad():
        maxsim_scores(image, text, direction=direction, **text_options)  # type: ignore[call-overload]


def _one_pooling_step(
    dim: int, num_heads: int, dtype: torch.dtype, max_image_tokens: int, device: torch.device
) -> None:
    pool = TextConditionedPool(dim, num_heads).to(device)
    tokens = torch.ones(2, max_image_tokens, dim, dtype=dtype, device=device, requires_grad=True)
    texts = torch.ones(4, dim, dtype=dtype, device=device, requires_grad=True)
    scale = torch.ones((), device=device, requires_grad=True)
    for negatives in ("all", "sample"):
        text_conditioned_sigmoid_loss(
            pool, tokens, texts, scale, scale, captions_per_image=2, negatives=negatives
        ).backward()


def _one_similarity_step(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    tokens = torch.ones(2, 4, dim, dtype=dtype, device=device, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 2, device=device)
    sizes = torch.full((2, 2), 2, device=device)
    regions = region_mean(tokens, boxes, sizes, (2, 2), 2)
    spans = span_mean(tokens, torch.tensor([[0, 2]] * 2, device=device))
    token_similarity_loss(regions, spans).backward()

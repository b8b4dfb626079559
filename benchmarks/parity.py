"""Is it right, before it is timed: spot checks against the reference, and parity of every row.

The yardstick of a row is its own inputs multiplied in float32, one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastgoal_kernels import maxsim_contrastive_loss, reference
from fastgoal_kernels.backends import BackendError

from . import baselines
from .baselines import Scores
from .peers import Unavailable
from .workloads import LOGIT_SCALE, Inputs, Workload, float32_products, make_inputs

# Relative errors allowed before timing. Everyone multiplies the same rounded tokens and sums in
# float32, so what differs is the order of sums and the rounding of gradients to bf16 (2^-9), or to
# fp16 inside a peer. PyTorch's own products are rounded to the tokens' dtype before the maximum:
# in bf16 a few percent of the winners change, and each moves a whole token's gradient.
EXACT = {"scores": 2e-3, "loss": 2e-3, "gradients": 2e-2}
ROUNDED = {"scores": 2e-2, "loss": 2e-2, "gradients": 0.6}
# float32 tokens multiplied in bf16 (torch.set_float32_matmul_precision("medium") on a CPU): winners
# change as above, but sums and gradients stay float32.
BF16_PRODUCTS = {"scores": 5e-3, "loss": 5e-3, "gradients": 0.4}
# Above this at least one of the errors lies where products were rounded to less than float32.
FLOAT32 = 1e-5


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, infinite when anything is not finite."""
    value, truth = value.detach().double(), truth.detach().double()
    error = (value - truth).norm() / truth.norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def spot_check(backend: str, device: torch.device, layout: str) -> float:
    """Largest relative error of loss and gradients on a small odd shape, against float64."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    images = torch.randn(5, 33, 48, generator=generator).to(device).requires_grad_()
    texts = torch.randn(5, 19, 48, generator=generator).to(device).requires_grad_()
    lengths = torch.tensor([19, 1, 7, 0, 12], device=device)
    mask = torch.arange(19, device=device) < lengths[:, None]
    kwargs: dict[str, Any] = {"normalize": True, "direction": "both"}
    call, truth_kwargs = (images, texts), dict(kwargs)
    if layout != "full":
        kwargs["text_mask"] = truth_kwargs["text_mask"] = mask
    if layout == "packed":
        packed, offsets, longest = reference.pack_tokens(texts, mask)
        kwargs = {"normalize": True, "direction": "both", "text_offsets": offsets}
        call, kwargs["max_text_tokens"] = (images, packed), longest
    loss = maxsim_contrastive_loss(*call, 5.0, backend=backend, **kwargs)
    gradients = torch.autograd.grad(loss, (images, texts))
    wide = [tensor.detach().double().requires_grad_() for tensor in (images, texts)]
    truth = reference.maxsim_contrastive_loss(wide[0], wide[1], 5.0, **truth_kwargs)
    true_gradients = torch.autograd.grad(truth, wide)
    pairs = [(loss, truth), *zip(gradients, true_gradients, strict=True)]
    return max(relative_error(value, exact) for value, exact in pairs)


def try_check(name: str, error_of: Callable[[], float]) -> dict[str, Any]:
    """A spot check that goes on whatever happens, and says what did."""
    check: dict[str, Any] = {"name": name, "error": None, "reason": None}
    try:
        check["error"] = error_of()
        check["status"] = "ok" if check["error"] < 1e-4 else "wrong"
    except (BackendError, Unavailable) as error:
        check["status"], check["reason"] = "unavailable", str(error)
    except Exception as error:  # the sweep goes on and the result says what failed
        check["status"], check["reason"] = "failed", first_line(error)
    return check


def run_checks(device: torch.device) -> list[dict[str, Any]]:
    """The spot checks of both backends; a fuller proof is the test suite, run on this device."""
    return [
        try_check(f"{backend} {layout}", partial(spot_check, backend, device, layout))
        for backend in ("triton", "torch")
        for layout in ("full", "padded", "packed")
    ]


@lru_cache(maxsize=4)
def true_scores(work: Workload, device: torch.device) -> Scores:
    """Of the padded (or full) layout, with both directions, in float32."""
    inputs = make_inputs(work, device)
    captions = inputs.captions
    with torch.no_grad(), float32_products("highest"):
        return baselines.exact_scores(
            inputs.images, captions.tokens, ("text_to_image", "image_to_text"), captions.mask
        )


def truth_of(work: Workload, device: torch.device) -> tuple[Workload, Scores]:
    """The padded twin of a workload, and the directions it wants of its true scores."""
    layout = "padded" if work.layout == "packed" else work.layout
    twin = replace(work, layout=layout, stage="inference", direction="both", op="maxsim_scores")
    scores = true_scores(twin, device)
    return twin, {direction: scores[direction] for direction in work.directions}


@lru_cache(maxsize=16)
@float32_products("highest")
def true_gradients(work: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the loss, for the first image's and the first caption's tokens alone, in float32.

    They are enough to tell a right backward from a wrong one, and need no big tensor: an image
    meets only its own row of scores, a caption its own column.
    """
    twin, scores = truth_of(work, device)
    leaves = {direction: score.clone().requires_grad_() for direction, score in scores.items()}
    loss = baselines.filip_loss(leaves, LOGIT_SCALE)
    slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    inputs = make_inputs(twin, device)
    images, captions = inputs.images.float(), inputs.captions.tokens.float()
    mask = inputs.captions.mask
    image, caption = images[:1].requires_grad_(), captions[:1].clone().requires_grad_()
    row = baselines.exact_scores(image, captions, work.directions, mask)
    column = baselines.exact_scores(
        images.detach(), caption, work.directions, None if mask is None else mask[:1]
    )
    ways = work.directions
    row_sum = torch.stack([(row[way][0] * slopes[way][0]).sum() for way in ways]).sum()
    column_sum = torch.stack([(column[way][:, 0] * slopes[way][:, 0]).sum() for way in ways]).sum()
    (image_gradient,) = torch.autograd.grad(row_sum, image)
    (caption_gradient,) = torch.autograd.grad(column_sum, caption)
    return image_gradient[0], caption_gradient[0]


def measure(work: Workload, call: Callable[[Inputs], Any], inputs: Inputs) -> dict[str, float]:
    """Relative errors of what the contender computes on these inputs."""
    device = inputs.images.device
    _, scores = truth_of(work, device)
    result = call(inputs)
    if work.op == "maxsim_scores":
        return {"scores": max(relative_error(result[d], scores[d]) for d in work.directions)}
    errors = {"loss": relative_error(result, baselines.filip_loss(scores, LOGIT_SCALE))}
    if work.stage == "forward+backward":
        images, captions = torch.autograd.grad(result, inputs.leaves)
        image_truth, caption_truth = true_gradients(work, device)
        if inputs.captions.offsets is None:
            caption = captions[0]
        else:
            caption = captions[: int(inputs.captions.offsets[1])]
            caption_truth = caption_truth[: len(caption)]
        errors["gradients"] = max(
            relative_error(images[0], image_truth), relative_error(caption, caption_truth)
        )
    return errors

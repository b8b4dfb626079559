"""Are the losses of plain features right, before they are timed: spot checks, and every row.

The yardstick of a row is its own inputs multiplied in float32, some rows at a time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from fastgoal_kernels import clip_contrastive_loss, reference, sigmoid_contrastive_loss

from .feature_baselines import Exact, exact_clip_loss, exact_sigmoid_loss
from .feature_peers import CLIP, SIGMOID
from .feature_workloads import FeatureInputs, FeatureWorkload, Way, make_inputs
from .parity import relative_error, try_check
from .workloads import float32_products

Limits = dict[str, float]

# Relative errors allowed before timing; "parameters" are the gradients of scale and bias. In
# float32 on a CPU everyone multiplies in float32 as IEEE has it, and only the order of sums
# differs, at logits of up to 100.
IEEE: Limits = {"loss": 1e-4, "gradients": 1e-4, "parameters": 1e-4}
# Elsewhere float32 may be TF32 inside a peer, and bf16 features are multiplied exactly and summed
# in float32, but dL/dlogit and the gradients are rounded to bf16 (2^-9) on their way.
EXACT: Limits = {"loss": 2e-3, "gradients": 2e-2, "parameters": 2e-2}
# Logits that are themselves rounded to bf16 are off by up to 2^-9 of 40, and so is each softmax
# weight by 8 %, up or down; sums of many of them less. Losses are returned in bf16, too.
ROUNDED: Limits = {"loss": 2e-2, "gradients": 0.1, "parameters": 0.1}
# Who rounds logits to the dtype of the features.
ROUNDS = ("eager", "open_clip", "torch.compile", "siglip-kernel", "sentence-transformers")


def limits(contender: str, work: FeatureWorkload, device: torch.device) -> Limits:
    """What this contender's errors may be."""
    if work.dtype == "float32":
        return IEEE if device.type == "cpu" else EXACT
    return ROUNDED if contender.startswith(ROUNDS) else EXACT


@lru_cache(maxsize=64)  # a few MB each, and wanted again by every contender
@float32_products("highest")
def _exact(work: FeatureWorkload, device: torch.device) -> Exact:
    images, texts, scale, bias = make_inputs(work, device)
    if bias is None:
        return exact_clip_loss(images, texts, scale)
    return exact_sigmoid_loss(images, texts, scale, bias)


def measure(work: FeatureWorkload, way: Way, inputs: FeatureInputs) -> dict[str, float]:
    """Relative errors of what the contender computes on these inputs."""
    truth = _exact(replace(work, stage="inference"), inputs.images.device)
    loss = way.loss(*inputs)
    errors = {"loss": relative_error(loss, truth.loss)}
    if work.stage != "forward+backward":
        return errors
    images, texts, *parameters = torch.autograd.grad(loss, way.leaves(inputs))
    errors["gradients"] = max(
        relative_error(images[truth.sample], truth.images),
        relative_error(texts[truth.sample], truth.texts),
    )
    if parameters:
        errors["parameters"] = relative_error(torch.stack(parameters), truth.parameters)
    return errors


def spot_check(op: str, backend: str, device: torch.device) -> float:
    """Largest relative error of loss and gradients on a small odd shape, against float64."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    images, texts = (torch.randn(37, 48, generator=generator).to(device) for _ in range(2))
    mask = (torch.rand(37, 37, generator=generator) < 0.8).to(device)
    leaves = [images, texts, torch.tensor(5.0, device=device)]
    if op == SIGMOID:
        leaves.append(torch.tensor(-3.0, device=device))
    kwargs: dict[str, Any] = {"pair_mask": mask, "normalize": True}
    ours, exact = {
        CLIP: (clip_contrastive_loss, reference.clip_contrastive_loss),
        SIGMOID: (sigmoid_contrastive_loss, reference.sigmoid_contrastive_loss),
    }[op]
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = ours(*given, backend=backend, **kwargs)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    truth = exact(*wide, **kwargs)
    found = (loss, *torch.autograd.grad(loss, given))
    expected = (truth, *torch.autograd.grad(truth, wide))
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def run_checks(device: torch.device) -> list[dict[str, Any]]:
    """The spot checks of both backends; a fuller proof is the test suite, run on this device."""
    return [
        try_check(f"{backend} {op}", partial(spot_check, op, backend, device))
        for backend in ("triton", "torch")
        for op in (CLIP, SIGMOID)
    ]

"""Is the text-conditioned loss right, before it is timed: spot checks, and every row.

The yardstick of a row is its own inputs in float64, some images at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastgoal_kernels import TextConditionedPool, reference, text_conditioned_sigmoid_loss

from .parity import relative_error, try_check
from .pooling_baselines import Exact, exact_loss
from .pooling_workloads import ALL, SAMPLE, PoolingInputs, PoolingWorkload, Way, make_inputs

Limits = dict[str, float]

# Relative errors allowed before timing; "parameters" are the gradients of the scale, of the bias
# and of each of the pool's parameters. In float32 only the order of sums differs; a GPU's peers may
# use TF32 inside (2^-11).
IEEE: Limits = {"loss": 1e-5, "gradients": 1e-4, "parameters": 1e-4}
TF32: Limits = {"loss": 2e-3, "gradients": 2e-2, "parameters": 2e-2}
# In bf16 queries, keys, values, attention weights and what is pooled are each rounded (2^-9) on
# their way to the score, and as much again on the way back; gains and shifts sum what is left.
ROUNDED: Limits = {"loss": 5e-3, "gradients": 4e-2, "parameters": 0.2}


def limits(work: PoolingWorkload, device: torch.device) -> Limits:
    """What anyone's errors may be."""
    if work.dtype == "float32":
        return IEEE if device.type == "cpu" else TF32
    return ROUNDED


@lru_cache(maxsize=8)  # wanted again by every contender
def _exact(work: PoolingWorkload, device: torch.device) -> Exact:
    inputs = make_inputs(work, device)
    return exact_loss(*inputs[:5], work.captions_per_image, inputs.offsets)


def measure(work: PoolingWorkload, way: Way, inputs: PoolingInputs) -> dict[str, float]:
    """Relative errors of what the contender computes on these inputs."""
    truth = _exact(work, inputs.images.device)
    loss = way(inputs)
    images, texts, *parameters = torch.autograd.grad(loss, inputs.leaves)
    return {
        "loss": relative_error(loss, truth.loss),
        "gradients": max(relative_error(images, truth.images), relative_error(texts, truth.texts)),
        "parameters": parameter_error(parameters, truth.parameters),
    }


def parameter_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The worst of the parameters, as a share of its own gradient.

    But at least of a hundredth of the largest: what shifts all keys alike hardly moves a softmax,
    and its gradient is what is left when much larger terms have cancelled.
    """
    least = 0.01 * max(float(gradient.norm()) for gradient in truth)
    return max(
        relative_error(value, exact) * float(exact.norm()) / max(float(exact.norm()), least)
        for value, exact in zip(found, truth, strict=True)
    )


def spot_check(negatives: str, backend: str, device: torch.device) -> float:
    """Largest relative error of loss and gradients on a small odd shape, against float64."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    tokens = torch.randn(5, 19, 24, generator=generator).to(device)
    texts = torch.randn(15, 24, generator=generator).to(device)
    mask = (torch.rand(5, 19, generator=generator) < 0.7).to(device)
    mask[3] = False  # an image without a token
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pool = TextConditionedPool(24, 3).to(device)
    offsets = None
    if negatives == SAMPLE:
        offsets = torch.randint(3, (5, 4), generator=generator).to(device)
    leaves = (tokens, texts, torch.tensor(5.0, device=device), torch.tensor(-1.0, device=device))
    shared: dict[str, Any] = {
        "captions_per_image": 3, "negative_offsets": offsets, "image_mask": mask,
    }  # fmt: skip
    given = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = text_conditioned_sigmoid_loss(
        pool, *given, negatives=negatives, backend=backend, **shared
    )
    found = (loss, *torch.autograd.grad(loss, [*given, *pool.parameters()]))
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    wide_pool = TextConditionedPool(24, 3).to(device, torch.float64)
    wide_pool.load_state_dict(pool.state_dict())
    truth = reference.text_conditioned_sigmoid_loss(
        wide[0], wide[1], wide_pool.weights(), 3, wide[2], wide[3], **shared
    )
    expected = (truth, *torch.autograd.grad(truth, [*wide, *wide_pool.parameters()]))
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def run_checks(device: torch.device) -> list[dict[str, Any]]:
    """The spot checks of both backends; a fuller proof is the test suite, run on this device."""
    return [
        try_check(
            f"{backend} text_conditioned_sigmoid_loss {negatives}",
            partial(spot_check, negatives, backend, device),
        )
        for backend in ("triton", "torch")
        for negatives in (ALL, SAMPLE)
    ]

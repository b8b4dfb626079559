"""Are the token ops right, before they are timed: spot checks, and every row, against float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .parity import relative_error, try_check
from .token_workloads import (
    CLUSTERS,
    FARTHEST,
    SIMILARITY,
    TokenInputs,
    TokenWorkload,
    Way,
    build,
    make_inputs,
)

Limits = dict[str, float]

# Relative errors allowed before timing: in float32 only the order of sums differs. Choices are
# made in float32 from given points, whatever their dtype; a product may be one of TF32 (2^-11 of
# the squares of two points, between which these random ones lie).
IEEE: Limits = {"output": 1e-5, "gradients": 1e-4, "choices": 1e-5}
# Means and clusters are returned in bf16 (2^-9), and so are gradients, on their way and at its end.
ROUNDED: Limits = {"output": 1e-2, "gradients": 2e-2, "choices": 2e-3}


def limits(work: TokenWorkload, device: torch.device) -> Limits:
    """What anyone's errors may be."""
    return IEEE if work.dtype == "float32" and device.type == "cpu" else ROUNDED


def shortfall(points: Tensor, indices: Tensor) -> float:
    """How much closer than the farthest point a choice was, at worst, as a share of its distance.

    Each choice is judged by those made before it: between two points that are equally far but for
    rounding either is right, and decides what follows.
    """
    points = points.detach().double()
    batch = torch.arange(len(points), device=points.device)
    if (indices[:, 0] != 0).any():
        return float("inf")
    nearest = torch.full(points.shape[:2], torch.inf, dtype=points.dtype, device=points.device)
    worst = torch.zeros((), dtype=points.dtype, device=points.device)
    for before, chosen in zip(indices.T[:-1], indices.T[1:], strict=True):
        difference = points - points[batch, before][:, None]
        nearest = torch.minimum(nearest, difference.square().sum(dim=2))
        share = nearest[batch, chosen] / nearest.amax(dim=1)
        worst = torch.maximum(worst, (1 - share).max())
    return float(worst)


def measure(work: TokenWorkload, way: Way, inputs: TokenInputs) -> dict[str, float]:
    """Relative errors of what the contender computes on these inputs."""
    output, *gradients = way(inputs)
    if work.op == FARTHEST:
        return {"choices": shortfall(inputs.leaves[0], output)}
    wide = TokenInputs(
        tuple(leaf.detach().double().requires_grad_() for leaf in inputs.leaves),
        tuple(
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in inputs.others
        ),
    )
    true_output, *true_gradients = build("eager", work, wide)(wide)
    pairs = zip(gradients, true_gradients, strict=True)
    return {
        "output": relative_error(output, true_output),
        "gradients": max(relative_error(*pair) for pair in pairs),
    }


SMALL = {FARTHEST: (33, 17), SIMILARITY: (49, 19), CLUSTERS: (33, 5)}


def spot_check(op: str, backend: str, device: torch.device) -> float:
    """Largest error on a small odd shape."""
    stage = "inference" if op == FARTHEST else "forward+backward"
    work = TokenWorkload(op, stage, 5, *SMALL[op], 24, "float32")
    inputs = make_inputs(work, device)
    return max(measure(work, build(f"fastgoal {backend}", work, inputs), inputs).values())


def run_checks(device: torch.device) -> list[dict[str, Any]]:
    """The spot checks of both backends; a fuller proof is the test suite, run on this device."""
    return [
        try_check(f"{backend} {op}", partial(spot_check, op, backend, device))
        for backend in ("triton", "torch")
        for op in SMALL
    ]

"""Farthest point sampling as a custom operator, so that a graph holds one node, not one a sample.

    fastgoal::farthest_points  (points, num_samples, start, mask, backend) -> indices

No gradient: the output is indices. The definition is `reference.farthest_point_sampling`; the
engines are `farthest_points_triton`, the whole greedy loop in one launch, and
`farthest_points_torch`, one step on the whole batch after the other.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .context import on_device_of


def _engine(backend: str) -> ModuleType:
    if backend == "triton":
        from . import farthest_points_triton  # Triton exists on Linux only, and imports slowly

        return farthest_points_triton
    from . import farthest_points_torch

    return farthest_points_torch


@torch.library.custom_op("fastgoal::farthest_points", mutates_args=())
def farthest_points(
    points: Tensor, num_samples: int, start: int, mask: Tensor | None, backend: str
) -> Tensor:
    """(N, num_samples) int64 indices into points (N, L, D)."""
    with on_device_of(points):
        return _engine(backend).sample(points, num_samples, start, mask)


@farthest_points.register_fake
def _(points, num_samples, start, mask, backend):
    return points.new_empty((points.shape[0], num_samples), dtype=torch.long)

"""Farthest points in plain PyTorch: the greedy loop over the samples, each step on every set."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import score_dtype


def sample(points: Tensor, num_samples: int, start: int, mask: Tensor | None) -> Tensor:
    """(N, num_samples) int64 indices into points (N, L, D)."""
    wide = points.to(score_dtype(points.dtype))
    batch = torch.arange(len(wide), device=wide.device)
    indices = torch.full((len(wide), num_samples), start, dtype=torch.long, device=wide.device)
    taken = torch.zeros(wide.shape[:2], dtype=torch.bool, device=wide.device)
    if mask is not None:
        taken |= ~mask  # masked and taken points together: when they are all, none is left
    distance = torch.full(wide.shape[:2], torch.inf, dtype=wide.dtype, device=wide.device)
    difference = torch.empty_like(wide, memory_format=torch.contiguous_format)
    chosen = indices[:, 0]
    for number in range(1, num_samples):
        taken.scatter_(1, chosen[:, None], True)
        torch.sub(wide, wide[batch, chosen][:, None], out=difference)
        distance = torch.minimum(distance, difference.square_().sum(dim=2))
        candidate = distance if mask is None else distance.masked_fill(~mask, -1)
        chosen = torch.where(taken.all(dim=1), start, candidate.argmax(dim=1))
        indices[:, number] = chosen
    return indices

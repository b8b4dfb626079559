"""Long-CLIP's stretch of CLIP's text positions (arXiv 2403.15378), as FAST-GOAL uses it."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_POSITIONS = 20


def stretched_length(length: int) -> int:
    """The positions that `length` of them stretch to: 4 · length − 3 · 20, so 77 → 248."""
    return 4 * length - 3 * KEPT_POSITIONS


def stretch_positional_embedding(positions: Tensor, context_length: int = 248) -> Tensor:
    """Text positions (n, width) for a longer context: (context_length, width), in their own dtype.

    The first 20 positions, which short captions have trained well, are kept. Between each
    neighbouring pair of the others come three weighted means (¾–¼, ½–½, ¼–¾), and past the last one
    the line through the last pair goes on by 0, ¼, ½ and ¾ of its step. That gives 4n − 60 rows, of
    which the first `context_length` are returned. Positions that have that many rows already were
    stretched before and come back as they are.

    Raises ValueError when n is less than 22 (nothing to stretch), when `context_length` is less
    than n (that would cut positions, not stretch them), or more than 4n − 60.
    """
    if positions.ndim != 2 or not positions.is_floating_point():
        raise ValueError(
            f"positions must be a floating (positions, width) tensor; got {positions.dtype} of "
            f"shape {tuple(positions.shape)}"
        )
    length = len(positions)
    if context_length == length:
        return positions
    if length < KEPT_POSITIONS + 2:
        raise ValueError(
            f"a text tower with {length} positions can not be stretched: the first "
            f"{KEPT_POSITIONS} are kept and at least two more are needed"
        )
    if not length < context_length <= stretched_length(length):
        raise ValueError(
            f"context_length must be {length} (as it is) to {stretched_length(length)} "
            f"(4 * {length} - {3 * KEPT_POSITIONS}); got {context_length}"
        )
    # Half precision would round the weighted means of rows that it can still hold itself.
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    kept, moved = wide[:KEPT_POSITIONS], wide[KEPT_POSITIONS:]
    steps = moved.diff(dim=0)
    steps = torch.cat([steps, steps[-1:]])  # the last position goes on as it came
    quarters = torch.arange(4, dtype=wide.dtype, device=wide.device)[None, :, None] / 4
    stretched = (moved[:, None] + quarters * steps[:, None]).flatten(0, 1)
    return torch.cat([kept, stretched])[:context_length].to(positions.dtype)

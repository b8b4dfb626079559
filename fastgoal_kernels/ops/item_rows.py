"""Batches of token rows as the Triton kernels read them: rows of D elements without gaps."""

from __future__ import annotations

from torch import Tensor


def item_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (N, L, D) as rows without gaps, and how many rows lie from one item to the next.

    Tokens behind a CLS token, `tokens[:, 1:]`, are such rows already; so is an expanded batch.
    Only other layouts are copied. A kernel that knows D also knows how its rows are aligned, which
    it would not of a stride.
    """
    dim = max(x.shape[2], 1)
    if x.stride(2) != 1 or x.stride(1) != dim or x.stride(0) % dim:
        x = x.contiguous()
        return x, x.shape[1]
    return x, x.stride(0) // dim

"""Matrix products whose result is as wide as their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import score_dtype

# mm(out_dtype=...) came with torch 2.8, for NVIDIA only. Elsewhere half-precision factors are
# widened, which gives the same sums.
_HALF_PRODUCT_TO_FLOAT = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, two matrices of one dtype, in float32 (float64 for float64)."""
    half = a.dtype in (torch.float16, torch.bfloat16)
    if half and a.device.type == "cuda" and _HALF_PRODUCT_TO_FLOAT:
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = score_dtype(a.dtype)
    return a.to(dtype) @ b.to(dtype)

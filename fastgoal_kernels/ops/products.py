"""Matrix products whose result is as wide as their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import score_dtype

# mm(out_dtype=...) came with torch 2.8, for NVIDIA only. Elsewhere half-precision factors are
# widened, which gives the same sums.
_HALF_PRODUCT_TO_FLOAT = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed, and returned, in float32 (float64 for float64).

    Beside a half-precision b, a may be float32: it is rounded to b's dtype only where the product
    runs in it.
    """
    half = b.dtype in (torch.float16, torch.bfloat16)
    if half and b.device.type == "cuda" and _HALF_PRODUCT_TO_FLOAT:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    dtype = score_dtype(b.dtype)
    return a.to(dtype) @ b.to(dtype)

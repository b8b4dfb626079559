"""Matrix products whose result is as wide as their sums."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..reference import score_dtype

# mm(out_dtype=...) came with torch 2.8, for NVIDIA only. Elsewhere half-precision factors are
# widened, which gives the same sums.
_HALF_PRODUCT_TO_FLOAT = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None

# On x86 oneDNN multiplies tiles of these sizes 20 to 50 % faster than the BLAS behind mm (AMD EPYC
# with AVX-512, torch 2.15), and takes a factor in its own layout. PyTorch offers it as the
# operators that torch.compile emits.
_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
# Multiplications in a product from which on it is worth its start-up.
_ONEDNN_WORK = 1 << 20


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias summed, and returned, in float32 (float64 for float64).

    Beside a half-precision b, a may be float32: it is rounded to b's dtype only where the product
    runs in it.
    """
    half = b.dtype in (torch.float16, torch.bfloat16)
    if half and b.device.type == "cuda" and _HALF_PRODUCT_TO_FLOAT:
        product = torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    dtype = score_dtype(b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if _suits_onednn(a, b):
        return _onednn_product(a, b, bias)
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    # It copies a transposed first factor, and gains nothing where its start-up is all the work.
    return (
        _ONEDNN
        and a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.ndim == b.ndim == 2
        and a.is_contiguous()
        and a.shape[0] * a.shape[1] * b.shape[1] >= _ONEDNN_WORK
    )


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


def sum_of_products(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, in place; the product alone for None. Sums as in `wide_product`."""
    if total is None:
        return wide_product(a, b)
    if b.dtype == total.dtype == a.dtype:
        if _suits_onednn(a, b):
            return total.add_(_onednn_product(a, b))
        return total.addmm_(a, b)
    if _adds_to_float(total.device, b.dtype):
        return torch.addmm(total, a.to(b.dtype), b, out_dtype=torch.float32, out=total)
    return total.add_(wide_product(a, b))


@lru_cache
def _adds_to_float(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a half-precision product can be added to float32 sums as it leaves the chip.

    Releases of PyTorch differ in what they let addmm(out_dtype=...) add to, so it is tried.
    """
    if device.type != "cuda" or not _HALF_PRODUCT_TO_FLOAT:
        return False
    factor = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


class RepeatedFactor:
    """Rows (n, D) that many others are multiplied with; laid out for it once, on a CPU.

    float32 and bfloat16 rows are multiplied by the CPU's bfloat16 instructions, where it has them,
    if torch.set_float32_matmul_precision("medium") allows it: the products are then rounded to
    bfloat16. Otherwise they are IEEE float32.
    """

    def __init__(self, rows: Tensor, typical_others: int):
        """`typical_others`: about how many rows come at a time."""
        self.rows = rows
        self.dtype = score_dtype(rows.dtype)
        self.onednn = _ONEDNN and rows.device.type == "cpu" and self.dtype == torch.float32
        if self.onednn:
            if rows.dtype != torch.float16 and _bfloat16_products_allowed():
                self.dtype = torch.bfloat16
            self.rows = torch.ops.mkldnn._reorder_linear_weight(
                rows.to(self.dtype).contiguous(), typical_others
            )

    def times(self, others: Tensor) -> Tensor:
        """(m, n) = others (m, D) @ rows.T in float32 (float64 for float64)."""
        if not self.onednn:
            return wide_product(others, self.rows.T)
        others = others.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(others, self.rows, None, "none", [], "").float()


def _bfloat16_products_allowed() -> bool:
    allowed = torch.get_float32_matmul_precision() == "medium"
    return allowed and torch.ops.mkldnn._is_mkldnn_bf16_supported()

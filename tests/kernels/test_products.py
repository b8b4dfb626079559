"""Products as wide as their sums, and what the caller may allow them to lose."""

from __future__ import annotations

import pytest
import torch

from fastgoal_kernels import maxsim_scores
from fastgoal_kernels.ops import products
from fastgoal_kernels.ops.products import RepeatedFactor, wide_product

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(77, 196, 512), (1, 1, 1), (5, 3, 17), (130, 40, 1000)])
def test_sums_are_wide_whatever_the_factors_are(device, dtype, shape):
    m, n, dim = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(k, dim, generator=generator).to(device, dtype) for k in (m, n))
    want = a.double() @ b.double().T
    factor = RepeatedFactor(b, typical_others=64)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for out in (wide_product(a, b.T), factor.times(a), factor.times(a)):
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(out, want) <= tolerance


@pytest.mark.skipif(not products._ONEDNN, reason="oneDNN is not in this build")
@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_bfloat16_products_only_where_the_caller_allows_them(allowed):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(k, 256, generator=generator) for k in (50, 60))
    torch.set_float32_matmul_precision(allowed)  # put back by the fixture of all tests
    lost = error(RepeatedFactor(b, 50).times(a), a.double() @ b.double().T)
    if allowed == "medium" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # Each factor and the result are rounded: three times 2^-9, less what averages out.
        assert 1e-4 < lost < 3 * 2**-9
    else:
        assert lost <= 1e-6


def test_scores_under_medium_precision_stay_near():
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randn(4, k, 64, generator=generator) for k in (20, 9))
    want = maxsim_scores(image.double(), text.double(), direction="both")
    torch.set_float32_matmul_precision("medium")
    scores = maxsim_scores(image, text, direction="both", backend="torch")
    for out, expected in zip(scores, want, strict=True):
        assert error(out, expected) < 3 * 2**-9

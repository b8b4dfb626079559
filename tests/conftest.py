"""What every test shares: a quiet, repeatable hypothesis and IEEE float32 products."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples are derived from the test alone, so that a red run is red again.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them press.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _ieee_products():
    """Parity is argued for IEEE float32; TF32 has tests of its own where it matters."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter calls a reduction's own combine function once an element, in Python. NumPy's
    # maximum is the same function (NaN wins), a thousand times faster.
    from triton.runtime.interpreter import ReduceOps

    from fastgoal_kernels.ops.tiles_triton import nan_max

    _apply = ReduceOps.apply_impl

    def _apply_fast(self, input):
        if self.combine_fn is nan_max:
            return self.min_max(input[0], val_reduce_op=np.max)
        return _apply(self, input)

    ReduceOps.apply_impl = _apply_fast


def pytest_report_header(config) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, {device}" + (", Triton interpreted" * interpreted)

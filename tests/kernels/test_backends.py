"""Which backend serves a call: the argument, use_backend, the device, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgoal_kernels import (
    BackendError,
    available_backends,
    backends,
    explain_backend,
    maxsim_scores,
    use_backend,
)

pytestmark = pytest.mark.skipif(
    backends.INTERPRETED, reason="the interpreter serves tensors on any device"
)

V, T = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
OPS = sorted(backends.TRITON_OPS)


def test_a_backend_that_can_not_serve_is_refused_never_replaced():
    with pytest.raises(BackendError, match=r"'triton' was asked for, but .* not on a CUDA device"):
        maxsim_scores(V, T, backend="triton")
    with use_backend("triton"), pytest.raises(BackendError, match="triton"):
        maxsim_scores(V, T)
    with use_backend("reference"):
        assert maxsim_scores(V, T).shape == (2, 2)


def test_use_backend_nests_and_ends():
    with use_backend("reference"):
        with use_backend("torch"):
            assert explain_backend("maxsim_scores", V) == "torch: use_backend asks for it"
        assert explain_backend("maxsim_scores", V) == "reference: use_backend asks for it"
    assert explain_backend("maxsim_scores", V).startswith("torch: the tensors are on cpu")
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


@pytest.fixture
def pretend(monkeypatch):
    """A machine with one GPU of this compute capability, and a tensor there without data."""

    def machine(capability: tuple[int, int], hip: str | None = None, dtype=torch.float32):
        monkeypatch.setattr(backends, "_HAS_TRITON", True)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        with monkeypatch.context() as before, FakeTensorMode():
            before.setattr(torch.cuda, "is_available", lambda: False)  # nothing to initialise
            return torch.empty(2, 3, device="cuda:0", dtype=dtype)

    return machine


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_kernels_serve_ampere_and_newer(pretend, op, capability):
    tensor = pretend(capability)
    assert explain_backend(op, tensor, tensor).startswith("triton: ")
    assert available_backends()[op] == ("triton", "torch", "reference")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 0), None, "need sm_80 or newer, and cuda:0 is sm_70"),
        ((7, 5), None, "need sm_80 or newer, and cuda:0 is sm_75"),
        ((9, 4), "6.4", "are for NVIDIA GPUs, and PyTorch is built for AMD's"),
    ],
)
def test_other_gpus_get_the_torch_backend(pretend, op, capability, hip, reason):
    tensor = pretend(capability, hip)
    assert explain_backend(op, tensor) == f"torch: the Triton kernels {reason}"
    assert available_backends()[op] == ("torch", "reference")
    with pytest.raises(BackendError, match=f"^{op}: backend 'triton' was asked for, .*{reason}"):
        backends.choose_backend(op, "triton", tensor)


def test_float64_gets_the_torch_backend(pretend):
    tensor = pretend((9, 0), dtype=torch.float64)
    assert explain_backend("maxsim_scores", tensor).startswith("torch: the Triton kernels do not")

"""What is asked of a device before work is given to it."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from fastgoal_models.devices import (
    bfloat16_by_default,
    has_bfloat16,
    parse_device,
    warn_of_emulated_bfloat16,
)
from fastgoal_models.errors import ConfigError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with bfloat16 of its own, or without, which PyTorch emulates."""

    def with_bfloat16(own):
        def supported(including_emulation=True):
            return own or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    return with_bfloat16


@pytest.mark.parametrize("own", [True, False])
def test_emulated_bfloat16_is_not_the_gpus_own(gpu, own):
    gpu(own)
    assert has_bfloat16(CUDA) is own
    assert bfloat16_by_default(CUDA) is own
    assert bool(warning(CUDA)) is not own


@pytest.mark.parametrize("own", [True, False])
def test_a_cpu_keeps_to_float32_unless_asked(monkeypatch, own):
    monkeypatch.setattr("fastgoal_models.devices.has_bfloat16", lambda device: own)
    assert not bfloat16_by_default(CPU)
    assert ("cpu" in warning(CPU) and "Fix: leave it out" in warning(CPU)) is not own


def test_the_cpu_here_is_asked():
    expected = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert has_bfloat16(CPU) is expected


def test_of_other_devices_nothing_is_known_and_nothing_said():
    assert not bfloat16_by_default(MPS)
    assert warning(MPS) == ""


def test_a_device_that_is_not_here_is_refused_by_name():
    with pytest.raises(ConfigError, match="'cuda:99' can not be used here"):
        parse_device("cuda:99")
    with pytest.raises(ConfigError, match="'gpu' can not be used here"):
        parse_device("gpu")


def warning(device):
    written = io.StringIO()
    warn_of_emulated_bfloat16(Console(file=written, width=500), device)
    return written.getvalue()

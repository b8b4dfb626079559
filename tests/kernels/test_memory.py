"""What the Triton engine holds beside inputs and gradients, counted without running a kernel.

All memory of a kernel is allocated by its launcher, so launchers that start nothing allocate what a
GPU would have to hold. The bounds are the library's promise: winners and little else.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks.measure import measure_memory
from fastgoal_kernels.backends import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has tiles of its own")

MB = 1 << 20
ITEMS, WORDS, REGIONS = 1024, 77, 196


class Nothing:
    """In a kernel's place: takes any launch and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _h200_without_kernels(monkeypatch):
    """The launchers as on an H200, and nothing that they start."""
    from triton.runtime.jit import KernelInterface

    from benchmarks.compile_report import kernel_modules
    from fastgoal_kernels.ops import feature_loss_triton, maxsim_forward_triton

    for name in kernel_modules():
        module = importlib.import_module(name)
        for attribute, value in list(vars(module).items()):
            if isinstance(value, KernelInterface):
                monkeypatch.setattr(module, attribute, Nothing())
    monkeypatch.setattr(maxsim_forward_triton, "_programs", lambda device: 2 * 132)
    for module in (maxsim_forward_triton, feature_loss_triton):
        monkeypatch.setattr(module, "architecture", lambda device: 90)


def training_step(direction: str, recompute: bool) -> tuple[torch.Tensor, ...]:
    """The operators of one loss and its backward, as autograd calls them; returns the gradients."""
    from fastgoal_kernels.ops.maxsim import maxsim, maxsim_backward
    from fastgoal_kernels.ops.score_loss import score_loss, score_loss_backward

    image = torch.zeros(ITEMS, REGIONS, 1, dtype=torch.bfloat16)
    text = torch.zeros(ITEMS, WORDS, 1, dtype=torch.bfloat16)
    scale, bias = torch.ones(()), torch.zeros(())
    tokens = image, text, None, None, None, None, REGIONS, WORDS
    t2i, i2t, *winners = maxsim(*tokens, direction, True, not recompute, "triton")
    both = direction == "both"
    scores = (i2t, t2i) if both else (t2i, None)
    _, *lses = score_loss(*scores, scale, bias, None, "softmax", 1, 0.0, "triton")
    d_rows, d_columns, *_ = score_loss_backward(
        torch.ones(()), *scores, scale, bias, None, *lses, "softmax", 1, 0.0, "triton"
    )
    d_scores = (d_columns, d_rows) if both else (d_rows, None)
    return maxsim_backward(*d_scores, *winners, *tokens, True, True, True, "triton", False)


@pytest.mark.parametrize(
    ("direction", "winner_bytes", "score_bytes"),
    [("text_to_image", WORDS, 8), ("both", WORDS + REGIONS, 16)],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_holds_the_winners_and_little_else(
    direction, winner_bytes, score_bytes, recompute
):
    """Inputs are made inside the call, and are a few hundred kilobytes: there is one channel."""
    extra = measure_memory(lambda: training_step(direction, recompute), torch.device("cpu"))
    pairs = ITEMS * ITEMS
    if recompute:
        assert extra <= pairs * 16 + 32 * MB
    else:
        assert pairs * winner_bytes < extra <= pairs * (winner_bytes + score_bytes) + 32 * MB


def test_scores_without_gradients_hold_no_winners():
    from fastgoal_kernels.ops.maxsim import maxsim

    image, text = torch.zeros(ITEMS, REGIONS, 1), torch.zeros(ITEMS, WORDS, 1)
    tokens = image, text, None, None, None, None, REGIONS, WORDS
    extra = measure_memory(
        lambda: maxsim(*tokens, "both", True, False, "triton")[:2], torch.device("cpu")
    )
    assert extra <= 32 * MB


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["softmax", "sigmoid"])
@pytest.mark.parametrize("batch", [2048, 5000])
def test_a_loss_of_features_holds_16_bytes_an_element(op, dtype, normalize, batch, monkeypatch):
    """Beyond inputs and gradients, forward and backward; nothing of batch squared."""
    from fastgoal_kernels.ops import feature_loss, feature_loss_triton

    # On a GPU half-precision products leave the chip in float32. Here they would be widened first.
    monkeypatch.setattr(
        feature_loss_triton, "wide_product", lambda a, b: torch.zeros(len(a), b.shape[1])
    )
    monkeypatch.setattr(
        feature_loss_triton,
        "sum_of_products",
        lambda total, a, b: torch.zeros(len(a), b.shape[1]) if total is None else total,
    )
    dim = 512
    image, text = (torch.ones(batch, dim, dtype=dtype) for _ in range(2))
    scale, bias, upstream = torch.ones(()), torch.zeros(()), torch.ones(())

    def step():
        if op == "softmax":
            options = (None, 0.0, True, 0, normalize, "triton")
            _, *lses = feature_loss.softmax_loss(image, text, scale, *options)
            return feature_loss.softmax_loss_backward(
                upstream, image, text, scale, None, *lses, *options[1:], True, True, True
            )[:2]
        _, *gradients = feature_loss.sigmoid_loss(
            image, text, scale, bias, None, 1, normalize, "triton", *[True] * 4
        )
        return feature_loss.sigmoid_loss_backward(upstream, *gradients, dtype)[:2]

    extra = measure_memory(step, torch.device("cpu"))
    assert 2 * batch * dim < extra <= 16 * batch * dim

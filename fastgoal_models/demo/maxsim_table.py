"""The fused MaxSim loss against the eager one, on this machine: time and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_kernels import available_backends, maxsim_contrastive_loss

from .live_bytes import extra_peak_bytes


class Size(NamedTuple):
    """Pairs of one image and one text, tokens of each, channels of a token."""

    pairs: int = 32
    text_tokens: int = 77
    image_tokens: int = 196
    dim: int = 512


class Row(NamedTuple):
    name: str
    seconds: float  # forward and backward, median
    fastest: float
    slowest: float
    extra_bytes: int  # peak of live tensors beyond inputs and gradients
    error: float  # relative, of the gradients, against the first row's


class MaxSimTable(NamedTuple):
    size: Size
    device: str
    runs: int
    rows: list[Row]


LOGIT_SCALE = 10.0


def eager_loss(image_tokens: Tensor, text_tokens: Tensor, reduce: str) -> Tensor:
    """FILIP's loss, both directions, as one writes it by hand: one product, then its maxima.

    `reduce` is "max" (the winner takes the whole gradient) or "amax" (ties share it).
    """
    images, regions, dim = image_tokens.shape
    texts, words, _ = text_tokens.shape
    flat = image_tokens.reshape(-1, dim) @ text_tokens.reshape(-1, dim).T
    sim = flat.view(images, regions, texts, words)
    if reduce == "max":
        best_region, best_word = sim.max(dim=1).values, sim.max(dim=3).values
    else:
        best_region, best_word = sim.amax(dim=1), sim.amax(dim=3)
    text_to_image = LOGIT_SCALE * best_region.mean(dim=2)
    image_to_text = LOGIT_SCALE * best_word.mean(dim=1)
    target = torch.arange(images, device=sim.device)
    return (F.cross_entropy(image_to_text, target) + F.cross_entropy(text_to_image.T, target)) / 2


def fused_loss(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """The same loss by this library, by the backend it chooses on this device."""
    return maxsim_contrastive_loss(image_tokens, text_tokens, LOGIT_SCALE, direction="both")


def compare(device: torch.device, size: Size | None = None, runs: int = 5) -> MaxSimTable:
    """Time and peak memory of one forward and backward in float32, median of `runs` warm ones.

    All three are first checked to give the same loss and gradients (relative error below 1e-4,
    several hundred float32 roundings); RuntimeError if not, for then no timing means anything.
    The runs take turns, so that a machine that gets busy slows all of them.
    """
    size = size or Size()
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        values = torch.randn(size.pairs, count, size.dim, generator=generator)
        return F.normalize(values, dim=2).to(device).requires_grad_()

    inputs = (tokens(size.image_tokens), tokens(size.text_tokens))
    backend = "triton" if device.type == "cuda" and _has_triton() else "torch"
    losses: dict[str, Callable[[], Tensor]] = {
        "eager, `max(dim)`": lambda: eager_loss(*inputs, "max"),
        "eager, `amax`": lambda: eager_loss(*inputs, "amax"),
        f"fused (`{backend}` backend)": lambda: fused_loss(*inputs),
    }
    expected = _loss_and_gradients(losses["eager, `max(dim)`"], inputs)
    errors, extra = {}, {}
    for name, loss in losses.items():
        pairs = zip(_loss_and_gradients(loss, inputs), expected, strict=True)
        errors[name] = max(float((found - true).norm() / true.norm()) for found, true in pairs)
        if not errors[name] < 1e-4:
            raise RuntimeError(
                f"{name} differs from eager by {errors[name]:.1e}; nothing was timed"
            )
        extra[name] = extra_peak_bytes(loss, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(runs):
        for name, loss in losses.items():
            seconds[name].append(_time(loss, inputs, device))
    rows = [
        Row(name, median(times), min(times), max(times), extra[name], errors[name])
        for name, times in seconds.items()
    ]
    return MaxSimTable(size, str(device), runs, rows)


def _has_triton() -> bool:
    return "triton" in available_backends()["maxsim_contrastive_loss"]


def _loss_and_gradients(loss: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    value = loss()
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def _time(loss: Callable[[], Tensor], inputs: tuple[Tensor, ...], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    torch.autograd.grad(loss(), inputs)
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""The fused MaxSim loss against the eager one, on this machine: time and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_kernels import explain_backend, maxsim_contrastive_loss

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


class MaxSimTable(NamedTuple):
    size: Size
    device: str
    runs: int
    rows: list[Row]  # the fused one last
    error: float  # of the fused loss and gradients, relative to the eager ones by max(dim)


Losses = dict[str, Callable[[], Tensor]]

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

    First checks that all give the same loss, and that the fused gradients are those of `max(dim)`
    (relative error below 1e-4, several hundred float32 roundings); RuntimeError if not, for then
    no timing means anything. The runs take turns, so that a machine that gets busy slows all.
    """
    size = size or Size()
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tensor:
        # Seven bits and a sign: products of 512 channels are exact in float32, in any order of
        # summation. A rounding can then not give one implementation another winner.
        shape = (size.pairs, count, size.dim)
        values = torch.randint(-127, 128, shape, generator=generator)
        return (values / 2048).to(device).requires_grad_()

    inputs = (tokens(size.image_tokens), tokens(size.text_tokens))
    backend = explain_backend("maxsim_contrastive_loss", *inputs).partition(":")[0]
    losses: Losses = {
        "eager, `max(dim)`": lambda: eager_loss(*inputs, "max"),
        "eager, `amax`": lambda: eager_loss(*inputs, "amax"),
        f"fused (`{backend}` backend)": lambda: fused_loss(*inputs),
    }
    error = _check_parity(losses, inputs)
    extra = {name: extra_peak_bytes(loss, inputs) for name, loss in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(runs):
        for name, loss in losses.items():
            seconds[name].append(_time(loss, inputs, device))
    rows = [
        Row(name, median(times), min(times), max(times), extra[name])
        for name, times in seconds.items()
    ]
    return MaxSimTable(size, str(device), runs, rows, error)


def _check_parity(losses: Losses, inputs: tuple[Tensor, ...]) -> float:
    """The largest relative error of the last of `losses` against the first, which all must meet.

    Of `amax` only the loss is compared: where two maxima are equal it shares the gradient.
    """
    found = {name: _loss_and_gradients(loss, inputs) for name, loss in losses.items()}
    expected, *_, fused = found.values()
    errors = {name: _relative_error(values[0], expected[0]) for name, values in found.items()}
    worst = max(_relative_error(a, b) for a, b in zip(fused, expected, strict=True))
    errors[list(found)[-1]] = worst
    for name, error in errors.items():
        if not error < 1e-4:
            raise RuntimeError(f"{name} differs from eager by {error:.1e}; nothing was timed")
    return worst


def _relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


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

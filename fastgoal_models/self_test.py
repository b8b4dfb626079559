"""Whether the losses are right on this machine: the backend a call gets against the definition.

Every public loss function runs on a small problem, forward and backward, on the backend that a
call without `backend=` gets there. The truth is `backend="reference"`, on the CPU, of the same
numbers in float64. This finds a driver, a compiler or a build of PyTorch that computes wrongly; it
is no proof of the library, which is what its tests are for. The loss modules are these functions or
sums of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgoal_kernels as kernels
from fastgoal_kernels.backends import TRITON_OPS
from fastgoal_kernels.functional.text_conditioned import text_conditioned_loss_from_weights
from fastgoal_kernels.reference import PoolWeights, score_dtype

from .machine import first_line

SECONDS = 10.0
"""No loss starts later than this"""

# Largest relative error allowed, of the loss and of each gradient.
#
# float32: tokens and features are quarters, so that products and their sums are exact and every
# maximum has the same winner in float32 and float64. What is rounded, to 6e-8 each time, are means,
# norms, exponentials and the sums over them, which leaves up to 2e-6. The bound is fifty times
# that, and still below what a rounding to TF32 (5e-4) or a wrong winner, mask or sign (1e-2) does.
# bfloat16: quarters are exact there too, but gradients, and the probabilities they are made of, are
# rounded to 2^-9 = 2e-3 each: 1e-2 is five such roundings that all point the same way.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

_WARM_RUNS = 5
_WARM_SECONDS = 0.2

Loss = Callable[..., Tensor]


class Problem(NamedTuple):
    """A small input of one loss.

    `tensors` are the tokens or features, which take the dtype that is tested, and whose gradients
    are compared along with those of `others`, which stay as wide as scores are: the temperature,
    the bias, a pool's parameters. `loss` takes both, in this order, and the keyword `backend`.
    """

    tensors: list[Tensor]
    others: list[Tensor]
    loss: Loss


@dataclass(frozen=True)
class Result:
    """One loss in one dtype. `reason` says why `status` is not "ok" but one of

    - "FAILED": it is wrong, or raised;
    - "refused": FASTGOAL_BACKEND asks for a backend that can not serve it;
    - "not run": there was no time left.

    The errors are relative: of the loss, and the largest of its gradients. `first_ms` holds the
    compilation, `warm_ms` is the best of a few later runs; both are forward and backward.
    """

    loss: str
    dtype: str
    status: str
    bound: float
    backend: str | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    first_ms: float | None = None
    warm_ms: float | None = None
    reason: str | None = None


def _quarters(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).double() / 4


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _maxsim_softmax(generator: torch.Generator) -> Problem:
    """Both directions; captions padded with a mask, one of them a single word."""
    tensors = [_quarters(generator, 5, 14, 32), _quarters(generator, 5, 11, 32)]
    mask = torch.arange(11) < torch.tensor([11, 1, 7, 4, 9])[:, None]

    def loss(images: Tensor, texts: Tensor, scale: Tensor, backend: str | None) -> Tensor:
        return kernels.maxsim_contrastive_loss(
            images, texts, scale, text_mask=mask.to(images.device), backend=backend
        )

    return Problem(tensors, [_scalar(0.5)], loss)


def _maxsim_sigmoid(generator: torch.Generator) -> Problem:
    """One direction; packed captions, two an image, one of them empty."""
    lengths = torch.tensor([11, 1, 7, 0, 9, 3, 5, 2])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tensors = [_quarters(generator, 4, 14, 32), _quarters(generator, int(lengths.sum()), 32)]

    def loss(
        images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, backend: str | None
    ) -> Tensor:
        return kernels.maxsim_contrastive_loss(
            images, texts, scale, bias, text_offsets=offsets.to(images.device),
            max_text_tokens=11, captions_per_image=2, objective="sigmoid",
            direction="text_to_image", backend=backend,
        )  # fmt: skip

    return Problem(tensors, [_scalar(0.5), _scalar(-1.0)], loss)


def _clip(generator: torch.Generator) -> Problem:
    def loss(images: Tensor, texts: Tensor, scale: Tensor, backend: str | None) -> Tensor:
        return kernels.clip_contrastive_loss(images, texts, scale, backend=backend)

    tensors = [_quarters(generator, 24, 32), _quarters(generator, 24, 32)]
    return Problem(tensors, [_scalar(0.5)], loss)


def _sigmoid(generator: torch.Generator) -> Problem:
    """Two captions an image."""

    def loss(
        images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, backend: str | None
    ) -> Tensor:
        return kernels.sigmoid_contrastive_loss(
            images, texts, scale, bias, captions_per_image=2, backend=backend
        )

    tensors = [_quarters(generator, 12, 32), _quarters(generator, 24, 32)]
    return Problem(tensors, [_scalar(0.5), _scalar(-1.0)], loss)


def _text_conditioned(generator: torch.Generator) -> Problem:
    """All negatives, two captions an image; the gradients of the pool's weights too."""
    dim, heads = 32, 4
    shapes = [(3 * dim, dim), (3 * dim,), (dim, dim), *[(dim,)] * 7]
    weights = [torch.randn(shape, generator=generator).double() / 4 for shape in shapes]

    def loss(
        images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *pool: Tensor,
        backend: str | None,
    ) -> Tensor:  # fmt: skip
        return text_conditioned_loss_from_weights(
            images, texts, PoolWeights(*pool), heads, scale, bias, captions_per_image=2,
            backend=backend,
        )  # fmt: skip

    tensors = [_quarters(generator, 5, 14, dim), _quarters(generator, 10, dim)]
    return Problem(tensors, [_scalar(5.0), _scalar(-1.0), *weights], loss)


def _token_similarity(generator: torch.Generator) -> Problem:
    def loss(pooled: Tensor, local: Tensor, backend: str | None) -> Tensor:
        return kernels.token_similarity_loss(pooled, local, backend=backend)

    return Problem([_quarters(generator, 24, 32), _quarters(generator, 24, 32)], [], loss)


class _Case(NamedTuple):
    name: str
    op: str
    make: Callable[[torch.Generator], Problem]


# What compiles, or is interpreted, for longest comes last.
_CASES = (
    _Case("clip_contrastive_loss", "clip_contrastive_loss", _clip),
    _Case("sigmoid_contrastive_loss", "sigmoid_contrastive_loss", _sigmoid),
    _Case("text_conditioned_sigmoid_loss", "text_conditioned_sigmoid_loss", _text_conditioned),
    _Case("token_similarity_loss", "token_similarity_loss", _token_similarity),
    _Case("maxsim_contrastive_loss, softmax", "maxsim_contrastive_loss", _maxsim_softmax),
    _Case("maxsim_contrastive_loss, sigmoid", "maxsim_contrastive_loss", _maxsim_sigmoid),
)
# The ops with Triton kernels multiply bfloat16 by instructions of their own.
_IN_BFLOAT16 = tuple(case for case in _CASES if case.op in TRITON_OPS)


def _inputs(problem: Problem, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    wide = score_dtype(dtype)
    copies = [x.to(device, dtype, copy=True) for x in problem.tensors]
    copies += [x.to(device, wide, copy=True) for x in problem.others]
    return [x.requires_grad_() for x in copies]


def _step(problem: Problem, inputs: list[Tensor], backend: str | None) -> tuple[Tensor, ...]:
    """The loss and all gradients, done, not merely queued."""
    loss = problem.loss(*inputs, backend=backend)
    gradients = torch.autograd.grad(loss, inputs)
    if loss.device.type != "cpu":
        torch.accelerator.synchronize(loss.device)
    return loss.detach(), *gradients


def _relative_error(value: Tensor, truth: Tensor) -> float:
    error = (value.cpu().double() - truth).norm() / truth.norm()
    return float(error) if torch.isfinite(error) else float("inf")


def _measure(case: _Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    problem = case.make(torch.Generator().manual_seed(0))
    exact = _inputs(problem, torch.float64, torch.device("cpu"))
    true_loss, *true_gradients = _step(problem, exact, "reference")
    inputs = _inputs(problem, dtype, device)
    tokens = inputs[: len(problem.tensors)]
    found: dict[str, Any] = {"backend": kernels.explain_backend(case.op, *tokens).partition(":")[0]}
    milliseconds: list[float] = []
    while len(milliseconds) <= _WARM_RUNS and sum(milliseconds[1:]) < 1e3 * _WARM_SECONDS:
        start = time.perf_counter()
        loss, *gradients = _step(problem, inputs, None)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    errors = {
        "loss_error": _relative_error(loss, true_loss),
        "gradient_error": max(map(_relative_error, gradients, true_gradients)),
    }
    found |= {"first_ms": milliseconds[0], "warm_ms": min(milliseconds[1:]), **errors}
    wrong = [
        f"{name.replace('_', ' ')} {error:.1e} is above {BOUNDS[dtype]:g}"
        for name, error in errors.items()
        if not error <= BOUNDS[dtype]
    ]
    return {**found, "status": "FAILED" if wrong else "ok", "reason": "; ".join(wrong) or None}


def self_test(device: torch.device, seconds: float = SECONDS) -> Iterator[Result]:
    """A result for each loss, as it is found; none raises.

    Float32 products are IEEE while it runs, whatever `torch.set_float32_matmul_precision` allows.

    Args:
        device: where the losses run.
        seconds: losses that would start later than this are "not run".
    """
    # The first operator that a process calls imports half of PyTorch, which takes seconds.
    with suppress(Exception):
        kernels.clip_contrastive_loss(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, backend="torch")
    start = time.perf_counter()
    plan = [(case, torch.float32) for case in _CASES]
    plan += [(case, torch.bfloat16) for case in _IN_BFLOAT16]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for case, dtype in plan:
            known: dict[str, Any] = {"loss": case.name, "bound": BOUNDS[dtype]}
            known["dtype"] = str(dtype).removeprefix("torch.")
            if time.perf_counter() - start > seconds:
                reason = f"the {seconds:.0f} seconds were used up"
                yield Result(**known, status="not run", reason=reason)
                continue
            found: dict[str, Any]
            try:
                found = _measure(case, dtype, device)
            except kernels.BackendError as error:
                found = {"status": "refused", "reason": str(error)}
            except Exception as error:  # a broken driver or compiler can raise anything
                found = {"status": "FAILED", "reason": first_line(error)}
            yield Result(**known, **found)
    finally:
        torch.set_float32_matmul_precision(before)

"""Which implementation serves a call, and why: the one place that decides.

`triton` serves tensors on NVIDIA GPUs (and any tensor when Triton's interpreter is on), `torch`
serves any device without ever holding the big tensor, `reference` is the eager definition. Nothing
else in the library asks whether Triton is installed or a tensor is on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("triton", "torch", "reference")

# Ops whose Triton kernels exist. Every op has `torch` and `reference`.
TRITON_OPS = frozenset(
    {
        "maxsim_scores",
        "maxsim_alignment",
        "maxsim_contrastive_loss",
        "clip_contrastive_loss",
        "sigmoid_contrastive_loss",
        "text_conditioned_scores",
        "text_conditioned_sigmoid_loss",
        "text_conditioned_topk",
        "hierarchical_scores",
        "hierarchical_topk",
        "farthest_point_sampling",
        "soft_cluster_pool",
        "region_mean",
        "span_mean",
        "token_similarity_loss",
    }
)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the kernels are compiled and tested for.
OLDEST_CAPABILITY = (8, 0)


class BackendError(RuntimeError):
    """The backend that was asked for can not serve these inputs."""


# A plain module variable, not a context variable: torch.compile guards on it and recompiles.
_forced: str | None = None


def _check_name(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {backend!r}; choose one of {BACKENDS}")
    return backend


def _from_environment() -> str | None:
    value = os.environ.get("FASTGOAL_BACKEND", "")
    return _check_name(value, "FASTGOAL_BACKEND") if value else None


# Read once, at import: an environment look-up in the hot path would be one that torch.compile
# can not trace.
_default: str | None = _from_environment()
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Whether Triton runs its kernels in Python, on any tensor. Triton reads this once, too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside the block, calls that name no backend of their own use this one.

    The setting is global to the process (threads share it) and the blocks nest. The backward pass
    always runs on the backend its forward ran on.

    Args:
        backend: "triton", "torch" or "reference".

    Raises:
        ValueError: the name is none of the three.
    """
    global _forced
    before, _forced = _forced, _check_name(backend, "use_backend")
    try:
        yield
    finally:
        _forced = before


def available_backends() -> dict[str, tuple[str, ...]]:
    """The backends that can run on this machine for each public op, best first.

    An op without a Triton kernel lists only "torch" and "reference"; so does every op where
    Triton is not installed, or where there is neither an NVIDIA GPU that the kernels are made for
    nor Triton's interpreter.
    """
    from . import functional  # the public ops are the public functions of that module

    gpus = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    triton_runs = _HAS_TRITON and (INTERPRETED or any(not _why_not_on(gpu) for gpu in gpus))
    return {
        op: (("triton",) if triton_runs and op in TRITON_OPS else ()) + ("torch", "reference")
        for op in functional.OPS
    }


# A constant to torch.compile, which can not trace questions to the driver.
@torch.compiler.assume_constant_result
def _why_not_on(device: torch.device) -> str | None:
    """The reason no kernel can run on this device, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, and PyTorch is built for AMD's"
    if not torch.cuda.is_available():
        return None  # a fake tensor, whose device no one can ask
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found, oldest = ("sm_{}{}".format(*x) for x in (capability, OLDEST_CAPABILITY))
        return f"the Triton kernels need {oldest} or newer, and {device} is {found}"
    return None


def _why_not_triton(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """The reason Triton can not serve this call, or None when it can."""
    if op not in TRITON_OPS:
        return f"{op} has no Triton kernel yet"
    if not _HAS_TRITON:
        return "Triton is not installed (pip install triton; Linux only)"
    for tensor in tensors:
        reason = None if INTERPRETED else _why_not_on(tensor.device)
        if reason:
            return reason
        if tensor.dtype not in TRITON_DTYPES:
            return f"the Triton kernels do not take {tensor.dtype}"
    return None


def choose_backend(
    op: str, backend: str | None, *tensors: Tensor, triton_lacks: str | None = None
) -> str:
    """The backend for this call: the argument, else use_backend, else FASTGOAL_BACKEND, else best.

    Args:
        op, backend, tensors: of the call.
        triton_lacks: why the kernels can not serve these sizes; None where they can.

    Raises:
        ValueError: unknown name.
        BackendError: "triton" was asked for (in any of the three ways) and can not serve.
    """
    wanted = _check_name(backend, f"{op}(backend=...)") if backend else _forced or _default
    if wanted is None:
        return "torch" if triton_lacks or _why_not_triton(op, tensors) else "triton"
    if wanted == "triton":
        reason = _why_not_triton(op, tensors) or triton_lacks
        if reason:
            raise BackendError(f"{op}: backend 'triton' was asked for, but {reason}")
    return wanted


def explain_backend(op: str, *tensors: Tensor) -> str:
    """One sentence: which backend a call of `op` with these tensors would use, and why.

    >>> explain_backend("maxsim_scores", image_tokens, text_tokens)
    "torch: the tensors are on cpu, not on a CUDA device"
    """
    if _forced or _default:
        chosen = choose_backend(op, None, *tensors)
        return f"{chosen}: " + ("use_backend" if _forced else "FASTGOAL_BACKEND") + " asks for it"
    reason = _why_not_triton(op, tensors)
    return (
        f"torch: {reason}" if reason else "triton: a GPU and a dtype that the kernels are made for"
    )

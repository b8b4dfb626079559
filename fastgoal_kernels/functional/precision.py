"""The dtype rules of the public functions: autocast, promotion, scalars."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..reference import score_dtype


def in_autocast_dtype(x: Tensor) -> Tensor:
    """As a matrix product under torch.autocast would take it; float64 is left alone."""
    device_type = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def of_one_dtype(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the autocast dtype, if there is one, and then in the dtype they promote to."""
    first, second = in_autocast_dtype(first), in_autocast_dtype(second)
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block in which autocast changes nothing on x's device: dtypes are already chosen."""
    if x.is_meta:  # shapes only, and no autocast of its own
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def as_scalar(value: Tensor | float, beside: Tensor) -> Tensor:
    """A 0-dim tensor on `beside`'s device, in the dtype of its scores; differentiable."""
    dtype = score_dtype(beside.dtype)
    if isinstance(value, Tensor):
        return value.reshape(()).to(device=beside.device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=beside.device)

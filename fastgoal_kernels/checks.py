"""Input checks shared by the public functions: errors that name the argument, the shapes, the fix.

Shapes, dtypes and devices are looked at in every call: that costs no synchronisation. Values of
offsets, boxes, spans and indices are looked at only when they live on the CPU, or when
FASTGOAL_CHECKS=1: kernels clamp, so that a bad value can never read outside a tensor.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_CHECK_CUDA_VALUES = os.environ.get("FASTGOAL_CHECKS", "0") == "1"


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape as a person writes it: (2, 3)."""
    return str(tuple(tensor.shape))


def values_are_checked(tensor: Tensor) -> bool:
    """Whether this call may look at the tensor's values."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or _CHECK_CUDA_VALUES


def check_tensor(name: str, tensor: object, ndim: int | tuple[int, ...], layout: str) -> None:
    """A floating tensor with the right number of axes; `layout` is e.g. "(images, tokens, dim)"."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, not {type(tensor).__name__}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if tensor.ndim not in allowed:
        raise ValueError(f"{name} must have shape {layout}; got {shape_of(tensor)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {tensor.dtype}. Fix: {name}.float()")


def check_integer(name: str, tensor: object, shape: tuple[int | None, ...], layout: str) -> None:
    """An integer tensor of the given shape (None: any length)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, not {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32; got {tensor.dtype}")
    same = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not same:
        raise ValueError(f"{name} must have shape {layout}; got {shape_of(tensor)}")


def check_mask(name: str, mask: object, of_name: str, shape: tuple[int, ...]) -> None:
    """A bool tensor of exactly `shape`, which is a shape of the tensor called `of_name`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a bool tensor, not {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = a real one); got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {shape_of(mask)}, but {of_name} asks for {tuple(shape)}"
        )


def check_same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Every tensor lives where the first one does."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {first_name} is on {first.device}. "
                f"Fix: {name}.to({str(first.device)!r})"
            )


def check_same_dim(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """The last axes agree."""
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"{first_name} {shape_of(first)} and {second_name} {shape_of(second)} must have the "
            f"same last dimension; got {first.shape[-1]} and {second.shape[-1]}"
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """A string argument is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}; got {value!r}")


def check_range(name: str, values: Tensor, low: int, high: int, meaning: str) -> None:
    """All values in [low, high), when this call may look at them."""
    if values.numel() == 0 or not values_are_checked(values):
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest >= high:
        raise ValueError(
            f"{name} must lie in [{low}, {high}) ({meaning}); got {smallest} to {largest}"
        )


def check_offsets(name: str, offsets: object, tokens_name: str, total: int) -> None:
    """n + 1 non-decreasing integers from 0 to the number of tokens."""
    check_integer(name, offsets, (None,), "(items + 1,)")
    assert isinstance(offsets, Tensor)
    if len(offsets) == 0:
        raise ValueError(f"{name} must hold items + 1 integers, so at least one; got none")
    if not values_are_checked(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(
            f"{name} must run from 0 to the number of rows of {tokens_name} ({total}); "
            f"it runs from {first} to {last}"
        )
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"{name} must not fall, but goes from {int(offsets[at])} to {int(offsets[at + 1])} "
            f"at position {at + 1}"
        )


def check_scalar(name: str, value: object, allow_none: bool = False) -> None:
    """A float or a 0-dim tensor (logit_scale, logit_bias)."""
    if value is None and allow_none:
        return
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.ndim > 1:
            raise ValueError(f"{name} must be a float or a 0-dim tensor; got {shape_of(value)}")
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float or a 0-dim tensor, not {type(value).__name__}")

"""The device that a command runs on; this imports PyTorch and nothing else that can be missing."""

from __future__ import annotations

import torch

from .errors import ConfigError


def default_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_device(name: str | None) -> torch.device:
    """The device of that name, or the default one. ConfigError when it is not here."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} can not be used here: {reason}") from error
    return device

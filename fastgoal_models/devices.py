"""The device that a command runs on; of what can be missing this imports PyTorch alone."""

from __future__ import annotations

import torch
from rich.console import Console

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


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CPU or an NVIDIA GPU multiplies bfloat16 itself, rather than emulates it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # The very question that the torch backend asks before it multiplies in bfloat16.
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


def bfloat16_by_default(device: torch.device) -> bool:
    """What `--precision auto` means: a GPU that has it; a CPU keeps to float32."""
    return device.type == "cuda" and has_bfloat16(device)


def warn_of_emulated_bfloat16(console: Console, device: torch.device) -> None:
    """Said where bfloat16 was asked for and costs time instead of saving it."""
    if device.type in ("cpu", "cuda") and not has_bfloat16(device):
        console.print(
            f"[yellow]--precision bf16: this {device.type} has no products of bfloat16 and "
            "emulates them, which is slower than float32. Fix: leave it out[/]",
            highlight=False,
            soft_wrap=True,
        )

"""On what, and with which versions, a figure was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastgoal_kernels

from ..machine import processor_name


def machine_facts(device: torch.device) -> dict[str, str]:
    """Device, processor, threads, system and versions, as text."""
    facts = {"device": str(device)}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    facts["processor"] = (
        f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    facts["system"] = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )
    versions = {"fastgoal": fastgoal_kernels.__version__, "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("triton", "open-clip-torch")}
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return facts


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"

"""On what, and with which versions, a figure was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastgoal_kernels


def machine_facts(device: torch.device) -> dict[str, str]:
    """Device, processor, threads, system and versions, as text."""
    facts = {"device": str(device)}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    facts["processor"] = (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    facts["system"] = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )
    versions = {"fastgoal": fastgoal_kernels.__version__, "torch": torch.__version__}
    versions |= {name: _version(name) for name in ("triton", "open-clip-torch")}
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # platform.processor() is empty on most Linux systems
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"

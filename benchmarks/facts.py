"""What a result must say of where it came from: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "triton", "numpy", "fastgoal", "late-interaction-kernels", "flash-maxsim",
    "maxsim-cpu", "fast-maxsim",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of Python, CUDA and the packages that take part; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    return found


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def source() -> dict[str, Any]:
    """The commit and whether tracked files differ from it; None outside a git checkout."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if changes is None else changes != "",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, size and caches of the device; sizes in bytes."""
    if device.type != "cuda":
        return {
            "type": device.type,
            "name": _cpu_model(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
    }


def provenance(command: str, device: torch.device) -> dict[str, Any]:
    """The head of every result file."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "source": source(),
        "versions": versions(),
        "device": describe_device(device),
    }

"""What the facts of a machine mean for someone who uses this library, and what to do about them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .machine import Cuda, Device, Facts, Package, Unknown, interpreted

if TYPE_CHECKING:  # it imports PyTorch, which may be what is broken
    from .self_test import Result

# What pyproject.toml asks for, and what the kernels are compiled and tested for.
OLDEST = {"torch": (2, 6), "triton": (3, 2)}
OLDEST_CAPABILITY = (8, 0)

USE_TORCH = "set FASTGOAL_BACKEND=torch: the same results from chunked PyTorch"


@dataclass(frozen=True)
class Advice:
    """`is_problem`: something does not work as it should; else it is only good to know."""

    what: str
    meaning: str
    fix: str
    is_problem: bool = True


def advise(facts: Facts) -> list[Advice]:
    """Problems first."""
    found = [*_packages(facts), *_cuda(facts), *_settings(facts)]
    return sorted(found, key=lambda advice: not advice.is_problem)


def advise_after(results: Sequence[Result]) -> list[Advice]:
    """What losses that failed, or did not run, in the self-test mean."""
    found = []
    failed = {result.backend or "none" for result in results if result.status == "FAILED"}
    if "triton" in failed:
        found.append(
            Advice(
                "the Triton kernels failed in the self-test",
                "their results can not be trusted on this machine",
                f"{USE_TORCH}. Then try other versions of Triton, PyTorch and the driver, and "
                "report it with what --json writes",
            )
        )
    if failed - {"triton"}:
        found.append(
            Advice(
                "losses failed in the self-test outside of the Triton kernels",
                "results can not be trusted with this build of PyTorch and these settings",
                "unset FASTGOAL_BACKEND if it is set, try another version of PyTorch, and report "
                "it with what --json writes",
            )
        )
    if any(result.status == "not run" for result in results):
        found.append(
            Advice(
                "the self-test ran out of time",
                "kernels that are compiled for the first time, or run in Python, take most of it",
                "on a GPU, run it again: compiled kernels are kept on disk",
                is_problem=False,
            )
        )
    return found


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers: (2, 15, 0) of 2.15.0+cpu."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _packages(facts: Facts) -> Iterator[Advice]:
    for package in facts.packages:
        oldest = OLDEST.get(package.name)
        if package.broken is not None:
            yield Advice(
                f"{package.name} {package.version} can not be imported: {package.broken}",
                f"{package.needed_for} can not be used",
                "reinstall it together with torch and torchvision: their versions must match",
            )
        elif package.version is not None and oldest and _version(package.version) < oldest:
            yield Advice(
                f"{package.name} {package.version} is older than {_dotted(oldest)}",
                f"{package.needed_for} may fail: nobody has tried",
                f"pip install --upgrade {package.name}",
            )
    if _of(facts, "torch") is None:
        yield Advice("PyTorch is not installed", "nothing can run", "pip install torch")
    elif isinstance(facts.kernels, Unknown):
        invalid = "FASTGOAL_BACKEND" in facts.kernels.unknown
        yield Advice(
            f"fastgoal_kernels can not be imported: {facts.kernels.unknown}",
            "nothing can run",
            "unset FASTGOAL_BACKEND, or correct it" if invalid else "mend what the message names",
        )


def _of(facts: Facts, name: str) -> Package | None:
    """The package, if it is installed."""
    found = (package for package in facts.packages if package.name == name)
    return next((package for package in found if package.version is not None), None)


def _cuda(facts: Facts) -> Iterator[Advice]:
    cuda, triton = facts.cuda, _of(facts, "triton")
    if isinstance(cuda, Unknown):
        return
    if not cuda.available:
        if cuda.gpus:
            yield _unused_gpu(cuda)
        elif triton is not None and not interpreted():
            yield Advice(
                "Triton is installed, but there is no CUDA device",
                "the Triton kernels can not run, so that calls choose the torch backend, which "
                "computes the same",
                "nothing, on a machine without a GPU",
                is_problem=False,
            )
        return
    if cuda.rocm is not None:
        yield Advice(
            f"PyTorch is built for ROCm {cuda.rocm}, not for CUDA",
            "the Triton kernels are for NVIDIA GPUs, so that calls choose the torch backend, which "
            "computes the same",
            "nothing, on a machine with AMD GPUs",
            is_problem=False,
        )
        return
    if triton is None:
        yield Advice(
            "there is a CUDA device, but Triton is not installed",
            "every op runs on the torch backend: the same results, slower",
            "pip install triton (Linux only)",
        )
    elif not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        yield Advice(
            "Triton finds no C compiler (cc, gcc or clang)",
            "it needs one to start any kernel",
            "install one, for example with apt-get install gcc, or name it in CC",
        )
    for device in () if isinstance(facts.devices, Unknown) else facts.devices:
        if device.capability is not None and device.capability < OLDEST_CAPABILITY:
            yield _old_gpu(device)


def _unused_gpu(cuda: Cuda) -> Advice:
    """The driver sees a GPU that PyTorch does not use."""
    cpu = "everything runs on the CPU"
    seen = f"the driver sees {cuda.gpus[0]}"
    if cuda.built_for is None:
        return Advice(
            f"{seen}, but PyTorch is built without CUDA",
            cpu,
            "install a build of PyTorch for CUDA: pytorch.org gives the command",
        )
    runs = cuda.driver_cuda
    if runs is not None and _version(runs)[:1] < _version(cuda.built_for)[:1]:
        return Advice(
            f"the NVIDIA driver {cuda.driver or ''} is too old: it runs CUDA up to {runs}, and "
            f"PyTorch is built for CUDA {cuda.built_for}",
            cpu,
            f"update the driver, or install a PyTorch built for CUDA {_version(runs)[0]}",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        return Advice(
            f"{seen}, but CUDA_VISIBLE_DEVICES={value!r} hides it from PyTorch",
            cpu,
            "unset CUDA_VISIBLE_DEVICES, or name a GPU by its number",
        )
    return Advice(
        f"{seen}, but PyTorch can not start CUDA: {cuda.failure or 'it does not say why'}",
        cpu,
        "mend what the message names; after an update of the driver, restart the machine",
    )


def _old_gpu(device: Device) -> Advice:
    assert device.capability is not None
    old, oldest = ("".join(map(str, pair)) for pair in (device.capability, OLDEST_CAPABILITY))
    return Advice(
        f"{device.name} ({device.model}) is sm_{old}",
        f"the Triton kernels need sm_{oldest} or newer, so that calls choose the torch backend, "
        "which computes the same",
        "nothing, with this GPU",
        is_problem=False,
    )


def _settings(facts: Facts) -> Iterator[Advice]:
    values = {setting.name: setting.value for setting in facts.settings}
    if interpreted():
        yield Advice(
            "TRITON_INTERPRET is set",
            "Triton kernels run in Python, on any device, thousands of times slower; so does the "
            "self-test",
            "unset TRITON_INTERPRET, unless you debug a kernel",
        )
    backend = values.get("FASTGOAL_BACKEND")
    if backend == "reference":
        yield Advice(
            "FASTGOAL_BACKEND=reference",
            "every op runs its eager definition, which holds the big tensors",
            "unset FASTGOAL_BACKEND, unless you compare with it",
        )
    if not isinstance(facts.choices, Unknown):
        refused = [
            f"{choice.op} on {device}"
            for device, choices in facts.choices.items()
            for choice in choices
            if choice.backend is None
        ]
        if refused:
            more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
            yield Advice(
                f"FASTGOAL_BACKEND={backend} can not serve {refused[0]}{more}",
                "such calls are errors: a backend that is asked for is never replaced",
                "unset FASTGOAL_BACKEND, or name the backend in single calls",
            )
    precision = values.get("float32 matmul precision")
    if precision not in (None, "highest"):
        yield Advice(
            f"float32 products run at precision {precision!r}",
            "float32 results are less exact, and MaxSim may choose other winners among close ones",
            'torch.set_float32_matmul_precision("highest"), or unset '
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, if you want IEEE products",
            is_problem=False,
        )

"""What a result depends on: versions, devices, settings, and which backend serves which op.

`find_facts` never raises: what can not be found out is an `Unknown`, which says why. PyTorch and
this package's own kernels are imported inside the functions: either may be missing or broken.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# Distribution, module, and what goes without it.
PACKAGES = (
    ("torch", "torch", "everything"),
    ("triton", "triton", "the Triton kernels"),
    ("numpy", "numpy", "fastgoal_models"),
    ("torchvision", "torchvision", "fastgoal_models"),
    ("timm", "timm", "fastgoal_models"),
    ("open-clip-torch", "open_clip", "fastgoal_models"),
    ("transformers", "transformers", "patch_hf_clip"),
    ("matplotlib", "matplotlib", "pictures"),
)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says; compilers say pages."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


T = TypeVar("T")


@dataclass(frozen=True)
class Unknown:
    """In the place of a fact that could not be found out."""

    unknown: str


def attempt(find: Callable[[], T]) -> T | Unknown:
    """What `find` returns, or an Unknown that holds what it raised."""
    try:
        return find()
    except Exception as error:  # a broken driver or package can raise anything
        return Unknown(first_line(error))


# ---------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """`version` is None if it is not installed, `broken` is what its import raised, if it did."""

    name: str
    version: str | None
    needed_for: str
    broken: str | None = None


def find_package(name: str, module: str, needed_for: str) -> Package:
    """The version of a package, and, by importing it, whether it works."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, None, needed_for)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # other people's import-time code can raise anything
        return Package(name, version, needed_for, first_line(error))
    return Package(name, version, needed_for)


def kernels_version() -> str:
    """Of this package's own kernels; raises what their import raises."""
    from fastgoal_kernels import __version__

    return __version__


@dataclass(frozen=True)
class Cuda:
    """What PyTorch was built for, what the driver offers, and whether the two meet."""

    built_for: str | None  # None: PyTorch is built without CUDA
    rocm: str | None
    available: bool
    failure: str | None  # what PyTorch says when it can not start CUDA
    driver: str | None
    driver_cuda: str | None  # the newest CUDA that the driver runs
    gpus: tuple[str, ...]  # those the driver sees, whatever PyTorch does


def find_cuda() -> Cuda:
    """Both sides of CUDA, without failing where there is none."""
    import torch

    available = torch.cuda.is_available()
    failure = None
    if not available:
        try:
            torch.cuda.init()
        except Exception as error:
            failure = first_line(error)
    driver, gpus = _ask_nvidia_smi()
    return Cuda(
        built_for=torch.version.cuda,
        rocm=torch.version.hip,
        available=available,
        failure=failure,
        driver=driver,
        driver_cuda=_cuda_of_driver(),
        gpus=gpus,
    )


def _ask_nvidia_smi() -> tuple[str | None, tuple[str, ...]]:
    """The driver's version and the names of its GPUs; (None, ()) without the tool or a driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None, ()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None, ()
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        return None, ()
    return rows[0][0], tuple(name for _, name in rows)


def _cuda_of_driver() -> str | None:
    """As the driver's own library tells it; None without one."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number = ctypes.c_int()
        failed = library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


# ---------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device as PyTorch names it; what does not apply to its kind is None.

    `memory` is in bytes, `processors` are cores that this process may use, or multiprocessors,
    `vectors` are the CPU's instructions that PyTorch chose, `bfloat16` is whether it has products.
    """

    name: str
    model: str
    memory: int | None = None
    processors: int | None = None
    capability: tuple[int, int] | None = None
    threads: int | None = None
    vectors: str | None = None
    bfloat16: bool | None = None


def find_devices() -> list[Device]:
    """The CPU, then every GPU that PyTorch sees."""
    import torch

    found = [_cpu()]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Device(
                f"cuda:{index}",
                properties.name,
                memory=properties.total_memory,
                processors=properties.multi_processor_count,
                capability=(properties.major, properties.minor),
            )
        )
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU"))
    return found


def _cpu() -> Device:
    import torch

    from .devices import has_bfloat16

    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    pages = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return Device(
        "cpu",
        processor_name(),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if pages else None,
        processors=len(affinity(0)) if affinity else os.cpu_count(),
        threads=torch.get_num_threads(),
        vectors=torch.backends.cpu.get_cpu_capability(),
        bfloat16=has_bfloat16(torch.device("cpu")),
    )


def processor_name() -> str:
    """The CPU's own name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():  # platform.processor() is empty on most Linux systems
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Something outside the code that changes results or speed; a `value` of None is not set."""

    name: str
    value: str | None
    meaning: str


def find_settings() -> list[Setting]:
    """The environment's settings, then PyTorch's as a new process finds them."""
    found = [_backend_setting(), _switch("FASTGOAL_AUTOTUNE", "tries tiles, keeps the fastest")]
    folder = os.environ.get("FASTGOAL_CACHE_DIR")
    remembered = folder or str(Path.home() / ".cache" / "fastgoal")
    found += [
        Setting("FASTGOAL_CACHE_DIR", folder, f"tuned tiles are remembered in {remembered}"),
        _switch("FASTGOAL_CHECKS", "values on a GPU are checked, which waits for it at each call"),
        _interpreter_setting(),
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    meaning = "PyTorch sees every GPU" if visible is None else "PyTorch sees no other GPU"
    found.append(Setting("CUDA_VISIBLE_DEVICES", visible, meaning))
    of_torch = attempt(_torch_settings)
    if isinstance(of_torch, Unknown):
        of_torch = [Setting("PyTorch's own", None, f"could not be found out: {of_torch.unknown}")]
    return found + of_torch


def _backend_setting() -> Setting:
    name = os.environ.get("FASTGOAL_BACKEND") or None
    if name is None:
        meaning = "each call gets the best backend that serves it"
    else:
        meaning = f"calls that name no backend get {name!r}, or an error"
    return Setting("FASTGOAL_BACKEND", name, meaning)


def _switch(name: str, when_on: str) -> Setting:
    value = os.environ.get(name)
    if value in (None, "", "0"):
        meaning = "off"
    else:
        meaning = f"on: {when_on}" if value == "1" else "off: only the value 1 turns it on"
    return Setting(name, value, meaning)


def interpreted() -> bool:
    """Whether Triton will run kernels in Python; the words it takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _interpreter_setting() -> Setting:
    meaning = "on: kernels run in Python, on any device" if interpreted() else "off"
    return Setting("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET"), meaning)


def _torch_settings() -> list[Setting]:
    import torch

    precision = torch.get_float32_matmul_precision()
    products = {
        "highest": "float32 products are IEEE",
        "high": "float32 products may be TF32 on a GPU",
        "medium": "float32 products may be TF32 on a GPU, bfloat16 on a CPU",
    }
    threads = torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS")
    why = "PyTorch's own choice" if asked is None else f"OMP_NUM_THREADS={asked}"
    return [
        Setting("float32 matmul precision", precision, products.get(precision, "not known here")),
        Setting("CPU threads", str(threads), why),
    ]


# ---------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The backend of an op's calls on a device; None: such a call is an error. And why."""

    op: str
    backend: str | None
    why: str


def find_choices(device: str) -> list[Choice]:
    """For each public op, what a call with float32 tensors on this device would use."""
    import torch

    from fastgoal_kernels import BackendError, explain_backend
    from fastgoal_kernels.functional import OPS

    tensor = torch.empty(0, device=device)
    found = []
    for op in OPS:
        try:
            backend, _, why = explain_backend(op, tensor).partition(": ")
            found.append(Choice(op, backend, why))
        except BackendError as error:
            found.append(Choice(op, None, str(error)))
    return found


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """Everything above. `kernels` is the version of fastgoal_kernels, `choices` are by device."""

    kernels: str | Unknown
    python: str
    system: str
    packages: list[Package]
    cuda: Cuda | Unknown
    devices: list[Device] | Unknown
    settings: list[Setting]
    choices: dict[str, list[Choice]] | Unknown


def find_facts(say: Callable[[str], None]) -> Facts:
    """All facts of this machine. `say` is told what is looked at: some of it takes seconds."""
    packages = []
    for name, module, needed_for in PACKAGES:
        say(f"importing {name}")
        packages.append(find_package(name, module, needed_for))
    say("looking for devices")
    devices = attempt(find_devices)
    if isinstance(devices, Unknown):
        choices: dict[str, list[Choice]] | Unknown = devices
    else:
        names = [device.name for device in devices]
        choices = attempt(lambda: {name: find_choices(name) for name in names})
    return Facts(
        kernels=attempt(kernels_version),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        cuda=attempt(find_cuda),
        devices=devices,
        settings=find_settings(),
        choices=choices,
    )

"""Time and peak memory of a call, on a GPU or a CPU.

Time is the median of many warm calls with its spread beside it. Memory is the peak of live tensor
bytes beyond what was there before the call and beyond the tensors that the call returns (for a
forward+backward: the gradients): what a trainer needs on top of its tokens and their gradients.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

Call = Callable[[], Any]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports every start and stop


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, the 20th and 80th percentile as its spread, the best."""

    median_ms: float
    low_ms: float
    high_ms: float
    best_ms: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(
            median_ms=statistics.median(ordered),
            low_ms=ordered[round(0.2 * last)],
            high_ms=ordered[round(0.8 * last)],
            best_ms=ordered[0],
            repeats=len(ordered),
        )


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_past_l2(tensors: Iterable[Tensor], device: torch.device) -> int:
    """How many copies of the inputs to rotate through so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(tensor.nbytes for tensor in tensors)
    return 1 if size >= 2 * l2 else 1 + -(-2 * l2 // max(size, 1))


def _seconds(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _cuda_milliseconds(calls: Sequence[Call], repeats: int) -> list[float]:
    """By CUDA events, all queued before the one wait, so that the host does not slow the device."""
    events = []
    for call in islice(cycle(calls), repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure_time(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float = 1.0,
    min_repeats: int = 5,
    max_repeats: int = 100,
) -> Timing:
    """Time one piece of work.

    Args:
        calls: the same work on different copies of the inputs, used in turn (`copies_past_l2`).
        seconds: about how long to go on, within the two numbers of repeats.
    """
    for call in calls[:2]:  # compilation, autotuning and allocator growth are not the work
        call()
    once = _seconds(calls[0], device)
    repeats = int(min(max(seconds / max(once, 1e-6), min_repeats), max_repeats))
    if device.type == "cuda":
        return Timing.of(_cuda_milliseconds(calls, repeats))
    return Timing.of([1e3 * _seconds(call, device) for call in islice(cycle(calls), repeats)])


def measure_in_turns(calls: dict[str, Call], rounds: int) -> dict[str, Timing]:
    """CPU times of rivals, one call of each a round, so that a busy machine slows all alike."""
    cpu = torch.device("cpu")
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(1e3 * _seconds(call, cpu))
    return {name: Timing.of(times) for name, times in samples.items()}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _storages(value: Any) -> dict[int, int]:
    """Bytes of each distinct storage among the tensors of `value`, by address."""
    storages = (tensor.untyped_storage() for tensor in _tensors(value))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure_memory(call: Call, device: torch.device) -> int:
    """Peak bytes of live tensors during the call, beyond those before it and those it returns.

    On a GPU what the caching allocator counts; on a CPU every allocation that the profiler sees,
    also those inside custom operators, of compiled code and of the backward pass.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return max(0, peak - sum(_storages(result).values()))
    # Not torch.profiler.profile, which loads the compiler first and takes seconds to do so.
    profiler = profile(profile_memory=True)
    with profiler:
        result = call()
    return _peak_of_trace(profiler, set(_storages(result)))


def _peak_of_trace(profiler: profile, returned: set[int]) -> int:
    """The peak of the running sum of allocations, without the storages that were returned."""
    events: list[tuple[int, int, int]] = []  # time, signed bytes, address

    def collect(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if node.tag.name == "Allocation":
                fields = node.extra_fields
                events.append((node.start_time_ns, fields.alloc_size, fields.ptr))
            collect(node.children)

    assert profiler.kineto_results is not None
    collect(profiler.kineto_results.experimental_event_tree())
    events.sort(key=lambda event: event[0])
    # Addresses are used again: the returned tensor is the last thing allocated at its address.
    last = {address: at for at, (_, size, address) in enumerate(events) if size > 0}
    skip = {last[address] for address in returned if address in last}
    live = peak = 0
    for at, (_, size, _) in enumerate(events):
        if at not in skip:
            live += size
            peak = max(peak, live)
    return peak


def forward_backward(loss: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One training step's worth of an op: the loss and its gradients, which are returned."""
    return torch.autograd.grad(loss(), inputs)

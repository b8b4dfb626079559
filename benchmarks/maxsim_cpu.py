"""The contrastive MaxSim loss on a CPU against eager PyTorch: time and memory in one run.

    python -m benchmarks.maxsim_cpu [--size 64 | 128] [--rounds N] [--threads 2] [--json PATH]

Forward and backward of the softmax loss, both directions, float32, T 77, R 196, D 512. Each round
runs every rival once, so that a busy machine slows all of them alike; best times stand beside the
medians, because they suffer least from it. Extra memory is the peak of live tensor bytes beyond
the inputs and their gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import facts, parity
from .measure import forward_backward, measure_in_turns, measure_memory
from .workloads import Workload, build, make_inputs

OURS = "fastgoal torch"
RIVALS = ("eager amax", "eager max")
# Times faster than each rival, and the share of its extra memory: what each size promises.
TARGETS = {
    64: {"eager amax": 3.5, "eager max": 2.5, "memory": 1 / 10},
    128: {"eager amax": 5.0, "eager max": 3.0, "memory": 1 / 20},
}


def workload(size: int) -> Workload:
    """size × size pairs of the sizes that the promise is about."""
    return Workload(
        "maxsim_contrastive_loss", "both", "forward+backward", size, size, 77, 196, 512, "float32"
    )


def measure(work: Workload, rounds: int) -> dict[str, dict[str, Any]]:
    """Parity, memory and time of ours and each rival. Raises when a result is wrong."""
    cpu = torch.device("cpu")
    inputs = make_inputs(work, cpu)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name in (OURS, *RIVALS):
        call = build(name, work, inputs)
        errors = parity.measure(work, call, inputs)
        wrong = {key: error for key, error in errors.items() if not error <= parity.EXACT[key]}
        if wrong:
            raise AssertionError(f"{name} is wrong: relative errors {wrong}")

        def step(call: Callable[..., Any] = call) -> Any:
            return forward_backward(lambda: call(inputs), inputs.leaves)

        steps[name] = step
        rows[name] = {"parity": errors, "extra_bytes": measure_memory(step, cpu)}
    for name, timing in measure_in_turns(steps, rounds).items():
        rows[name].update(asdict(timing))
    return rows


def verdict(value: float, target: float, at_least: bool) -> str:
    """The value beside what was promised, and whether it holds."""
    holds = value >= target if at_least else value <= target
    sign = "≥" if at_least else "≤"
    return f"{value:.3g} ({sign} {target:.3g}: {'yes' if holds else 'MISSED'})"


def table(work: Workload, rows: dict[str, dict[str, Any]]) -> Table:
    """Time and memory of each, and ours relative to each rival."""
    ours = rows[OURS]
    targets = TARGETS.get(work.images, {})
    result = Table(title=f"{work.describe()}, {torch.get_num_threads()} threads")
    for column in (
        "", "time ms", "20–80 %", "ours is faster ×", "best ms", "by best times ×", "extra MB",
        "ours needs, of it",
    ):  # fmt: skip
        result.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        faster = row["median_ms"] / ours["median_ms"]
        share = ours["extra_bytes"] / row["extra_bytes"]
        speed, memory = f"{faster:.3g}", f"{share:.3g}"
        if name != OURS and targets:
            speed = verdict(faster, targets[name], at_least=True)
            memory = verdict(share, targets["memory"], at_least=False)
        result.add_row(
            name, f"{row['median_ms']:.1f}", f"{row['low_ms']:.1f}–{row['high_ms']:.1f}", speed,
            f"{row['best_ms']:.1f}", f"{row['best_ms'] / ours['best_ms']:.3g}",
            f"{row['extra_bytes'] / 1e6:,.1f}", memory,
        )  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> int:
    """The command; always 0 unless a result is wrong: times are read, not asserted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.maxsim_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", type=int, default=64, help="images and texts (default 64)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    work = workload(arguments.size)
    rows = measure(work, arguments.rounds)
    Console(width=None if sys.stdout.isatty() else 140).print(table(work, rows))
    if arguments.json:
        command = (
            f"python -m benchmarks.maxsim_cpu --size {arguments.size} "
            f"--rounds {arguments.rounds} --threads {arguments.threads}"
        )
        document = {
            "schema": 1,
            "kind": "maxsim_cpu",
            **facts.provenance(command, torch.device("cpu")),
            "workload": work.as_json(),
            "rows": [{"contender": name, **row} for name, row in rows.items()],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The losses of plain features on a CPU against everything else that runs there, in one table.

    python -m benchmarks.feature_cpu [--size 8192] [--rounds N] [--threads 2] [--json PATH]

A training step of CLIP's and SigLIP's losses, float32, D 512, against open_clip's own,
torch.compile of those, plain PyTorch and sentence-transformers' cached loss, which is optional
(`pip install 'sentence-transformers>=6'`; Apache 2.0). The table says whether we keep to what is
promised beside open_clip's ClipLoss at batch 8,192: at most 1/20 of its extra memory, and not
slower.

Parity is asserted before anything is timed. Each round runs every contender once, so that a busy
machine slows all of them alike; best times stand beside the medians, because they suffer least from
it. Compilation is not timed. Extra memory is the peak of live tensor bytes beyond the inputs and
their gradients.

The JSON it writes:

    schema 1, kind "feature_cpu", command, date, source {commit, modified}, versions, device {...}
    rows                       one per loss and contender:
        contender op stage batch dim dtype
        status                 ok | unavailable | wrong | failed
        reason                 why, when it is not ok
        parity                 largest relative error against float32: {loss | gradients |
                               parameters}, the last of the gradients of scale and bias
        extra_bytes median_ms low_ms high_ms best_ms repeats  with the 20th and 80th percentile
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

from . import facts, feature_cpu_sections, feature_parity, parity
from .feature_cpu_sections import OURS, Row
from .feature_peers import FEATURE_PEERS
from .feature_workloads import FeatureInputs, FeatureWorkload, build, make_inputs
from .maxsim_cpu import available_memory
from .measure import forward_backward, measure_in_turns, measure_memory
from .peers import Unavailable

CPU = torch.device("cpu")
# Of the matrix of all logits in float32: the most that open_clip's losses hold at once, with a
# little to spare. Who holds less than a matrix is not asked.
LOGIT_COPIES = 6
HOLDS_NO_LOGITS = (OURS, "sentence-transformers cached")


def require_memory(contender: str, work: FeatureWorkload) -> None:
    """Raise Unavailable where a contender that holds all logits would exhaust the machine."""
    if contender in HOLDS_NO_LOGITS:
        return
    needs, has = LOGIT_COPIES * 4 * work.batch**2, available_memory()
    if needs > has:
        raise Unavailable(f"may need {needs / 1e9:.0f} GB, and {has / 1e9:.0f} GB are free")


def prepare(
    contender: str, work: FeatureWorkload, inputs: FeatureInputs
) -> tuple[Callable[[], Any], Row]:
    """What is to be timed, once it is right, and what is known of it before.

    Raises:
        Unavailable: it can not take part; the message says why.
        AssertionError: its results are wrong.
    """
    require_memory(contender, work)
    way = build(contender, work, inputs)
    errors = feature_parity.measure(work, way, inputs)
    limits = feature_parity.limits(contender, work, CPU)
    wrong = [f"{key} {error:.2g}" for key, error in errors.items() if not error <= limits[key]]
    if wrong:
        raise AssertionError(f"relative error of {', '.join(wrong)}")
    leaves = way.leaves(inputs)

    def step() -> Any:
        return forward_backward(lambda: way.loss(*inputs), leaves)

    return step, {"parity": errors, "extra_bytes": measure_memory(step, CPU)}


EMPTY_ROW = dict.fromkeys(
    ("status", "reason", "parity", "extra_bytes", "median_ms", "low_ms", "high_ms", "best_ms",
     "repeats")
)  # fmt: skip


def measure(entrants: list[tuple[str, FeatureWorkload]], rounds: int) -> list[Row]:
    """A row for each entrant. Raises when ours is wrong or fails; a rival is left out then."""
    rows: list[Row] = []
    steps: dict[str, Callable[[], Any]] = {}
    inputs = {work: make_inputs(work, CPU) for _, work in entrants}
    for contender, work in entrants:
        row: Row = {"contender": contender, **work.as_json(), **EMPTY_ROW}
        try:
            steps[f"{contender} {work.op}"], known = prepare(contender, work, inputs[work])
            row.update(known, status="ok")
        except Unavailable as error:
            row.update(status="unavailable", reason=str(error))
        except Exception as error:  # other people's code can fail in any way
            if contender == OURS:
                raise
            status = "wrong" if isinstance(error, AssertionError) else "failed"
            row.update(status=status, reason=parity.first_line(error))
        rows.append(row)
    timings = measure_in_turns(steps, rounds)
    for row in rows:
        if row["status"] == "ok":
            row.update(asdict(timings[f"{row['contender']} {row['op']}"]))
    return rows


def show(rows: list[Row], console: Console) -> None:
    """The table and its footer."""
    head = feature_cpu_sections.HEAD
    result = Table(title=f"{feature_cpu_sections.title(rows)}, {torch.get_num_threads()} threads")
    for column in head:
        result.add_column(column, justify="left" if column in ("", "loss") else "right")
    for group in feature_cpu_sections.by_loss(rows).values():
        for cells in feature_cpu_sections.table(group):
            result.add_row(*cells)
        result.add_section()
    console.print(result)
    for line in feature_cpu_sections.footer(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """The command; always 0 unless our result is wrong: times are read, not asserted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feature_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", type=int, default=8192, help="pairs in the batch (default 8192)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 170)
    rows = measure(feature_cpu_sections.entrants(arguments.size), arguments.rounds)
    show(rows, console)
    if arguments.json:
        command = (
            f"python -m benchmarks.feature_cpu --size {arguments.size} "
            f"--rounds {arguments.rounds} --threads {arguments.threads}"
        )
        document: dict[str, Any] = {
            "schema": 1, "kind": "feature_cpu", **facts.provenance(command, CPU), "rows": rows,
        }  # fmt: skip
        document["versions"] |= {peer.package: peer.version() for peer in FEATURE_PEERS}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rivals on a CPU: what every table of a CPU does, whatever its rows are about.

Each is made ready (parity and memory) before any is timed, and then each round runs every one once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from . import facts, parity
from .measure import measure_in_turns
from .peers import Unavailable

CPU = torch.device("cpu")
Row = dict[str, Any]

EMPTY_ROW = dict.fromkeys(
    ("status", "reason", "parity", "extra_bytes", "median_ms", "low_ms", "high_ms", "best_ms",
     "repeats")
)  # fmt: skip


class Rival(NamedTuple):
    """A row to be.

    Attributes:
        known: what the row says whatever happens: contender and work.
        ours: a wrong result, or a failure, is then an error and not a row.
        prepare: gives what is to be timed, once it is right, and what is known of it before. Raises
            Unavailable where it can not take part, AssertionError where its results are wrong.
    """

    known: Row
    ours: bool
    prepare: Callable[[], tuple[Callable[[], Any], Row]]


def require_memory(needs: float) -> None:
    """Raise Unavailable where so many bytes would exhaust the machine."""
    has = available_memory()
    if needs > has:
        raise Unavailable(f"may need {needs / 1e9:.0f} GB, and {has / 1e9:.0f} GB are free")


def available_memory() -> float:
    """Bytes that can be had without swapping, as far as the system says."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def require_right(errors: dict[str, float], limits: dict[str, float]) -> None:
    """Raise AssertionError if a result is wrong."""
    wrong = [f"{key} {error:.2g}" for key, error in errors.items() if not error <= limits[key]]
    if wrong:
        raise AssertionError(f"relative error of {', '.join(wrong)}")


def measure(rivals: Sequence[Rival], rounds: int) -> list[Row]:
    """A row for each. Raises when ours is wrong or fails; another is left out then."""
    rows: list[Row] = []
    steps: dict[str, Callable[[], Any]] = {}
    for at, rival in enumerate(rivals):
        row: Row = {**rival.known, **EMPTY_ROW}
        try:
            steps[str(at)], known = rival.prepare()
            row.update(known, status="ok")
        except Unavailable as error:
            row.update(status="unavailable", reason=str(error))
        except Exception as error:  # other people's code can fail in any way
            if rival.ours:
                raise
            status = "wrong" if isinstance(error, AssertionError) else "failed"
            row.update(status=status, reason=parity.first_line(error))
        rows.append(row)
    for at, timing in measure_in_turns(steps, rounds).items():
        rows[int(at)].update(asdict(timing))
    return rows


def console() -> Console:
    """Wide enough for the tables where the output is not a terminal, too."""
    return Console(width=None if sys.stdout.isatty() else 170)


def show(
    title: str,
    head: Sequence[str],
    groups: Iterable[Iterable[Sequence[str]]],
    footer: Iterable[str],
    on: Console,
    words: Sequence[str] = ("",),
) -> None:
    """A table, its groups of rows apart, and its footer; the columns of `words` stand left."""
    result = Table(title=f"{title}, {torch.get_num_threads()} threads")
    for column in head:
        result.add_column(column, justify="left" if column in words else "right")
    for group in groups:
        for cells in group:
            result.add_row(*cells)
        result.add_section()
    on.print(result)
    for line in footer:
        on.print(line, markup=False, highlight=False, soft_wrap=True)


def write(path: Path, kind: str, schema: int, command: str, rows: list[Row], **versions: Any):
    """The JSON; `versions` are those of other packages that took part."""
    document: dict[str, Any] = {
        "schema": schema, "kind": kind, **facts.provenance(command, CPU), "rows": rows,
    }  # fmt: skip
    document["versions"] |= versions
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")

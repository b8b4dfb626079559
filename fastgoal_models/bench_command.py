"""`fastgoal bench`: the sweep of `python -m benchmarks.device`, with a table and a picture.

The sweep itself is in the repository's `benchmarks`, which no installation carries: it measures
sources, and says of which commit they are. So this command works from a checkout (an editable
installation, or `python -m fastgoal_models bench` there), and elsewhere says so.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .devices import parse_device
from .errors import ConfigError

JSON, PICTURE = "bench.json", "bench.png"

# Seconds after which no row starts. What a CPU may not reach by then is torch.compile, which comes
# last there, because compiling takes longer than everything else.
BUDGET = {"cpu": 90.0, "cuda": 450.0}

SHOWN = 10  # lost races on the screen
TIMES = ("median_ms", "low_ms", "high_ms")

Row = dict[str, Any]
Document = dict[str, Any]


@dataclass(frozen=True)
class BenchOptions:
    """The options of `fastgoal bench`; `command` is how it was called, for the result."""

    out: Path
    quick: bool = False
    device: str | None = None
    budget: float | None = None
    command: str = "fastgoal bench"


class Outcome(NamedTuple):
    """`finished`: not interrupted; `right`: no backend of ours was wrong, or failed."""

    finished: bool
    right: bool


def run_bench(options: BenchOptions, console: Console) -> Outcome:
    """Measure, show, and write `bench.json` and `bench.png` into `options.out`.

    Ctrl-C ends the measuring; what was measured by then is shown and written all the same.

    Raises:
        ConfigError: there is no checkout around this package, or the device is not here.
        OSError: `options.out` can not be written.
    """
    require_checkout()
    from benchmarks import device as sweep
    from benchmarks import report

    device = parse_device(options.device)
    if device.type not in BUDGET:
        raise ConfigError(f"device {device} can not be measured: only CPUs and CUDA devices can")
    if device.type == "cuda":  # events are recorded on the current device
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
    total = len(sweep.planned(device.type == "cuda", options.quick))
    budget = BUDGET[device.type] if options.budget is None else options.budget
    console.print(
        f"{total} measurements on {device}; none starts after {budget:.0f} s. Ctrl-C shows what "
        "there is by then.",
        soft_wrap=True,
    )
    _say_if_busy(console)
    with _progress(total, console) as on_row:
        document = sweep.measure_sweep(
            device,
            options.out / JSON,
            options.command,
            quick=options.quick,
            budget=budget,
            say=lambda text: None,  # the table says it again, better
            on_row=lambda row, work: on_row(row),
        )
    console.print(f"\n[bold]{escape(report.describe_machine(document))}[/]", soft_wrap=True)
    if options.quick:
        console.print(
            "[yellow]--quick: sizes so tiny that mostly the fixed cost of a call is measured.[/]"
        )
    ours = report.our_default(document)
    for rows in report.races(document["rows"]):
        if rows[0]["stage"] != "forward":  # only ours takes part in these; they are in the JSON
            _show_race(rows, ours, report.describe_race(rows[0]), console)
    _show_footer(document, report.losses(document), console, races=not options.quick)
    _write_picture(document, options.out, console)
    console.print(f"Every figure: {escape(str(options.out / JSON))}", soft_wrap=True)
    return Outcome(document["finished"], not sweep.wrong_or_failed(document))


def require_checkout() -> None:
    """Make `benchmarks` importable from the checkout around this package.

    Raises:
        ConfigError: this package was installed without its repository.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "device.py").is_file():
        raise ConfigError(
            "the benchmarks are in FastGOAL's repository, and this is an installation without it. "
            "Fix: git clone the repository, and there pip install -e '.[bench]' and fastgoal bench"
        )
    # In front: `benchmarks` is a name that other people's packages leave lying about, too.
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))


def _say_if_busy(console: Console) -> None:
    """Times of a busy machine are those of the others, too."""
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        console.print(
            f"[yellow]This machine is busy: a load of {load:.1f} on {cores} cores. Times suffer "
            "from that, some more than others; memory does not.[/]",
            soft_wrap=True,
        )


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Any]:
    """A function to call with each row: a bar on a terminal, elsewhere a line now and then."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=total)
    done = count(1)

    def on_row(row: Row) -> None:
        number = next(done)
        if not console.is_terminal and (number % 10 == 0 or number == total):
            console.print(f"{number} of {total} done", highlight=False)
        bar.update(task, advance=1, description=f"{escape(row['contender'])}: {row['op']}")

    with bar:
        yield on_row


def _show_race(rows: list[Row], ours: str, title: str, console: Console) -> None:
    """The contenders that were measured, beside our best."""
    measured = [row for row in rows if row["status"] == "ok"]
    if not measured:
        return
    own = [row for row in measured if row["contender"] == ours]
    best = min(own, key=lambda row: row["median_ms"], default=None)
    console.print(f"\n{escape(title)}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=True)
    table.add_column("", overflow="fold")
    for column in ("ms (20–80 %)", "ours is", "extra MB", "ours needs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in measured:
        name = escape(row["label"])
        table.add_row(
            f"[bold]{name}[/]" if row["contender"] == ours else name,
            "{} ({}–{})".format(*(_three_digits(row[key]) for key in TIMES)),
            "" if row is best or best is None else _faster(row, best),
            _three_digits(row["extra_bytes"] / 1e6),
            "" if row is best or best is None else _share(row, best),
        )
    console.print(table, highlight=False)


def _three_digits(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _faster(row: Row, best: Row) -> str:
    times = row["median_ms"] / best["median_ms"]
    return f"{times:.1f} × faster" if times >= 1 else f"[yellow]{1 / times:.1f} × slower[/]"


def _share(row: Row, best: Row) -> str:
    """Of this row's extra memory, what ours needs."""
    mine, theirs = best["extra_bytes"], row["extra_bytes"]
    if mine == 0 or theirs == 0:
        return "" if theirs == 0 else "nothing"
    return f"1/{theirs / mine:.1f}" if theirs >= mine else f"[yellow]{mine / theirs:.1f} ×[/]"


def _show_footer(document: Document, lost: list[str], console: Console, races: bool) -> None:
    """How many rows of whom are missing and why, what is wrong, and which `races` we lost."""

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    console.print()
    missing: dict[str, Counter[str]] = {}
    for row in document["rows"]:
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['reason'].removeprefix(row['op'] + ': ')}"
            missing.setdefault(reason, Counter())[row["contender"]] += 1
    for reason, names in missing.items():
        line(f"{reason}: {', '.join(f'{name} × {rows}' for name, rows in names.items())}")
    for check in document["checks"]:
        if check["status"] in ("wrong", "failed"):
            what = check["reason"] or f"error {check['error']:.1e}"
            line(f"check {check['name']}: {check['status']}: {what}", "bold red")
    if not races:  # whose sizes mean nothing
        pass
    elif lost:
        line(f"Lost races: {len(lost)}", "yellow")
        for text in lost[:SHOWN]:
            line(f"  {text}")
        if len(lost) > SHOWN:
            line(f"  and {len(lost) - SHOWN} more")
    elif any(_is_rival(row) for row in document["rows"]):
        line("Of those measured, nobody was faster than ours, or needed less memory.")
    if not document["finished"]:
        line("Interrupted: the other rows were not measured.", "yellow")


def _is_rival(row: Row) -> bool:
    return row["status"] == "ok" and not row["contender"].startswith("fastgoal ")


def _write_picture(document: Document, out: Path, console: Console) -> None:
    from benchmarks import report

    try:
        path = report.plot({**document, "stem": Path(PICTURE).stem}, out)
    except ModuleNotFoundError as error:
        text = f"No picture: {error}. Fix: pip install matplotlib"
    else:
        text = "No picture: no training step was measured" if path is None else f"Picture: {path}"
    console.print(escape(text), highlight=False, soft_wrap=True)

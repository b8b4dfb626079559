"""`fastgoal bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .exits import EXIT_INTERRUPTED, EXIT_NOT_WELL, command_line, user_errors
from .shared_options import DeviceOption


def bench(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the picture.")] = Path(
        "fastgoal-bench"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes, in seconds: does everything run?")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which nothing starts. Default: 90, on a GPU 450."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Measure our losses against plain PyTorch and other libraries: time and extra memory.

    Needs a checkout of the repository. Takes about a minute on a CPU, where the sizes are small,
    and under eight on a GPU. Exit code 0: done; 1: a backend of ours was wrong.
    """
    console = Console()
    with user_errors(extra="bench"):
        from ..bench_command import BenchOptions, run_bench

        options = BenchOptions(
            out=out, quick=quick, device=device, budget=budget, command=command_line()
        )
        outcome = run_bench(options, console)
    if not outcome.finished:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not outcome.right:
        raise typer.Exit(EXIT_NOT_WELL)

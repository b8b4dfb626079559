"""`fastgoal demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .exits import command_line, say_how_to_resume, user_errors
from .shared_options import (
    DeviceOption,
    Precision,
    PrecisionOption,
    PretrainedOption,
    ResumeOption,
    SeedOption,
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("fastgoal-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 120,
    batch_size: Annotated[int, typer.Option(min=2, help="Photographs a step.")] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="An open_clip model name. Default: a small ViT made for this demo."),
    ] = None,
    pretrained: PretrainedOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Fine-tune a small CLIP on real photographs and write a report with pictures.

    Takes one to two minutes on two CPU cores that have nothing else to do. Downloads nothing,
    unless --pretrained names weights that are not here.
    """
    console = Console()
    with user_errors(extra="demo"):  # its photographs come in what only that extra installs
        from ..demo.run import DemoOptions, run_demo

        result = run_demo(
            DemoOptions(
                out=out,
                steps=steps,
                batch_size=batch_size,
                model=model,
                pretrained=pretrained,
                seed=seed,
                resume=resume,
                device=device,
                precision=precision.value,
                command=command_line(),
            ),
            console,
        )
    if result is None:
        say_how_to_resume(console)

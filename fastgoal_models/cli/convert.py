"""`fastgoal convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .exits import user_errors
from .shared_options import ForceOption


class Layout(str, Enum):
    open_clip = "open-clip"
    hf = "hf"


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Weights file, a folder with one, or that of a run or a checkpoint."),
    ],
    target: Annotated[
        Path,
        typer.Argument(help="A .safetensors file; for hf also a folder, with config.json then."),
    ],
    to: Annotated[Layout, typer.Option(help="The layout to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="open_clip model name, or a JSON config, of open_clip weights: config.json needs "
            "its heads and activation. Default: what `fastgoal train` noted with its checkpoint."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Convert CLIP weights between Hugging Face's layout and open_clip's, without loss.

    Reads safetensors, and PyTorch files without running code that they may hold; also GOAL's
    checkpoints, and texts of 248 positions.
    """
    with user_errors():
        from ..convert_command import ConvertOptions, run_convert

        run_convert(ConvertOptions(source, target, to.value, model, force), Console())

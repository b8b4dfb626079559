"""`fastgoal interpolate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .exits import user_errors
from .shared_options import ForceOption


def interpolate(
    old: Annotated[
        Path,
        typer.Argument(
            help="Weights file, the folder of a run or of a checkpoint, or, with --old-pretrained, "
            "an open_clip model name."
        ),
    ],
    new: Annotated[
        Path, typer.Argument(help="Weights file, or the folder of a run or of a checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="A .safetensors file.")],
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Share of NEW: 0 is OLD, 1 is NEW.")
    ] = 0.5,
    old_pretrained: Annotated[
        str | None,
        typer.Option(
            help="An open_clip tag of OLD, e.g. openai, or its weights file, where OLD is a name."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Mix the weights of a model before and after fine-tuning (WiSE-FT), to keep some of both.

    Texts of OLD that have fewer positions are stretched as training does.
    """
    with user_errors():
        from ..interpolate import InterpolateOptions, run_interpolate

        options = InterpolateOptions(old, new, out, alpha, old_pretrained, force)
        run_interpolate(options, Console())

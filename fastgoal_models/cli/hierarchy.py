"""`fastgoal hierarchy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .exits import user_errors
from .shared_options import SuperpixelMaker


def hierarchy(
    image: Annotated[Path, typer.Argument(help="A photograph.")],
    caption: Annotated[str, typer.Argument(help="Its caption, one to many sentences.")],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="CAFT weights, or the folder of a run of `fastgoal train caft` or of one of its "
            "checkpoints."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("hierarchy.png"),
    model: Annotated[
        str | None,
        typer.Option(help="caft-b, ... or a JSON file. Default: what the folder notes, or caft-b."),
    ] = None,
    superpixels: Annotated[
        SuperpixelMaker | None, typer.Option(help="Default: what the folder notes, or sfcn.")
    ] = None,
) -> None:
    """Draw what a CAFT found: segments level by level, and where each part of a caption looks."""
    with user_errors():
        from ..caft.picture_command import draw_hierarchy

        kind = None if superpixels is None else superpixels.value
        name = draw_hierarchy(image, caption, checkpoint, out, model, kind)
    Console().print(escape(f"{name}: {out} written"), soft_wrap=True)

"""`fastgoal maps`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .exits import user_errors
from .shared_options import (
    ContextOption,
    DeviceOption,
    ModelOption,
    PretrainedOption,
    RootOption,
)


def maps(
    model: ModelOption,
    data: Annotated[
        Path, typer.Option(help="One JSON object a line: image, caption; with pairs their boxes.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    pretrained: PretrainedOption = None,
    root: RootOption = None,
    before: Annotated[
        str | None, typer.Option(help="Another model to draw beside it, e.g. the untrained one.")
    ] = None,
    before_pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file of --before.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Records to draw, from the first on.")] = 8,
    context_length: ContextOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw matched pairs, which patches sentences resemble, and where the class token looks.

    One picture a record, of one model or of two: before and after training. Of a CAFT,
    `fastgoal hierarchy` draws what it found.
    """
    with user_errors():
        from ..maps_command import MapsOptions, run_maps

        run_maps(
            MapsOptions(
                model=model,
                data=data,
                out=out,
                pretrained=pretrained,
                root=root,
                before=before,
                before_pretrained=before_pretrained,
                limit=limit,
                context_length=context_length,
                device=device,
            ),
            Console(),
        )

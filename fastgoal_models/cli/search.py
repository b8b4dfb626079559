"""`fastgoal search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..json_output import console_beside
from .exits import command_line, user_errors
from .shared_options import (
    ContextOption,
    DeviceOption,
    ImagesAtOnceOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
    PublishedOption,
)


def search(
    query: Annotated[str, typer.Argument(help="A text, as long as you like.")],
    images: Annotated[Path, typer.Argument(help="A folder of images, or an index of one.")],
    model: ModelOption,
    pretrained: PretrainedOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many images.")] = 12,
    score: Annotated[
        str | None,
        typer.Option(
            help="global: whole features; maxsim: word by word; reranked: both, for the hundred "
            "best. Default: reranked. A CAFT has its blended score."
        ),
    ] = None,
    published: PublishedOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Also draw a contact sheet, e.g. sheet.png.")
    ] = None,
    json_path: JsonOption = None,
    context_length: ContextOption = None,
    batch_size: ImagesAtOnceOption = 64,
    device: DeviceOption = None,
) -> None:
    """Find images for a long text."""
    with user_errors():
        from ..search_command import ModelOptions, run_search

        options = ModelOptions(model, pretrained, context_length, batch_size, device)
        console = console_beside(json_path)
        command = command_line()
        run_search(query, images, k, score, published, options, out, json_path, command, console)

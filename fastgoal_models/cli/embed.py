"""`fastgoal embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..json_output import console_beside
from .exits import command_line, user_errors
from .shared_options import (
    ContextOption,
    DeviceOption,
    ForceOption,
    ImagesAtOnceOption,
    JsonOption,
    ModelOption,
    PretrainedOption,
)


def embed(
    images: Annotated[Path, typer.Argument(help="A folder of images.")],
    out: Annotated[Path, typer.Option(help="The index to write, a .safetensors file.")],
    model: ModelOption,
    pretrained: PretrainedOption = None,
    context_length: ContextOption = None,
    batch_size: ImagesAtOnceOption = 64,
    device: DeviceOption = None,
    force: ForceOption = False,
    json_path: JsonOption = None,
) -> None:
    """Embed a folder of images once, so that `fastgoal search` need not."""
    with user_errors():
        from ..search_command import ModelOptions, run_embed

        options = ModelOptions(model, pretrained, context_length, batch_size, device)
        console = console_beside(json_path)
        run_embed(images, out, options, force, json_path, command_line(), console)

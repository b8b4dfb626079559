"""`fastgoal unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..json_output import console_beside
from .exits import command_line, user_errors
from .shared_options import JsonOption


def unpack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of Dataset.save_to_disk, of parquet files or of images, the name of a "
            "dataset on the Hugging Face hub, or webdataset shards: 'part-*.tar', in quotes."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for images/ and captions.jsonl.")],
    split: Annotated[
        str | None, typer.Option(help="Of a dataset, e.g. test. Default: the only one.")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Of a dataset that has several configurations.")
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="Of a dataset; a shard's image is found by its ending.")
    ] = "image",
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of a dataset or key of a shard's JSON, e.g. longSV_captions; a shard's "
            ".txt is its caption. Give it several times for several captions an image. "
            "Default: caption.",
            show_default=False,
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Column or key with an image's own id. Default: the row's number, a shard's id or "
            "the sample's name."
        ),
    ] = None,
    keep_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Also keep this column, several times for more. Of a shard's JSON all is kept.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Turn a dataset or shards into images and a captions.jsonl, as the other commands read them.

    Images stay the files that their authors made. Stop it whenever you like: the same command goes
    on where it was.
    """
    with user_errors():
        from ..unpack import Columns, UnpackOptions
        from ..unpack.command import run_unpack

        columns = Columns(
            image=image_column,
            captions=tuple(caption_column or Columns.captions),
            id=id_column,
            keep=tuple(keep_column or ()),
        )
        options = UnpackOptions(columns, split, subset, limit)
        run_unpack(source, out, options, json_path, command_line(), console_beside(json_path))

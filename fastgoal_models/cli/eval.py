"""`fastgoal eval`."""

from __future__ import annotations

from enum import Enum
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


class Resize(str, Enum):
    own = "own"
    squash = "squash"


def evaluate(
    model: ModelOption,
    pretrained: PretrainedOption = None,
    data: Annotated[
        Path | None,
        typer.Option(help="One JSON object a line: image and caption; or a GLIT file."),
    ] = None,
    set_name: Annotated[
        str | None,
        typer.Option("--set", help="Or a set in its official layout: docci, dci, coco ..."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the set, or of --data's images.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Also classify: a folder with a folder for each class.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="Another model to stand beside it, e.g. the untrained one.")
    ] = None,
    before_pretrained: Annotated[
        str | None, typer.Option(help="Tag or weights file of --before.")
    ] = None,
    trained_on: Annotated[
        list[Path] | None,
        typer.Option(
            help="Annotations that were trained on: is a test image among them? Default: what the "
            "run in --model notes, and the runs that it started from."
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="CLIP: global, maxsim. CAFT: whole, blended, reranked."),
    ] = None,
    resize: Annotated[
        Resize,
        typer.Option(
            help="own: as the model's own evaluation and published figures, CLIP's is a centre "
            "crop; squash: as we train."
        ),
    ] = Resize.own,
    published: PublishedOption = None,
    sheets: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures of what captions found, right and wrong marked."),
    ] = None,
    context_length: ContextOption = None,
    batch_size: ImagesAtOnceOption = 64,
    device: DeviceOption = None,
    json_path: JsonOption = None,
) -> None:
    """Evaluate a model: retrieval both ways, with what papers report beside it.

    With local pairs in --data also mAP on pictures and regions, and whether sentences look into
    their boxes.
    """
    with user_errors():
        from ..eval_command import EvalOptions, run_eval

        run_eval(
            EvalOptions(
                model=model,
                pretrained=pretrained,
                before=before,
                before_pretrained=before_pretrained,
                data=data,
                set_name=set_name,
                root=root,
                classes=classes,
                trained_on=tuple(trained_on or ()),
                score=score,
                resize=resize.value,
                published=published,
                context_length=context_length,
                batch_size=batch_size,
                device=device,
                sheets=sheets,
                json_path=json_path,
                command=command_line(),
            ),
            console_beside(json_path),
        )

"""`fastgoal prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..json_output import console_beside
from .exits import command_line, user_errors
from .shared_options import (
    DeviceOption,
    JsonOption,
    ModelOption,
    Precision,
    PrecisionOption,
    PretrainedOption,
    RootOption,
)


def prepare(
    data: Annotated[Path, typer.Option(help="One JSON object a line: image and caption.")],
    out: Annotated[Path, typer.Option(help="The GLIT file to write.")],
    root: RootOption = None,
    model: ModelOption = "ViT-B-16",
    pretrained: PretrainedOption = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="transformers:NAME_OR_FOLDER, torchvision:ARCHITECTURE=WEIGHTS, or a .jsonl file "
            "of boxes. Default: only the five fixed regions."
        ),
    ] = None,
    detector_only: Annotated[
        bool, typer.Option("--detector-only", help="Leave the five fixed regions out.")
    ] = False,
    most_boxes: Annotated[
        int, typer.Option(min=1, help="Boxes of the detector that are kept, the surest.")
    ] = 32,
    least_score: Annotated[
        float | None,
        typer.Option(
            help="Score that a detector's box must have. Default: 0.5; of a .jsonl file, all."
        ),
    ] = None,
    least_area: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the picture a detector's box must have.")
    ] = 0.0,
    keep_pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Best pairs to keep. Default: one for every sentence."),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Cut captions at every full stop, as published code does."
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="Make only a share of the parts, e.g. 2/8; the last one joins them."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops encoded at once.")] = 64,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.auto,
    json_path: JsonOption = None,
) -> None:
    """Find local pairs: which sentence of a caption tells of which part of its picture.

    Stop it whenever you like: the same command goes on where it was.
    """
    with user_errors():
        from ..flism import RegionRules
        from ..prepare_command import PrepareOptions, run_prepare

        run_prepare(
            PrepareOptions(
                data=data,
                out=out,
                root=root,
                model=model,
                pretrained=pretrained,
                detector=detector,
                least_score=least_score,
                rules=RegionRules(not detector_only, most_boxes, least_area),
                keep_pairs=keep_pairs,
                published=published,
                shard=shard,
                batch_size=batch_size,
                device=device,
                bfloat16=None if precision is Precision.auto else precision is Precision.bf16,
            ),
            json_path,
            command_line(),
            console_beside(json_path),
        )

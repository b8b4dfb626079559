"""Options that several commands have, and their values."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Precision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class SuperpixelMaker(str, Enum):
    sfcn = "sfcn"
    slic = "slic"
    grid = "grid"


DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")
]
PrecisionOption = Annotated[
    Precision, typer.Option(help="auto: bf16 where a GPU has it, else float32.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Weights (if random) and data order.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")
]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder of the images. Default: that of --data.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        help="open_clip model name, a JSON config, or the folder of a run of `fastgoal train`."
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(min=3, help="Tokens of a text. Default: as many as the weights have."),
]
PretrainedOption = Annotated[
    str | None,
    typer.Option(help="An open_clip tag of --model, or a weights file. Default: random weights."),
]
PublishedOption = Annotated[
    bool | None,
    typer.Option(
        "--published/--no-published",
        help="CAFT: cut texts as the published code does. Default: as it was trained, released "
        "weights as published.",
    ),
]
ImagesAtOnceOption = Annotated[int, typer.Option(min=1, help="Images encoded at once.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write what was found here; - is the standard output."),
]

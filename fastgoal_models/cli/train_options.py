"""Options that both training commands have, their values, and which of them were typed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class TrainPrecision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def _number_or_all(value: str | int) -> int | None:
    if value == "all":
        return None
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise typer.BadParameter(f"{value!r} is neither a number from 1 nor all")
    return number


RunFolderOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for checkpoints, the log and config.yaml. Needed.", show_default=False
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="Options from a file, e.g. a run's config.yaml; those typed here win."),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Default: the preset's, or the number of records where there are fewer.",
    ),
]
LearningRateOption = Annotated[float | None, typer.Option(min=0, help="Default: the preset's.")]
EmaOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Keep a moving average of the weights with this decay, e.g. 0.999: what is evaluated, "
        "and what is loaded of the run.",
    ),
]
SaveEveryOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps between checkpoints, of which --keep stay. Default: only at the end.",
    ),
]
KeepOption = Annotated[
    int | None,
    typer.Option(
        parser=_number_or_all,
        metavar="N|all",
        help="Checkpoints that stay, the newest; older ones are deleted.",
    ),
]
EvalDataOption = Annotated[
    Path | None,
    typer.Option(
        help="Annotations to measure retrieval on during training, into eval.jsonl. It changes "
        "nothing else."
    ),
]
EvalRootOption = Annotated[
    Path | None, typer.Option(help="Folder of their images. Default: that of --eval-data.")
]
EvalEveryOption = Annotated[
    int | None, typer.Option(min=1, help="Steps between evaluations. Default: only at the end.")
]
KeepBestOption = Annotated[
    bool,
    typer.Option(
        "--keep-best", help="Also keep the checkpoint with the best mean R@1: see best.json."
    ),
]
NumWorkersOption = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also write curves below --out for TensorBoard.")
]
WandbOption = Annotated[bool, typer.Option("--wandb", help="Also send curves to Weights & Biases.")]


def typed(ctx: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training run that were typed, by the names that configuration files use."""
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in values.items()
        if name not in ("ctx", "config", "resume", "json_path") and _was_typed(ctx, name)
    }


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

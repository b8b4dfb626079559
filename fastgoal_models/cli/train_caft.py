"""`fastgoal train caft`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..json_output import console_beside
from .exits import command_line, say_how_to_resume, user_errors
from .shared_options import (
    DeviceOption,
    JsonOption,
    ResumeOption,
    RootOption,
    SeedOption,
    SuperpixelMaker,
)
from .train_options import (
    BatchSizeOption,
    ConfigOption,
    EmaOption,
    EvalDataOption,
    EvalEveryOption,
    EvalRootOption,
    KeepBestOption,
    KeepOption,
    LearningRateOption,
    NumWorkersOption,
    RunFolderOption,
    SaveEveryOption,
    StepsOption,
    TensorBoardOption,
    TrainPrecision,
    WandbOption,
    typed,
)


class CaftPreset(str, Enum):
    default = "default"
    caft_b_3m = "caft-b-3m"
    caft_b_12m = "caft-b-12m"
    caft_b_15m = "caft-b-15m"
    caft_b_30m = "caft-b-30m"


class Negatives(str, Enum):
    all = "all"
    sample = "sample"


def train_caft(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="One JSON object a line: image, and caption or DreamLIP's caption keys. Or "
            "webdataset shards with those keys: 'part-*.tar' or 'part-{000..099}.tar', in quotes. "
            "Needed.",
            show_default=False,
        ),
    ] = None,
    out: RunFolderOption = None,
    config: ConfigOption = None,
    root: RootOption = None,
    model: Annotated[
        str, typer.Option(help="caft-b, caft-s, caft-xs, or a JSON configuration.")
    ] = "caft-b",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights, or a run's folder, to start from. Default: random weights."),
    ] = None,
    superpixels: Annotated[
        SuperpixelMaker, typer.Option(help="sfcn: CAFT's network, from --checkpoint.")
    ] = SuperpixelMaker.slic,
    negatives: Annotated[
        Negatives | None, typer.Option(help="Of the text-conditioned loss. Default: the preset's.")
    ] = None,
    preset: Annotated[
        CaftPreset,
        typer.Option(
            help="caft-b-3m ... caft-b-30m: the published recipes, of CAFT-B, whose batch is 2,048 "
            "images."
        ),
    ] = CaftPreset.default,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Keep the published habits: sentence cuts, superpixel statistics."
        ),
    ] = False,
    steps: StepsOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Or passes over the data. Default: the preset's.")
    ] = None,
    batch_size: BatchSizeOption = None,
    lr: LearningRateOption = None,
    ema: EmaOption = None,
    save_every: SaveEveryOption = None,
    keep: KeepOption = 2,
    eval_data: EvalDataOption = None,
    eval_root: EvalRootOption = None,
    eval_every: EvalEveryOption = None,
    keep_best: KeepBestOption = False,
    num_workers: NumWorkersOption = 0,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile the towers: a slow start, fast steps."),
    ] = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: Annotated[
        TrainPrecision | None, typer.Option(help="Default: the preset's; auto is bf16 on a GPU.")
    ] = None,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = False,
    json_path: JsonOption = None,
) -> None:
    """Train a CAFT on your own images with long and short captions."""
    given = typed(ctx, locals())
    console = console_beside(json_path)
    with user_errors():
        from ..caft.train_command import METHOD, run_caft_training

        result = run_caft_training(
            *METHOD.resolve(given, config),
            console,
            resume=resume,
            json_path=json_path,
            command=command_line(),
        )
    if result.interrupted:
        say_how_to_resume(console)

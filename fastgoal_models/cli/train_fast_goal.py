"""`fastgoal train fast-goal`."""

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
    ModelOption,
    PretrainedOption,
    ResumeOption,
    RootOption,
    SeedOption,
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


class Preset(str, Enum):
    default = "default"
    published = "published"
    fast_goal_b16 = "fast-goal-b16"
    fast_goal_l14 = "fast-goal-l14"
    goal_b16 = "goal-b16"


class Pairs(str, Enum):
    best = "best"
    uniform = "uniform"
    weighted = "weighted"


class LongCaptions(str, Enum):
    cut = "cut"
    chunk = "chunk"


def train_fast_goal(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Annotations in the GLIT format, one JSON a line; or webdataset shards, "
            "'part-*.tar' or 'part-{000..099}.tar', with such an object and an image a sample. "
            "Needed.",
            show_default=False,
        ),
    ] = None,
    out: RunFolderOption = None,
    config: ConfigOption = None,
    root: RootOption = None,
    model: ModelOption = "ViT-B-16",
    pretrained: PretrainedOption = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=3, help="Tokens of a caption. Default: 248, or those of the run."),
    ] = None,
    preset: Annotated[
        Preset,
        typer.Option(
            help="published: the paper's optimizer (lr 5e-6, weight decay 0.05 on everything, "
            "cosine without warm-up, no clipping, batch 256, 10 epochs). fast-goal-b16 and -l14: "
            "the same on OpenAI's ViT-B-16 and ViT-L-14. goal-b16: with GOAL's batches of 16."
        ),
    ] = Preset.default,
    steps: StepsOption = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Or passes over the data. Default: 10.")
    ] = None,
    batch_size: BatchSizeOption = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Encode this many records at a time, for batches that do not fit in memory. The "
            "loss still sees the whole batch. Default: all of it at once.",
        ),
    ] = None,
    lr: LearningRateOption = None,
    ema: EmaOption = None,
    unlocked_image_blocks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Train only this many last blocks of the image tower, with its final norm and "
            "projection; 0 locks the tower. Default: all of it trains.",
        ),
    ] = None,
    unlocked_text_blocks: Annotated[
        int | None, typer.Option(min=0, help="The same for the text tower.")
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train LoRA adapters of this rank in both towers and nothing else: queries, keys "
            "and values of the attention and both layers of the MLP, not the attention's output "
            "layer. Checkpoints hold merged weights. Needs peft, of the extra lora.",
        ),
    ] = None,
    pairs: Annotated[
        Pairs,
        typer.Option(
            help="Local pair of a record: the best, or one of its --top-k best that is drawn each "
            "epoch, uniformly or weighted by similarity."
        ),
    ] = Pairs.best,
    top_k: Annotated[int, typer.Option(min=1, help="Pairs that --pairs draws from.")] = 3,
    long_captions: Annotated[
        LongCaptions,
        typer.Option(
            help="Captions past the context: cut them, or train on all of it in chunks of whole "
            "sentences."
        ),
    ] = LongCaptions.cut,
    save_every: SaveEveryOption = None,
    keep: KeepOption = 2,
    eval_data: EvalDataOption = None,
    eval_root: EvalRootOption = None,
    eval_every: EvalEveryOption = None,
    keep_best: KeepBestOption = False,
    num_workers: NumWorkersOption = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse the data if one record is unusable.")
    ] = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: Annotated[
        TrainPrecision, typer.Option(help="auto: bf16 where a GPU has it, else float32.")
    ] = TrainPrecision.auto,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = False,
    json_path: JsonOption = None,
) -> None:
    """Fine-tune an open_clip model on your own images and long captions."""
    given = typed(ctx, locals())
    console = console_beside(json_path)
    with user_errors():
        from ..train_command import METHOD, run_training

        result = run_training(
            *METHOD.resolve(given, config),
            console,
            resume=resume,
            json_path=json_path,
            command=command_line(),
        )
    if result.interrupted:
        say_how_to_resume(console)

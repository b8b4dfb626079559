"""The `fastgoal` command. Exit codes: 0 done, 2 the user's input is at fault, 130 Ctrl-C."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fastgoal_kernels import __version__

from .checkpoints import CheckpointError
from .glit import GlitError
from .train_command import TrainOptions, run_training
from .training import ConfigError, TrainingError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="fastgoal",
    help="Fine-tune CLIP on long captions with FAST-GOAL.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Precision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Preset(str, Enum):
    default = "default"
    published = "published"


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
PretrainedOption = Annotated[
    str | None,
    typer.Option(help="An open_clip tag of --model, or a weights file. Default: random weights."),
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastgoal {__version__}")
        raise typer.Exit


@app.callback()
def _fastgoal(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("fastgoal-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 120,
    batch_size: Annotated[int, typer.Option(min=2, help="Photographs a step.")] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="An open_clip model name. Default: a small ViT made for this demo."),
    ] = None,
    pretrained: PretrainedOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Fine-tune a small CLIP on real photographs and write a report with pictures.

    Takes one to two minutes on two CPU cores that have nothing else to do. Downloads nothing,
    unless --pretrained names weights that are not here.
    """
    console = Console()
    with _user_errors():
        # Here, because plots need what only the demo extra installs.
        try:
            from .demo.run import DemoOptions, run_demo
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}. Fix: pip install 'fastgoal[demo]'") from error

        result = run_demo(
            DemoOptions(
                out=out,
                steps=steps,
                batch_size=batch_size,
                model=model,
                pretrained=pretrained,
                seed=seed,
                resume=resume,
                device=device,
                precision=precision.value,
                command=_command(),
            ),
            console,
        )
    if result is None:
        _say_how_to_resume(console)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Annotations in the GLIT format, one JSON a line.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the log.")],
    root: Annotated[
        Path | None, typer.Option(help="Folder of the images. Default: that of --data.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="open_clip model name, or a JSON config.")
    ] = "ViT-B-16",
    pretrained: PretrainedOption = None,
    context_length: Annotated[int, typer.Option(min=3, help="Tokens of a caption.")] = 248,
    preset: Annotated[
        Preset,
        typer.Option(
            help="published: the paper's optimizer (lr 5e-6, weight decay 0.05 on everything, "
            "cosine without warm-up, no clipping, batch 256, 10 epochs)."
        ),
    ] = Preset.default,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Or passes over the data. Default: 10.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Default: the preset's.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Default: the preset's.")] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints. Default: only at the end.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse the data if one record is unusable.")
    ] = False,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = Precision.auto,
) -> None:
    """Fine-tune an open_clip model on your own images and long captions."""
    console = Console()
    changes = {"steps": steps, "epochs": epochs, "batch_size": batch_size, "learning_rate": lr}
    with _user_errors():
        result = run_training(
            TrainOptions(
                data=data,
                root=root,
                out=out,
                model=model,
                pretrained=pretrained,
                context_length=context_length,
                preset=preset.value,
                changes={name: value for name, value in changes.items() if value is not None},
                save_every=save_every,
                num_workers=num_workers,
                strict=strict,
                seed=seed,
                resume=resume,
                device=device,
                precision=precision.value,
            ),
            console,
        )
    if result.interrupted:
        _say_how_to_resume(console)


def main() -> None:
    """The entry point of the `fastgoal` command."""
    app()


def _command() -> str:
    return shlex.join(["fastgoal", *sys.argv[1:]])


def _say_how_to_resume(console: Console) -> None:
    again = _command() if "--resume" in sys.argv else f"{_command()} --resume"
    console.print(f"Stopped and saved. Go on with:\n  {escape(again)}", soft_wrap=True)
    raise typer.Exit(EXIT_INTERRUPTED)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Errors a user can mend end in one line and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (CheckpointError, ConfigError, GlitError, TrainingError, OSError) as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        Console(stderr=True).print("Interrupted.")
        raise typer.Exit(EXIT_INTERRUPTED) from None

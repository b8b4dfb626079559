"""The Typer app: its commands in the order of --help, and --version."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from .bench import bench
from .convert import convert
from .demo import demo
from .doctor import doctor
from .embed import embed
from .eval import evaluate
from .hierarchy import hierarchy
from .interpolate import interpolate
from .maps import maps
from .prepare import prepare
from .search import search
from .train_caft import train_caft
from .train_fast_goal import train_fast_goal
from .train_open_clip import train_open_clip
from .unpack import unpack

app = typer.Typer(
    name="fastgoal",
    help="Train CLIP on long captions with FAST-GOAL and CAFT.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(demo)
app.command(no_args_is_help=True)(unpack)
app.command()(prepare)
app.command(no_args_is_help=True)(train_open_clip)
app.command(no_args_is_help=True)(convert)
app.command(no_args_is_help=True)(interpolate)
app.command()(hierarchy)
app.command()(maps)
app.command("eval")(evaluate)
app.command()(embed)
app.command()(search)
app.command()(doctor)
app.command()(bench)

train_app = typer.Typer(
    help="Train: FAST-GOAL fine-tunes a CLIP, CAFT trains its own encoders.", no_args_is_help=True
)
train_app.command("fast-goal")(train_fast_goal)
train_app.command("caft")(train_caft)
app.add_typer(train_app, name="train")  # groups come last in --help


def _show_version(asked: bool) -> None:
    if asked:
        try:
            version = importlib.metadata.version("fastgoal")
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            from fastgoal_kernels import __version__ as version
        typer.echo(f"fastgoal {version}")
        raise typer.Exit


@app.callback()
def _fastgoal(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass

"""`fastgoal train-open-clip`."""

from __future__ import annotations

from typing import Annotated

import typer

from .exits import user_errors


def train_open_clip(
    flags: Annotated[
        list[str], typer.Argument(metavar="-- FLAGS", help="Flags of open_clip_train, after a --.")
    ],
) -> None:
    """Train with open_clip's own trainer and its own flags, and our losses inside.

    On several GPUs: torchrun --nproc-per-node 8 -m fastgoal_models train-open-clip -- FLAGS
    """
    with user_errors():
        from ..open_clip_command import run_open_clip_train

        run_open_clip_train(flags)

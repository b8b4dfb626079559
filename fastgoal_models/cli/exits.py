"""How a command ends: exit codes, errors that a user can mend, and runs that Ctrl-C stopped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import UserError, how_to_install

EXIT_NOT_WELL = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@contextmanager
def user_errors(extra: str = "models") -> Iterator[None]:
    """Errors a user can mend end in one line and exit code 2; a bug keeps its traceback.

    `extra`: the extra of this package that installs what the command imports.
    """
    try:
        yield
    except (UserError, OSError) as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastgoal"):
            raise
        _refuse(f"{error}. Fix: {how_to_install(extra)}")
    except KeyboardInterrupt as stop:  # before the first step, or a second Ctrl-C
        Console(stderr=True).print(escape(str(stop) or "Interrupted."), soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _refuse(message: str) -> NoReturn:
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True
    )
    raise typer.Exit(EXIT_USER_ERROR) from None


def say_how_to_resume(console: Console) -> NoReturn:
    """For a run that Ctrl-C stopped; ends the command."""
    again = command_line() if "--resume" in sys.argv else f"{command_line()} --resume"
    console.print(f"Stopped and saved. Go on with:\n  {escape(again)}", soft_wrap=True)
    raise typer.Exit(EXIT_INTERRUPTED)


def command_line() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["fastgoal", *sys.argv[1:]])

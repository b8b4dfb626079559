"""What the `fastgoal` command shows in one line instead of a traceback.

This module imports nothing that takes long, so that the command can name these errors, and still
show its help, without waiting for PyTorch.
"""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """The user can mend it: an option, a file, a package. The message says what and how."""


class ConfigError(UserError, ValueError):
    """An option makes no sense, or can not be used here; the message names it."""


class GlitError(UserError, ValueError):
    """A record, picture or data set that can not be used; the message names it and says why."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package, which no registry has."""
    return f"pip install '.[{extra}]' in your clone of FastGOAL"


def need_file(path: Path, option: str) -> None:
    """Raises ConfigError, naming the option, where there is no file of that name."""
    if path.is_dir():
        raise ConfigError(f"{option}: {path} is a folder. Fix: name a file")
    if not path.exists():  # a pipe is a file, too
        raise ConfigError(f"{option}: there is no file {path}")

"""Which files a person means by 'part-*.tar' or 'part-{000..099}.tar'."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError


def shard_paths(pattern: str | Path, argument: str = "--data") -> list[Path]:
    """The shards of a pattern, in the order of their names.

    What is there by the very name counts first: a folder may have a `[` in its own. Then braces
    are expanded as webdataset does ({000..099}, {a,b}), and *, ? and [...] as a shell does.

    Raises ConfigError, naming the argument, for a pattern, or one of its expansions, without a
    file, and for braces where the package braceexpand is missing.
    """
    found: set[str] = set()
    for name in _expanded(str(pattern), argument):
        files = [name] if os.path.isfile(name) else glob.glob(_literal_folder(name))
        if not files:
            meant = "" if name == str(pattern) else f", which {pattern} asks for"
            raise ConfigError(
                f"{argument}: there is no shard {name}{meant}. Fix: a path, or in quotes a "
                "pattern: 'shards/part-*.tar' or 'shards/part-{000..099}.tar'"
            )
        found.update(files)
    return [Path(name) for name in sorted(found)]


def _expanded(pattern: str, argument: str) -> Iterator[str]:
    """The names that braces stand for; those of a folder that is there stand for themselves."""
    folder, name = os.path.split(pattern)
    if not os.path.isdir(folder or "."):
        folder, name = "", pattern
    if "{" not in name or os.path.isfile(pattern):
        yield pattern
        return
    try:
        from braceexpand import braceexpand
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{argument} {pattern}: {error}. Fix: pip install braceexpand, or a pattern with *"
        ) from error
    try:
        for one in braceexpand(name):
            yield os.path.join(folder, one)
    except ValueError as error:  # unbalanced
        raise ConfigError(
            f"{argument} {pattern}: {error}. Fix: close every brace, as in 'part-{{000..099}}.tar'"
        ) from error


def _literal_folder(name: str) -> str:
    """The pattern with a folder that is there taken by its word."""
    folder, file = os.path.split(name)
    return os.path.join(glob.escape(folder), file) if os.path.isdir(folder) else name

"""Which records of training data can be used: found out once, with every picture decoded.

That takes long for a large data set. What was found stands in a run's `skipped.json`: a resumed run
leaves out the same records, and decodes no picture before its first step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID

from .atomic_files import write_text_atomically
from .progress import counting
from .shard_names import shard_paths
from .skips import Unusable

SKIPPED = "skipped.json"
"""in a run's folder: the records that its data has and that it left out"""

Record = TypeVar("Record")


class PictureCheck:
    """Judges each record that a reader of training data finds, and counts them on the screen.

    Without a run every picture is decoded, and nothing is remembered.
    """

    def __init__(self) -> None:
        self._note: Path | None = None
        self._data: list[Any] = []
        self._known: dict[str, list[str]] | None = None
        self._found: dict[str, list[str]] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @classmethod
    def of_run(cls, out: Path, data: Path, root: Path | None, resume: bool) -> PictureCheck:
        """One for the data of a run: a JSONL file, or a pattern of shards.

        A run that is gone on with, and whose files have the size and the time they had, takes what
        it knows. Raises what `shard_paths` does.
        """
        check = cls()
        check._note = out / SKIPPED
        files = shard_paths(data) if data.suffix == ".tar" else [data]
        check._data = [str((root or data.parent).resolve())]
        for file in files:
            there = file.stat()
            check._data.append([file.name, there.st_size, there.st_mtime_ns])
        if resume:
            check._known = _read(check._note, check._data)
        return check

    def judge(self, key: str, read: Callable[[bool], Record]) -> Record | Unusable:
        """The record, or why it is left out.

        Args:
            key: what the record is called among its data, e.g. the number of its line.
            read: reads it, told whether to decode its picture. Raises Unusable.
        """
        try:
            if self._known is not None and key in self._known:
                return Unusable(*self._known[key])
            return read(self._known is None)
        except Unusable as skip:
            self._found[key] = [skip.reason, skip.name]
            return skip
        finally:
            if self._bar is not None and self._task is not None:
                self._bar.advance(self._task)

    def expect(self, records: float) -> None:
        """So many there are, or so many it looks as if there were."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=records)

    @contextmanager
    def watch(self, console: Console) -> Iterator[None]:
        """Shows how many records have been judged."""
        with counting(console, "pictures") as self._bar:
            doing = "checking" if self._known is None else "reading"
            self._task = self._bar.add_task(doing, total=None)
            yield
        self._bar = None

    def save(self) -> None:
        """Write `skipped.json` of the run, whole or not at all."""
        if self._note is not None and self._known is None:
            text = json.dumps({"data": self._data, "skipped": self._found}, indent=1)
            write_text_atomically(self._note, text + "\n")


def lines_in(file: Path) -> int:
    """How many lines a file has; 0 of a pipe, which can be read only once."""
    if not file.is_file():
        return 0
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _read(note: Path, data: list[Any]) -> dict[str, list[str]] | None:
    try:
        found = json.loads(note.read_text("utf-8"))
        return dict(found["skipped"]) if found["data"] == data else None
    except (OSError, ValueError, TypeError, KeyError):
        return None

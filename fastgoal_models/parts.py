"""The folder that holds the parts of a long job until they are joined, and tells whose they are."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

RUN = "run.json"
"""what the parts were made with"""


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies once it is whole."""
    return folder / f"{number:08}.json"


def remove_parts(folder: Path) -> None:
    """Take the parts away, and what tells whose they are last.

    Killed in between, no part is left that another run could take for its own.
    """
    with suppress(OSError):
        for path in folder.glob("*"):
            if path.name != RUN:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

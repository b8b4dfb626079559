"""Text files that appear whole or not at all, whenever the process is killed.

This imports nothing that takes long or may be broken: `fastgoal doctor` writes through it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TEMPORARY = ".writing-"
"""what the name of a file or folder begins with until it is whole"""


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step, so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Push a file or a folder's entries to the disk; a rename may otherwise overtake the data."""
    if path.is_dir() and os.name == "nt":
        return  # Windows can not open a folder; NTFS journals the rename itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

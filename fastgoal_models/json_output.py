"""`--json FILE`, or - for the standard output: what a command found, for programs.

This imports nothing that takes long or may be broken: `fastgoal doctor` writes through it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .atomic_files import write_text_atomically

_STDOUT = Path("-")


def console_beside(json_path: Path | None) -> Console:
    """Where a command talks to people: not where its JSON goes."""
    return Console(stderr=json_path == _STDOUT)


def write_json(document: dict[str, Any], json_path: Path | None, console: Console) -> None:
    """Write it, where that was asked for; a file whole or not at all, and its folder is made."""
    if json_path is None:
        return
    text = json.dumps(document, indent=1) + "\n"
    if json_path == _STDOUT:
        sys.stdout.write(text)
        return
    write_text_atomically(json_path, text)
    console.print(f"{escape(str(json_path))} written", highlight=False, soft_wrap=True)

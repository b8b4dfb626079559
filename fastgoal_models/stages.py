"""Which data a model was trained on, stage after stage, as its runs note it.

A run of `fastgoal train` notes its data in its config.yaml, and what it started from: that may be
another run, whose data count as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import yaml

from .loading import CAFT_NAMES
from .run_config import CONFIG_FILE
from .trained import is_trained, notes_on

_STARTS = ("model", "pretrained", "checkpoint")  # the options of a run that name another's weights


class Stage(NamedTuple):
    """What one run was trained on, as it says itself."""

    note: Path
    """the run's config.yaml"""
    data: Path
    root: Path | None


def stages_of(*names: str | None) -> tuple[list[Stage], list[str]]:
    """The stages of training behind a model, newest first, and why others are not known.

    Paths start at the folder that `fastgoal train` was called in. A run that started from itself,
    or from one that did so from it, counts once.

    Args:
        names: what --model and --pretrained were given. What no run left is passed over: where that
            was trained is nowhere noted.
    """
    stages: list[Stage] = []
    unknown: list[str] = []
    waiting = [name for name in names if name is not None]
    seen: set[Path] = set()
    while waiting:
        path = Path(waiting.pop(0))
        run = _run_of(path)
        if run is None:
            if is_trained(path) if path.is_dir() else notes_on(path):
                unknown.append(f"{path} is of a run, of which no {CONFIG_FILE} says the data")
            continue
        if run.resolve() in seen:
            continue
        seen.add(run.resolve())
        note = run / CONFIG_FILE
        noted = _read(note)
        if isinstance(noted.get("data"), str):
            root = noted.get("root")
            stages.append(Stage(note, Path(noted["data"]), None if root is None else Path(root)))
        else:
            unknown.append(f"{note} can not be read, or names no data")
        for option in _STARTS:
            start = noted.get(option)
            if isinstance(start, str):
                waiting.append(start)
                if _is_gone(option, start):
                    unknown.append(f"{start}, from which the run of {note} started, is not here")
    return stages, unknown


def _run_of(path: Path) -> Path | None:
    """The folder of the run that left this folder, or this file of weights."""
    if not path.exists() or path.suffix == ".json":
        return None
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return next(
        (
            place
            for place in (folder, *folder.parents[:2])
            if (place / CONFIG_FILE).is_file() and (place / "checkpoints").is_dir()
        ),
        None,
    )


def _read(note: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(note.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return options if isinstance(options, dict) else {}


def _is_gone(option: str, start: str) -> bool:
    """Whether this was a folder or a file, and no name or tag of a model."""
    if Path(start).exists() or start.endswith(".json"):
        return False
    if option == "model":
        return start not in (*CAFT_NAMES, *open_clip.list_models())
    return option == "checkpoint" or Path(start).name != start or Path(start).suffix != ""

"""What `fastgoal eval` says of test images that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .errors import ConfigError
from .overlap import TrainingImage, compare, training_images
from .sets import CaptionSet
from .stages import stages_of

_NAMES_SHOWN = 5


def check_overlap(
    captioned: CaptionSet,
    model: Sequence[str | None],
    trained_on: Sequence[Path] | None,
    console: Console,
) -> dict[str, Any] | None:
    """An `Overlap` as plain values, with the `training_data` it is of and what is `unknown`.

    None where nothing is noted of the model's training.

    Args:
        captioned: the test images.
        model: what its option and that of its weights were given.
        trained_on: files of training data; none: what the runs behind the model note. None: the
            same, and there is no option to give others.

    Raises ConfigError for one of `trained_on` that names no image.
    """
    stages, unknown = ([], []) if trained_on else stages_of(*model)
    sources: list[tuple[Path, Path | None]] = [(path, None) for path in trained_on or ()]
    for stage in stages:
        console.print(escape(f"trained on {stage.data}, says {stage.note}"), soft_wrap=True)
        sources.append((stage.data, stage.root))
    images: list[TrainingImage] = []
    read: list[str] = []
    for data, root in dict.fromkeys(sources):
        try:
            found, report = training_images(data, root)
        except (ConfigError, OSError):
            if trained_on:
                raise
            unknown.append(f"no image can be read from {data}")
            continue
        images += found
        read.append(str(data))
        for reason, names in report.names.items():
            unknown.append(f"{data}: {report.counts[reason]} × {reason}: {', '.join(names)}")
    if not read and not unknown:
        return None
    for gap in unknown:
        console.print(
            f"[yellow]{escape(gap)}: whether test images were trained on there is not known[/]",
            highlight=False,
            soft_wrap=True,
        )
    if unknown and trained_on is not None and not trained_on:
        console.print("[yellow]Fix: --trained-on FILE, once for each stage's data[/]")
    return {
        "training_data": read,
        "unknown": unknown,
        "test_images": len(captioned.images),
        **asdict(compare(captioned, images)),
    }


def show_overlap(name: str, found: dict[str, Any], console: Console) -> None:
    """The result of `check_overlap` for the model of that name, in words."""

    def say(words: str, style: str = "default") -> None:
        text = f"[{style}]{escape(f'{name}: {words}')}[/]"
        console.print(text, highlight=False, soft_wrap=True)

    how = {
        "byte for byte": found["by_content"],
        "by name alone, as they are not here": found["by_name"],
        "not at all, as they are not here and are called by numbers": found["not_compared"],
    }
    total = sum(how.values())
    if total:
        counts = "; ".join(f"{count:,} {words}" for words, count in how.items() if count)
        say(f"test images were compared with {total:,} training images: {counts}")
    part = found["compared_in_part"]
    if part:
        say(
            f"{part} of {found['test_images']} test images could not be compared with all of them",
            "yellow",
        )
    seen = [*found["same_content"], *found["same_name"]]
    others = found["same_name_other_content"]
    if seen:
        words = f"{len(seen)} test images are among the training images: {_some(seen)}"
        if found["same_name"]:
            words += f" ({len(found['same_name'])} of them by name alone)"
        say(words, "bold red")
    if others:
        say(
            f"{len(others)} test images have the name of a training image whose bytes are others: "
            f"{_some(others)}. It may be the same picture, saved again",
            "yellow",
        )
    if seen:
        return
    if total == found["not_compared"]:
        say("whether test images were trained on is not known", "yellow")
    elif part or others or found["unknown"]:
        say("no test image was found among the training images that could be compared")
    else:
        say("no test image is among the training images")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")

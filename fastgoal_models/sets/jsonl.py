"""Anyone's own pictures: one JSON object a line.

    {"image": "images/cat.jpg", "caption": "A cat."}
    {"image": "images/dog.jpg", "captions": ["A dog.", "A brown dog."], "id": "dog"}

Images are relative to the file's folder and may not leave it; an id that is missing is the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..skips import Unusable
from .base import CaptionSet, Layout, Row, gather, read_json_lines, require


def _read(root: Path, layout: Layout) -> CaptionSet:
    file = root if root.is_file() else require(root / "captions.jsonl", layout)
    return gather(_rows(file, layout), file.parent, layout)


def _rows(file: Path, layout: Layout) -> Iterator[Row | Unusable]:
    for row in read_json_lines(file, layout):
        if isinstance(row, Unusable):
            yield row
        else:
            captions = row["captions"] if "captions" in row else [row.get("caption")]
            yield row.get("id"), row.get("image"), captions


LAYOUTS = (
    Layout(
        "jsonl",
        "captions.jsonl",
        _read,
        'your own pictures: one {"image": …, "caption": …} a line',
        "captions.jsonl (or is such a file itself)",
    ),
)

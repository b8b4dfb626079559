"""DOCCI: `docci_descriptions.jsonlines` and a folder of images.

A line is {"example_id", "split", "image_file", "description"}; splits are train, test, qual_dev
and qual_test.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..skips import Unusable
from .base import CaptionSet, Layout, Row, first_of, gather, read_json_lines, require

_SOURCE = "https://google.github.io/docci/#downloads"
_HOLDS = "docci_descriptions.jsonlines and images/"


def _read(root: Path, layout: Layout, splits: tuple[str, ...]) -> CaptionSet:
    # The second place, and its spelling, are those that FLAIR and CAFT ask for.
    descriptions = first_of(
        root, "docci_descriptions.jsonlines", "annotations/docci_descriptions.jsonline"
    )
    rows = _rows(require(descriptions, layout), layout, splits)
    return gather(rows, require(root / "images", layout), layout)


def _rows(path: Path, layout: Layout, splits: tuple[str, ...]) -> Iterator[Row | Unusable]:
    for row in read_json_lines(path, layout):
        if isinstance(row, Unusable):
            yield row
        elif row.get("split") in splits:
            yield row.get("example_id"), row.get("image_file"), [row.get("description")]


LAYOUTS = (
    Layout("docci", "DOCCI test", partial(_read, splits=("test",)), _SOURCE, _HOLDS, (5000, 5000)),
    # GOAL's test file, which FAST-GOAL takes over, has the 100 pictures of qual_test too.
    Layout(
        "docci-goal",
        "DOCCI test as GOAL and FAST-GOAL count it",
        partial(_read, splits=("test", "qual_test")),
        _SOURCE,
        _HOLDS,
        (5100, 5100),
    ),
)

"""DCI: `densely_captioned_images/` with `splits.json`, `annotations/` and `photos/`.

`splits.json` lists annotation files by split, and all splits are read. An annotation is {"image",
"short_caption", "extra_caption", …}, one file an image. GOAL's test file is a list of {"image",
"caption"} over the same photos.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..skips import Unusable
from .base import (
    CaptionSet,
    Layout,
    Row,
    SetError,
    first_of,
    gather,
    read_json,
    read_part,
    read_rows,
    require,
)

_SOURCE = (
    "https://github.com/facebookresearch/DCI (dci.tar.gz; the photos are sa_000138.tar of SA-1B, "
    "https://ai.meta.com/datasets/segment-anything-downloads)"
)
_HOLDS = "densely_captioned_images/ with splits.json, annotations/ and photos/"


def _read(root: Path, layout: Layout, captions: Callable[[Any, Any], list[object]]) -> CaptionSet:
    root = _inner(root)
    splits = read_json(root / "splits.json", layout)
    if not isinstance(splits, dict) or not all(isinstance(x, list) for x in splits.values()):
        raise SetError(f"{layout.title}: {root / 'splits.json'} does not list files by split")
    folder = require(root / "annotations", layout)
    files = (file for split in splits.values() for file in split)
    rows = _rows(files, folder, captions)
    return gather(rows, require(root / "photos", layout), layout)


def _inner(root: Path) -> Path:
    return root if (root / "photos").exists() else root / "densely_captioned_images"


def _rows(
    files: Iterator[object], folder: Path, captions: Callable[[Any, Any], list[object]]
) -> Iterator[Row | Unusable]:
    for file in files:
        try:
            row = _annotation(folder, str(file))
        except Unusable as skip:
            yield skip
            continue
        found = captions(row.get("short_caption"), row.get("extra_caption"))
        if found:
            yield _id(row.get("image")), row.get("image"), found


def _annotation(folder: Path, file: str) -> dict[str, Any]:
    try:
        row = json.loads(read_part(folder, file, "annotation"))
    except (ValueError, RecursionError):
        raise Unusable("annotation is not JSON", file) from None
    if not isinstance(row, dict):
        raise Unusable("annotation is not an object", file)
    return row


def _id(image: object) -> object:
    """The id that SA-1B gives the picture, by which test and training sets can be compared."""
    return PurePosixPath(image).stem if isinstance(image, str) else image


def _both(short: Any, extra: Any) -> list[object]:
    if isinstance(short, str) and isinstance(extra, str):
        return [f"{short}\n{extra}"]
    return [short, extra]  # at least one is not text, for which the row will be left out


def _extra(_: Any, extra: Any) -> list[object]:
    """A picture without one has no row: it is no part of the set, rather than left out of it."""
    return [] if extra is None or (isinstance(extra, str) and not extra.strip()) else [extra]


def _read_goal(root: Path, layout: Layout) -> CaptionSet:
    file = first_of(root, "DCI_test.json", "dci_test.json")
    rows = (
        row
        if isinstance(row, Unusable)
        else (_id(row.get("image")), row.get("image"), [row.get("caption")])
        for row in read_rows(file, layout)
    )
    return gather(rows, require(_inner(root) / "photos", layout), layout)


LAYOUTS = (
    Layout(
        "dci",
        "DCI, short and extra caption, as FLAIR and CAFT",
        partial(_read, captions=_both),
        _SOURCE,
        _HOLDS,
        (7805, 7805),
    ),
    Layout(
        "dci-goal",
        "DCI, extra caption, as FAST-GOAL",
        partial(_read, captions=_extra),
        _SOURCE,
        _HOLDS,
        (7602, 7602),
    ),
    Layout(
        "dci-goal-test",
        "DCI, GOAL's test file",
        _read_goal,
        "https://github.com/PerceptualAI-Lab/GOAL (datasets/DCI_test.json), the photos from "
        + _SOURCE,
        "DCI_test.json and densely_captioned_images/photos/",
        (1999, 1999),
    ),
)

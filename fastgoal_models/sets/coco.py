"""MSCOCO: `captions_val2017.json` over `val2017/`, or Karpathy's test split of `val2014/`.

The annotations are {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..retrieval import SHORT_TEXT_KS
from ..skips import Unusable
from . import karpathy
from .base import CaptionSet, Layout, Row, first_of, gather, read_rows, require

_SOURCE = "https://cocodataset.org/#download"


def _read(root: Path, layout: Layout) -> CaptionSet:
    file = require(root / "annotations" / "captions_val2017.json", layout)
    images = require(first_of(root, "val2017", "images/val2017"), layout)
    return gather(_rows(file, layout), images, layout)


def _rows(file: Path, layout: Layout) -> Iterator[Row | Unusable]:
    captions: dict[object, list[object]] = {}
    for row in read_rows(file, layout, "annotations"):
        if isinstance(row, Unusable):
            yield row
        elif isinstance(row.get("image_id"), int):
            captions.setdefault(row["image_id"], []).append(row.get("caption"))
        else:
            yield Unusable("caption names no image", f"annotation {row.get('id')}")
    for row in read_rows(file, layout, "images"):
        if isinstance(row, Unusable):
            yield row
        elif isinstance(row.get("id"), int):
            found = captions.get(row["id"], [])
            yield row["id"], row.get("file_name"), found[: karpathy.CAPTIONS]
        else:
            yield Unusable("image has no id", str(row.get("file_name")))


def _read_karpathy(root: Path, layout: Layout) -> CaptionSet:
    file = first_of(root, "dataset_coco.json", "annotations/dataset_coco.json")
    images = require(first_of(root, "val2014", "images/val2014"), layout)
    return gather(karpathy.read_split(require(file, layout), layout), images, layout)


LAYOUTS = (
    Layout(
        "coco",
        "MSCOCO val2017",
        _read,
        _SOURCE,
        "annotations/captions_val2017.json and val2017/",
        (5000, 25_000),
        SHORT_TEXT_KS,
    ),
    Layout(
        "coco-karpathy",
        "MSCOCO, Karpathy's 5,000 of val2014",
        _read_karpathy,
        f"{_SOURCE} and {karpathy.SOURCE}",
        "dataset_coco.json and val2014/",
        (5000, 25_000),
        SHORT_TEXT_KS,
    ),
)

"""Urban1k: pictures `image/NAME.jpg` and their captions `caption/NAME.txt`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..skips import Unusable
from .base import CaptionSet, Layout, Row, first_of, gather, read_part, require


def _read(root: Path, layout: Layout) -> CaptionSet:
    images = require(first_of(root, "image", "images"), layout)
    captions = require(root / "caption", layout)
    return gather(_rows(images, captions), images, layout)


def _rows(images: Path, captions: Path) -> Iterator[Row | Unusable]:
    files = [*images.glob("*.jpg"), *captions.glob("*.txt")]
    # Names are numbers: 2 comes before 10. A Mac leaves its own ._1.jpg beside 1.jpg.
    names = {file.stem for file in files if not file.name.startswith(".")}
    for name in sorted(names, key=lambda name: (len(name), name)):
        file = f"{name}.txt"
        try:
            yield name, f"{name}.jpg", [read_part(captions, file, "caption").decode("utf-8-sig")]
        except Unusable as skip:
            yield skip
        except UnicodeDecodeError:
            yield Unusable("caption is not UTF-8", file)


LAYOUTS = (
    Layout(
        "urban1k",
        "Urban1k",
        _read,
        "https://huggingface.co/datasets/BeichenZhang/Urban1k (Urban1k.zip)",
        "image/ (or images/) and caption/",
        (1000, 1000),
    ),
)

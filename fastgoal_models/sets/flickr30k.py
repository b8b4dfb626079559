"""Flickr30k: Karpathy's test split, or all of its own `results_20130124.token`.

The test split is read from `dataset_flickr30k.json`, or else from `flickr30k_test.json`, a list of
{"image", "caption": […]}. A line of the token file is `NAME.jpg#0`, a tab and a caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..glit import json_lines
from ..retrieval import SHORT_TEXT_KS
from ..skips import Unusable
from . import karpathy
from .base import CaptionSet, Layout, Row, SetError, first_of, gather, read_rows, require

_SOURCE = "https://shannon.cs.illinois.edu/DenotationGraph"
_IMAGES = "flickr30k-images"
_TOKENS = "results_20130124.token"


def _images(root: Path, layout: Layout) -> Path:
    # FLAIR and CAFT keep the pictures right beside the file.
    return require(first_of(root, _IMAGES, "flickr30k_images", "images", "."), layout)


def _read(root: Path, layout: Layout) -> CaptionSet:
    file = require(first_of(root, "dataset_flickr30k.json", "flickr30k_test.json"), layout)
    split = file.name == "dataset_flickr30k.json"
    rows = karpathy.read_split(file, layout) if split else _listed(file, layout)
    return gather(rows, _images(root, layout), layout)


def _listed(file: Path, layout: Layout) -> Iterator[Row | Unusable]:
    for row in read_rows(file, layout):
        if isinstance(row, Unusable):
            yield row
            continue
        image = row.get("image")
        if isinstance(image, str):
            image = image.removeprefix(f"{_IMAGES}/")
        yield None, image, row.get("caption")


def _read_all(root: Path, layout: Layout) -> CaptionSet:
    file = require(root / _TOKENS, layout)
    return gather(_token_rows(file, layout), _images(root, layout), layout)


def _token_rows(file: Path, layout: Layout) -> Iterator[Row | Unusable]:
    captions: dict[str, list[str]] = {}
    try:
        with file.open("rb") as lines:
            for number, line in json_lines(lines):
                try:
                    image, tab, caption = line.decode("utf-8").partition("\t")
                except UnicodeDecodeError:
                    yield Unusable("line is not UTF-8", f"line {number}")
                    continue
                name, mark, _ = image.rpartition("#")
                if tab and mark:
                    captions.setdefault(name, []).append(caption)
                else:
                    yield Unusable("line is not NAME#N, a tab and a caption", f"line {number}")
    except OSError as error:
        raise SetError(f"{layout.title}: {file} can not be read ({error})") from error
    for name, found in captions.items():
        yield None, name, found


LAYOUTS = (
    Layout(
        "flickr30k",
        "Flickr30k, Karpathy's test split",
        _read,
        f"{_SOURCE} and {karpathy.SOURCE}",
        f"dataset_flickr30k.json (or flickr30k_test.json) and {_IMAGES}/",
        (1000, 5000),
        SHORT_TEXT_KS,
    ),
    Layout(
        "flickr30k-all",
        "Flickr30k, all of it, as Long-CLIP",
        _read_all,
        _SOURCE,
        f"{_TOKENS} and {_IMAGES}/",
        (31_783, 158_915),
        SHORT_TEXT_KS,
    ),
)

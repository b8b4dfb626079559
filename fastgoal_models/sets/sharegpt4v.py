"""ShareGPT4V: the first rows of its caption file, over folders of SA-1B.

The file is a list of {"image", "conversations"}; the caption is `conversations[1].value`, and
images are relative to the file. LoTLIP and FLAIR keep its first 10,000 rows as a file of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..skips import Unusable
from .base import CaptionSet, Layout, Row, SetError, first_of, gather, require

_SOURCE = (
    "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V "
    "(share-captioner_coco_lcs_sam_1246k_1107.json), the images from SA-1B, "
    "https://ai.meta.com/datasets/segment-anything-downloads"
)
_HOLDS = (
    "share-captioner_coco_lcs_sam_1246k_1107.json (or share4v_sam_10k.json) and the folders that "
    "it names"
)
_CHUNK = 1 << 16
_LONGEST_ROW = 1 << 22


def _read(root: Path, layout: Layout, count: int) -> CaptionSet:
    file = first_of(root, "share-captioner_coco_lcs_sam_1246k_1107.json", "share4v_sam_10k.json")
    return gather(_rows(require(file, layout), layout, count), root, layout)


def _rows(path: Path, layout: Layout, count: int) -> Iterator[Row | Unusable]:
    try:
        for number, row in enumerate(_first(path, count), start=1):
            yield _row(row, f"row {number}")
    except OSError as error:
        raise SetError(f"{layout.title}: {path} can not be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise SetError(f"{layout.title}: {path} is not a JSON list ({error})") from error


def _row(row: Any, name: str) -> Row | Unusable:
    try:
        image, caption = row["image"], row["conversations"][1]["value"]
    except (TypeError, KeyError, IndexError):
        return Unusable("row has no image or no answer", name)
    return None, image, [caption]


def _first(path: Path, count: int) -> Iterator[Any]:
    """The first elements of a JSON list. The rest of its 1.5 GB is not read."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(_CHUNK).lstrip()
        if not text.startswith("["):
            raise ValueError("it does not begin with a bracket")
        text = text[1:]
        for _ in range(count):
            while True:
                text = text.lstrip(" \t\r\n,")
                try:
                    if text.startswith("]"):
                        return
                    row, end = decoder.raw_decode(text)
                    break
                except json.JSONDecodeError:  # a row cut in two, as a rule
                    more = file.read(_CHUNK)
                    if not more or len(text) > _LONGEST_ROW:
                        raise
                    text += more
            yield row
            text = text[end:]


LAYOUTS = (
    Layout(
        "sharegpt4v-1k",
        "ShareGPT4V, first 1,000 rows",
        partial(_read, count=1000),
        _SOURCE,
        _HOLDS,
        (1000, 1000),
    ),
    Layout(
        "sharegpt4v-10k",
        "ShareGPT4V, first 10,000 rows",
        partial(_read, count=10_000),
        _SOURCE,
        _HOLDS,
        (10_000, 10_000),
    ),
)

"""Karpathy's split files, `dataset_coco.json` and `dataset_flickr30k.json`.

{"images": [{"filename", "split", "sentences": [{"raw"}, …], …}, …]}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..skips import Unusable
from .base import Layout, Row, read_rows

SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
CAPTIONS = 5
"""Captions an image that papers evaluate on. A few pictures of COCO have more; FLAIR and CAFT count
those of val2017 too, 25,014 in all."""


def read_split(path: Path, layout: Layout, split: str = "test") -> Iterator[Row | Unusable]:
    """The rows of one split with their first five captions; the id is the file's name."""
    for row in read_rows(path, layout, "images"):
        if isinstance(row, Unusable):
            yield row
        elif row.get("split") == split:
            sentences = row.get("sentences")
            captions = (
                [s.get("raw") if isinstance(s, dict) else s for s in sentences[:CAPTIONS]]
                if isinstance(sentences, list)
                else sentences
            )
            yield None, row.get("filename"), captions

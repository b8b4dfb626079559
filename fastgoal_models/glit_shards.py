"""FAST-GOAL's records from webdataset shards, by place.

A sample is the files in a row that share their name up to its first dot: an image, and a JSON
object as a line of a GLIT file has it, whose `image` is not read. As of CAFT (`caft.shards`), what
is remembered of a picture is where it lies, so that samples are shuffled one by one and training
resumes in the middle of an epoch. Captions and pairs stay in memory, as a GLIT file's do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from .caft.data import IMAGE_ENDINGS, json_object
from .caft.shards import Piece, listed
from .errors import GlitError
from .glit import GlitRecord, row_fields, row_id
from .picture_check import PictureCheck
from .pictures import decode_image, upright_size
from .shard_names import shard_paths
from .skips import SkipReport, Unusable


@dataclass(frozen=True, kw_only=True)
class ShardRecord(GlitRecord):
    """A record whose picture lies in a shard; its `image` only names it."""

    shard: Path
    place: Piece


def load_from_shard(record: ShardRecord) -> Image.Image:
    """The picture, upright and RGB. Raises GlitError where it can no longer be read."""
    try:
        return decode_image(record.place.read(record.shard), str(record.image))
    except Unusable as unusable:
        raise GlitError(str(unusable)) from unusable


def read_glit_shards(
    pattern: str | Path, strict: bool = False, check: PictureCheck | None = None
) -> tuple[list[ShardRecord], SkipReport]:
    """Read shards with GLIT's keys: their usable records, in order, and what was skipped.

    Skipped is what `read_glit` skips, besides samples without an image or a JSON object, and what
    lies behind the place where a shard is broken. A record without an id of its own has its
    shard's and its sample's name.

    Args:
        pattern: plain tar files, "shards/part-*.tar" or "shards/part-{000..099}.tar", read in the
            order of their names.
        strict: refuse the shards if anything is skipped.
        check: whether pictures are decoded; default: every one, once.

    Raises ConfigError where a shard is missing, GlitError under `strict`.
    """
    shards = shard_paths(pattern)
    report = SkipReport()
    records: dict[str, ShardRecord] = {}
    for found in _read(shards, report, check or PictureCheck()):
        if isinstance(found, ShardRecord) and found.id in records:
            found = Unusable("id appears twice", found.id)
        if isinstance(found, Unusable):
            report.add(found.reason, found.name)
        else:
            records[found.id] = found
        if strict and report.skipped:
            break
    report.read = len(records)
    if strict and report.skipped:
        reason, names = next(iter(report.names.items()))
        raise GlitError(f"{pattern}: {names[0]}: {reason}")
    return list(records.values()), report


def _read(
    shards: Sequence[Path], report: SkipReport, check: PictureCheck
) -> Iterator[ShardRecord | Unusable]:
    def judged(shard: Path, found: tuple[str, dict[str, Piece]]) -> ShardRecord | Unusable:
        return check.judge(f"{shard.name}/{found[0]}", partial(_record, shard, *found))

    # Decoding is most of the work and leaves the interpreter's lock; order is kept.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard, samples in listed(shards, report, check):
            yield from pool.map(partial(judged, shard), samples)


def _record(shard: Path, key: str, pieces: dict[str, Piece], decode: bool) -> ShardRecord:
    """Raises Unusable."""
    name = f"{shard.name}/{key}"
    ending = next((end for end in IMAGE_ENDINGS if end in pieces), None)
    if ending is None:
        raise Unusable("sample has no image", name)
    if "json" not in pieces:
        raise Unusable("sample has no caption", name)
    row = json_object(pieces["json"].read(shard), name)
    picture = pieces[ending]
    known = row_fields(row, name, lambda: upright_size(picture.read(shard), name, decode))
    return ShardRecord(
        **known,
        id=row_id(row, name),
        image=shard / f"{key}.{ending}",
        shard=shard,
        place=picture,
    )

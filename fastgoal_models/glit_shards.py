"""FAST-GOAL's records from webdataset shards, by place.

A sample is the files in a row that share their name up to its first dot: an image, and a JSON
object as a line of a GLIT file has it, whose `image` is not read. As of CAFT (`caft.shards`), what
is remembered of a picture is where it lies, so that samples are shuffled one by one and training
resumes in the middle of an epoch. Captions and pairs stay in memory, as a GLIT file's do.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from .caft.data import IMAGE_ENDINGS, json_object
from .caft.shards import Piece, samples_in
from .errors import UserError
from .glit import GlitError, GlitRecord, SkipReport, Unusable, decode_image, row_fields


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
    pattern: str | Path, strict: bool = False
) -> tuple[list[ShardRecord], SkipReport]:
    """Read shards with GLIT's keys: their usable records, in order, and what was skipped.

    Skipped is what `read_glit` skips, besides samples without an image or a JSON object, and what
    lies behind the place where a shard is broken. Every image is decoded once. A record without an
    id of its own has its shard's and its sample's name.

    Args:
        pattern: plain tar files, "shards/part-*.tar", read in the order of their names.
        strict: refuse the shards if anything is skipped.

    Raises UserError where nothing matches the pattern, GlitError under `strict`.
    """
    shards = [Path(name) for name in sorted(glob.glob(str(pattern)))]
    if not shards:
        raise UserError(f"there is no shard {pattern}")
    report = SkipReport()
    records: dict[str, ShardRecord] = {}
    for found in _read(shards, report):
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


def _read(shards: Sequence[Path], report: SkipReport) -> Iterator[ShardRecord | Unusable]:
    # Decoding is most of the work and leaves the interpreter's lock; order is kept.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard in shards:
            yield from pool.map(partial(_record, shard), list(samples_in(shard, report)))


def _record(shard: Path, found: tuple[str, dict[str, Piece]]) -> ShardRecord | Unusable:
    key, pieces = found
    name = f"{shard.name}/{key}"
    ending = next((end for end in IMAGE_ENDINGS if end in pieces), None)
    if ending is None:
        return Unusable("sample has no image", name)
    if "json" not in pieces:
        return Unusable("sample has no caption", name)
    try:
        row = json_object(pieces["json"].read(shard), name)
        picture = pieces[ending]
        known = row_fields(row, name, lambda: decode_image(picture.read(shard), name).size)
    except Unusable as unusable:
        return unusable
    return ShardRecord(
        **known,
        id=str(row.get("id", name)),
        image=shard / f"{key}.{ending}",
        shard=shard,
        place=picture,
    )

"""CAFT's samples from webdataset shards, by place.

A plain tar file says where each of its files begins. Reading the shards once finds every sample,
and from then on each can be read without those before it: samples of shards are shuffled one by
one, and training resumes in the middle of an epoch, as with a folder.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..glit import row_id
from ..picture_check import PictureCheck
from ..pictures import decode_image
from ..shard_names import shard_paths
from ..skips import SkipReport, Unusable
from .data import IMAGE_ENDINGS, Sentences, Splitting, captions_of, json_object


class Piece(NamedTuple):
    """A file within a shard."""

    offset: int
    size: int

    def read(self, shard: Path) -> bytes:
        # Opened anew each time: readers in other processes must not share a position.
        with shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class ShardSample(NamedTuple):
    """One sample; its captions and its image are read when they are asked for."""

    shard: Path
    image: Piece
    text: Piece
    splitting: Splitting

    @property
    def name(self) -> str:
        return f"{self.shard.name} at byte {self.image.offset}"

    @property
    def captions(self) -> Sentences:
        return captions_of(json_object(self.text.read(self.shard), self.name), self.splitting)

    def load(self) -> Image.Image:
        return decode_image(self.image.read(self.shard), self.name)


class ShardSamples:
    """The usable samples of some shards; 40 bytes each, however long their captions.

    Attributes: `digest`, sixteen hex digits that change when a sample's name or captions do.
    """

    def __init__(
        self, shards: Sequence[Path], places: Tensor, splitting: Splitting, digest: str
    ) -> None:
        self.shards, self.places, self.splitting = list(shards), places, splitting
        self.digest = digest

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> ShardSample:
        shard, *pieces = self.places[index].tolist()
        image, text = Piece(*pieces[:2]), Piece(*pieces[2:])
        return ShardSample(self.shards[shard], image, text, self.splitting)


def read_shards(
    pattern: str | Path, splitting: Splitting | None = None, check: PictureCheck | None = None
) -> tuple[ShardSamples, SkipReport]:
    """Read shards with DreamLIP's keys: their usable samples, in order, and what was skipped.

    A sample is the files in a row that share their name up to its first dot: an image, and a JSON
    object with captions. Of samples whose objects have the same `id` the first stays.

    Args:
        pattern: plain tar files, "shards/part-*.tar" or "shards/part-{000..099}.tar", read in the
            order of their names.
        check: whether pictures are decoded; default: every one, once.

    Raises ConfigError where a shard is missing.
    """
    splitting, check = splitting or Splitting(), check or PictureCheck()
    shards = shard_paths(pattern)
    report, digest = SkipReport(), hashlib.sha256()
    places: list[tuple[int, ...]] = []
    seen: set[bytes] = set()

    def judged(shard: Path, found: tuple[str, dict[str, Piece]]) -> _Checked | Unusable:
        return check.judge(f"{shard.name}/{found[0]}", partial(_checked, shard, splitting, *found))

    # Decoding is most of the work and leaves the interpreter's lock; order is kept.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, (shard, samples) in enumerate(listed(shards, report, check)):
            for found in pool.map(partial(judged, shard), samples):
                if not isinstance(found, Unusable) and found.id is not None:
                    name = hashlib.blake2b(found.id.encode(), digest_size=8).digest()
                    if name in seen:
                        found = Unusable("id appears twice", found.id)
                    seen.add(name)
                if isinstance(found, Unusable):
                    report.add(found.reason, found.name)
                else:
                    digest.update(found.contents)
                    places.append((number, *found.image, *found.text))
    report.read = len(places)
    table = torch.tensor(places, dtype=torch.int64).reshape(-1, 5)
    return ShardSamples(shards, table, splitting, digest.hexdigest()[:16]), report


class _Checked(NamedTuple):
    """A sample that can be used."""

    image: Piece
    text: Piece
    contents: bytes
    """what the digest is made of"""
    id: str | None
    """its object's own; most have none, and are told apart by their place"""


def _checked(
    shard: Path, splitting: Splitting, key: str, pieces: dict[str, Piece], decode: bool
) -> _Checked:
    """Raises Unusable."""
    name = f"{shard.name}/{key}"
    image = next((pieces[end] for end in IMAGE_ENDINGS if end in pieces), None)
    if image is None:
        raise Unusable("sample has no image", name)
    if "json" not in pieces:
        raise Unusable("sample has no caption", name)
    text = pieces["json"].read(shard)
    row = json_object(text, name)
    try:
        captions_of(row, splitting)
    except Unusable as unusable:
        raise Unusable(unusable.reason, unusable.name or name) from unusable
    if decode:
        decode_image(image.read(shard), name)
    contents = name.encode() + b"\0" + hashlib.sha256(text).digest()
    return _Checked(image, pieces["json"], contents, row_id(row, "") or None)


def listed(
    shards: Sequence[Path], report: SkipReport, check: PictureCheck
) -> Iterator[tuple[Path, list[tuple[str, dict[str, Piece]]]]]:
    """Each shard with its samples (`samples_in`); the check is told how many to expect of all."""
    so_far = 0
    for number, shard in enumerate(shards, start=1):
        samples = list(samples_in(shard, report))
        so_far += len(samples)
        check.expect(so_far * len(shards) // number)
        yield shard, samples


def _ends_at(shard: Path, offset: int) -> bool:
    """Whether the archive's end stands there: tarfile is silent where a header is cut short."""
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


def samples_in(shard: Path, report: SkipReport) -> Iterator[tuple[str, dict[str, Piece]]]:
    """Names of samples and the places of their files by ending, as far as the shard is whole."""
    key, pieces = None, {}
    try:
        with tarfile.open(shard, "r:") as tar:  # "r:": a compressed file has no places
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if key is not None:
                        yield key, pieces
                    key, pieces = name, {}
                pieces[ending.lower()] = Piece(member.offset_data, member.size)
            if not _ends_at(shard, tar.offset):
                raise tarfile.ReadError("it stops without an end")
    except tarfile.TarError as error:
        report.add("shard is broken", f"{shard.name} ({error})")
    if key is not None:
        yield key, pieces

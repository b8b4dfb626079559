"""CAFT's samples from webdataset shards, by place.

A plain tar file says where each of its files begins. Reading the shards once finds every sample,
and from then on each can be read without those before it: samples of shards are shuffled one by
one, and training resumes in the middle of an epoch, as with a folder.
"""

from __future__ import annotations

import glob
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

from ..errors import UserError
from ..glit import SkipReport, Unusable, decode_image
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
    pattern: str | Path, splitting: Splitting | None = None
) -> tuple[ShardSamples, SkipReport]:
    """Read shards with DreamLIP's keys: their usable samples, in order, and what was skipped.

    A sample is the files in a row that share their name up to its first dot: an image, and a JSON
    object with captions. Every image is decoded once, which finds those that are broken.

    Args:
        pattern: plain tar files, "shards/part-*.tar", read in the order of their names.

    Raises UserError where nothing matches the pattern.
    """
    splitting = splitting or Splitting()
    shards = [Path(name) for name in sorted(glob.glob(str(pattern)))]
    if not shards:
        raise UserError(f"there is no shard {pattern}")
    report, digest = SkipReport(), hashlib.sha256()
    places: list[tuple[int, ...]] = []

    # Decoding is most of the work and leaves the interpreter's lock; order is kept.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, shard in enumerate(shards):
            check = partial(_checked, shard, splitting)
            for found in pool.map(check, list(samples_in(shard, report))):
                if isinstance(found, Unusable):
                    report.add(found.reason, found.name)
                else:
                    sample, contents = found
                    digest.update(contents)
                    places.append((number, *sample.image, *sample.text))
    report.read = len(places)
    table = torch.tensor(places, dtype=torch.int64).reshape(-1, 5)
    return ShardSamples(shards, table, splitting, digest.hexdigest()[:16]), report


def _checked(
    shard: Path, splitting: Splitting, found: tuple[str, dict[str, Piece]]
) -> tuple[ShardSample, bytes] | Unusable:
    """The sample, and what its digest is made of; or why it can not be used."""
    key, pieces = found
    name = f"{shard.name}/{key}"
    image = next((pieces[end] for end in IMAGE_ENDINGS if end in pieces), None)
    if image is None:
        return Unusable("sample has no image", name)
    if "json" not in pieces:
        return Unusable("sample has no caption", name)
    sample = ShardSample(shard, image, pieces["json"], splitting)
    text = sample.text.read(shard)
    try:
        captions_of(json_object(text, name), splitting)
        decode_image(image.read(shard), name)
    except Unusable as unusable:
        return Unusable(unusable.reason, unusable.name or name)
    return sample, name.encode() + b"\0" + hashlib.sha256(text).digest()


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

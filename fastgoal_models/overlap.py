"""Which test images were trained on: results on those say little.

Content decides wherever both files are here. Where the training image is not, its name does, if
that is no mere number: GLIT100k and DCI both keep SA-1B's names. The same picture in other bytes
and under another name is not found.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .caft.data import IMAGE_ENDINGS, json_object
from .caft.shards import Piece, samples_in
from .errors import ConfigError
from .glit import json_lines
from .sets import CaptionSet
from .shard_names import shard_paths
from .skips import SkipReport, Unusable


class TrainingImage(NamedTuple):
    """An image that training data name."""

    stem: str
    """its name without folder and ending"""
    file: Path
    """itself, or the shard that it lies in"""
    piece: Piece | None
    """its bytes within `file`; None where they are not here"""


@dataclass(frozen=True)
class Overlap:
    """What a comparison of test images with training images found; test images by id."""

    by_content: int = 0
    """training images whose bytes are here"""
    by_name: int = 0
    """those that are not, and were compared by name alone"""
    not_compared: int = 0
    """those that are not, and have a mere number for a name"""
    compared_in_part: int = 0
    """test images that could not be compared with every training image, one way or the other"""
    same_content: tuple[str, ...] = ()
    same_name: tuple[str, ...] = ()
    """of a training image that is not here"""
    same_name_other_content: tuple[str, ...] = ()
    """perhaps the same picture, saved again; perhaps another camera's IMG_0001"""


def training_images(
    annotations: Path, root: Path | None = None
) -> tuple[list[TrainingImage], SkipReport]:
    """The images that a file of training data names, whether they are here or not.

    JSON lines with an `image`, relative to `root` (default: the file's folder), or shards,
    'part-*.tar', whose images lie in them. The report names shards that are broken: they are read
    up to there, as for training. Raises ConfigError where none is named.
    """
    report = SkipReport()
    if annotations.suffix == ".tar":
        shards = shard_paths(annotations, "--trained-on")
        images = [image for shard in shards for image in _in_shard(shard, report)]
    elif annotations.is_file():
        images = [_file((root or annotations.parent) / name) for name in _names(annotations)]
    else:
        raise ConfigError(f"--trained-on {annotations}: there is no such file")
    report.read = len(images)
    if not images:
        why = f". {report}" if report.counts else ""
        raise ConfigError(
            f"--trained-on {annotations} names no image: nothing was compared{why}. Fix: name the "
            "file or the shards that were given to `fastgoal train --data`"
        )
    return images, report


def _in_shard(shard: Path, report: SkipReport) -> Iterator[TrainingImage]:
    for key, pieces in samples_in(shard, report):
        for ending, piece in pieces.items():
            if ending.rpartition(".")[2] in IMAGE_ENDINGS:
                stem = Path(f"{key}.{ending}").stem
                yield TrainingImage(stem, shard, piece if piece.size else None)


def _names(annotations: Path) -> dict[str, None]:
    """The images that JSON lines name, once each, in order."""
    names: dict[str, None] = {}
    with annotations.open("rb") as file:
        for number, line in json_lines(file):
            try:
                image = json_object(line, f"line {number}").get("image")
            except Unusable:
                continue
            if isinstance(image, str):
                names[image] = None
    return names


def _file(path: Path) -> TrainingImage:
    size = _size(path)
    return TrainingImage(path.stem, path, Piece(0, size) if size else None)


def compare(tested: CaptionSet, training: Iterable[TrainingImage]) -> Overlap:
    """Which test images are among the training images, and how far that can be told.

    Only files of equal size are read.
    """
    sizes = [_size(item.image) for item in tested.images]
    by_size: dict[int, list[int]] = {}
    by_stem: dict[str, list[int]] = {}
    for place, item in enumerate(tested.images):
        by_size.setdefault(sizes[place], []).append(place)
        if _telling(item.image.stem):
            by_stem.setdefault(item.image.stem, []).append(place)
    by_size.pop(0, None)
    digests: dict[int, dict[bytes, list[int]]] = {}
    content = name = neither = numbered = 0
    same, alike, differing = set[int](), set[int](), set[int]()
    for image in training:
        here, telling = image.piece is not None, _telling(image.stem)
        if image.piece is not None and image.piece.size in by_size:
            size = image.piece.size
            digest = _digest(image.file, image.piece)
            here = digest is not None
            if size not in digests:
                digests[size] = {}
                for place in by_size[size]:
                    own = _digest(tested.images[place].image, Piece(0, size))
                    if own is not None:
                        digests[size].setdefault(own, []).append(place)
            if digest is not None:
                same.update(digests[size].get(digest, ()))
        for place in by_stem.get(image.stem, ()):
            (differing if here and sizes[place] else alike).add(place)
        content += here
        name += not here and telling
        neither += not here and not telling
        numbered += here and not telling

    def in_part(place: int) -> bool:
        telling = _telling(tested.images[place].image.stem)
        by_names = telling and not numbered  # what it takes where its own file is not here
        return bool(neither or (name and not telling) or not (sizes[place] or by_names))

    def ids(places: set[int]) -> tuple[str, ...]:
        return tuple(tested.images[place].id for place in sorted(places))

    return Overlap(
        by_content=content,
        by_name=name,
        not_compared=neither,
        compared_in_part=sum(map(in_part, range(len(tested.images)))),
        same_content=ids(same),
        same_name=ids(alike - same),
        same_name_other_content=ids(differing - alike - same),
    )


def _telling(stem: str) -> bool:
    """Whether two files of that name may be one: every folder has its 12.png."""
    return not (stem.isdecimal() and len(stem.lstrip("0")) < 7)


def _size(path: Path) -> int:
    """The bytes of a file, 0 where there is none, or none that can be named."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _digest(file: Path, piece: Piece) -> bytes | None:
    """Of a file's piece; None where it can not be read, or a shard is cut short within it."""
    try:
        data = piece.read(file)
    except OSError:
        return None
    return hashlib.sha256(data).digest() if len(data) == piece.size else None

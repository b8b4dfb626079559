"""What a set of captioned images is, whichever layout it came in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..glit import inside, json_lines
from ..retrieval import LONG_TEXT_KS
from ..skips import SkipReport, Unusable


class SetError(UserError, ValueError):
    """A data set that can not be read; the message names the file and says where to get it."""


@dataclass(frozen=True)
class CaptionedImage:
    """A picture and the captions that belong to it, one or more."""

    id: str
    image: Path
    captions: tuple[str, ...]


@dataclass
class CaptionSet:
    """Captioned images in the order of their set, and what of it was left out."""

    name: str
    images: list[CaptionedImage]
    ks: tuple[int, ...] = LONG_TEXT_KS
    """the K that papers report for it"""
    report: SkipReport = field(default_factory=SkipReport)
    note: str | None = None
    """why its results do not compare with published ones; None where nothing speaks against it"""

    @property
    def num_captions(self) -> int:
        return sum(len(item.captions) for item in self.images)


@dataclass(frozen=True)
class Layout:
    """A set as its authors publish it: how to read one folder of it, and where to get it."""

    name: str
    title: str
    read: Callable[[Path, Layout], CaptionSet]
    source: str
    """where to get it"""
    holds: str
    """what its folder holds"""
    counts: tuple[int, int] | None = None
    """images and captions of the complete set"""
    ks: tuple[int, ...] = LONG_TEXT_KS


Row = tuple[object, object, object]
"""An id (None: the image's name), an image relative to a folder, and a list of captions: all of
them as they stand in the file, of whatever type."""


def require(path: Path, layout: Layout) -> Path:
    """The path. Raises SetError where there is none, which says where to get the set."""
    if not path.exists():
        raise SetError(
            f"{layout.title}: {path} is missing. Fix: --root is the folder that holds "
            f"{layout.holds}; get the set from {layout.source}"
        )
    return path


def first_of(root: Path, *names: str) -> Path:
    """The first of these names that exists in the folder; the very first where none does."""
    paths = [root / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def read_json(path: Path, layout: Layout) -> Any:
    """A whole JSON file of the set. Raises SetError for one that is missing or damaged."""
    try:
        return json.loads(require(path, layout).read_bytes())
    except OSError as error:
        raise SetError(f"{layout.title}: {path} can not be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise SetError(f"{layout.title}: {path} is not JSON ({error})") from error


def read_rows(path: Path, layout: Layout, key: str | None = None) -> Iterator[Any]:
    """The objects of a JSON file that is a list, or that holds one under `key`.

    An element that is no object is an Unusable. Raises SetError for a file of another shape.
    """
    rows = read_json(path, layout)
    if key is not None:
        rows = rows.get(key) if isinstance(rows, dict) else None
    if not isinstance(rows, list):
        wanted = "a list" if key is None else f'an object with a list "{key}"'
        raise SetError(f"{layout.title}: {path} is not {wanted}. Get it from {layout.source}")
    for number, row in enumerate(rows, start=1):
        yield row if isinstance(row, dict) else Unusable("row is not an object", f"row {number}")


def read_json_lines(path: Path, layout: Layout) -> Iterator[Any]:
    """The objects of a JSONL file. A line that is none, or not UTF-8, is an Unusable.

    Raises SetError for a file that is missing or can not be read.
    """
    try:
        with require(path, layout).open("rb") as file:
            for number, line in json_lines(file):
                yield _parse_line(line, f"{path.name} line {number}")
    except OSError as error:
        raise SetError(f"{layout.title}: {path} can not be read ({error})") from error


def _parse_line(line: bytes, name: str) -> dict[str, Any] | Unusable:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Unusable("line is not UTF-8", name)
    except (ValueError, RecursionError):
        return Unusable("line is not JSON", name)
    return row if isinstance(row, dict) else Unusable("line is not an object", name)


def read_part(folder: Path, file: str, what: str) -> bytes:
    """A file of one row alone, called `what`. Raises Unusable where there is none."""
    try:
        return inside(folder.resolve(), file, file).read_bytes()
    except (Unusable, OSError, ValueError):
        raise Unusable(f"{what} is missing or leaves its folder", file) from None


def gather(rows: Iterable[Row | Unusable], folder: Path, into: Layout | CaptionSet) -> CaptionSet:
    """A new set of (id, image relative to the folder, captions), or the set with these added.

    A row whose image is missing or leaves the folder, whose captions are not text or all blank,
    or whose id was seen before is left out, counted and named. So is an Unusable among the rows.
    """
    found = into if isinstance(into, CaptionSet) else CaptionSet(into.name, [], into.ks)
    folder, seen = folder.resolve(), {item.id for item in found.images}
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, Unusable):
                raise row
            item = _usable(*row, folder, number)
            if item.id in seen:
                raise Unusable("id appears twice", item.id)
        except Unusable as skip:
            found.report.add(skip.reason, skip.name)
            continue
        seen.add(item.id)
        found.images.append(item)
    found.report.read = len(found.images)
    return found


def _usable(
    identity: object, image: object, captions: object, folder: Path, number: int
) -> CaptionedImage:
    if not isinstance(image, str) or not image:
        raise Unusable("image is not named", f"row {number}")
    identity = image if identity is None else identity
    if not isinstance(identity, (str, int)):
        raise Unusable("id is not text", f"row {number} ({image})")
    name = image if identity == image else f"{identity} ({image})"
    path = inside(folder, image, name)
    if not _is_file(path):
        raise Unusable("image is missing", name)
    if not isinstance(captions, Sequence) or isinstance(captions, str):
        raise Unusable("captions are not a list", name)
    texts = [caption.strip() for caption in captions if isinstance(caption, str)]
    if len(texts) < len(captions):
        raise Unusable("caption is not text", name)
    kept = tuple(filter(None, texts))
    if not kept:
        raise Unusable("caption is empty", name)
    try:
        "".join(kept).encode()
    except UnicodeEncodeError:
        raise Unusable("caption is not valid Unicode", name) from None
    return CaptionedImage(str(identity), path, kept)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False

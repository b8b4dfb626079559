"""GLIT: images, long captions and their matched local pairs, one JSON object a line.

    {"id": "cat", "image": "images/cat.jpg", "width": 451, "height": 300,
     "caption": "A tabby cat … . Its eyes are green.", "sentences": ["A tabby cat … .", "Its …"],
     "pairs": [{"sentence": 1, "box": [112.5, 75, 337.5, 225], "region": "centre", "score": 0.31}]}

`image` is relative to the data folder and may not leave it. Widths, heights and boxes mean the
upright picture, after the camera's own rotation. `sentences` and `pairs` may be missing; `pairs`
come best first and name a sentence by its place. `captions` lists all captions of the picture where
there are several: retrieval is evaluated on all of them, and `caption`, by default the first of
them, is the one that is trained on. Other keys are kept as they are.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from .captions import split_sentences
from .errors import GlitError
from .pictures import Box, open_image
from .skips import SkipReport, Unusable

_OWN_KEYS = ("id", "image", "width", "height", "caption", "captions", "sentences", "pairs")


class LocalPair(NamedTuple):
    """A region of the picture and the sentence that tells of it."""

    sentence: int
    """its place in the record's `sentences`"""
    box: Box
    region: str
    """what the region is called: "upper left", "centre", …"""
    score: float
    """cosine of the two embeddings"""


@dataclass(frozen=True)
class GlitRecord:
    """One picture with its caption. `pairs` come best first; `extra` holds a file's other keys."""

    id: str
    image: Path
    width: int
    height: int
    caption: str
    sentences: tuple[str, ...]
    pairs: tuple[LocalPair, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    """all captions of the picture, where its row lists them"""


def read_glit(
    jsonl: str | Path,
    root: str | Path | None = None,
    strict: bool = False,
    verify_images: bool = True,
    judge: Callable[[str, Callable[[bool], GlitRecord]], GlitRecord | Unusable] | None = None,
) -> tuple[list[GlitRecord], SkipReport]:
    """Read a GLIT file: its usable records, in order, and what was skipped.

    `root` is the data folder that images are relative to and may not leave (default: the file's
    own folder). A record is skipped, or with `strict` refused by a GlitError, for: a line that is
    not UTF-8 or not a JSON object (named by its number), an empty caption, `captions` that are not
    a list of texts, sentences that are not the caption, a pair that names no sentence or no part of
    the picture, an id seen before, an image that leaves the data folder (absolute, `..`, a link),
    is missing, empty or corrupt, or has too many pixels. `verify_images` decodes every picture,
    which finds files cut short; without it only their headers are read. `judge` decides that line
    by line, called with its number and what reads it (`PictureCheck.judge`).
    """
    jsonl = Path(jsonl)
    folder = (jsonl.parent if root is None else Path(root)).resolve()
    report = SkipReport()
    records: list[GlitRecord] = []
    seen: set[str] = set()

    def parse(numbered: tuple[int, bytes]) -> GlitRecord | Unusable:
        def read(decode: bool) -> GlitRecord:
            return parse_line(*numbered, folder, decode)

        try:
            return read(verify_images) if judge is None else judge(str(numbered[0]), read)
        except Unusable as skip:
            return skip

    # Decoding is most of the work and leaves the interpreter's lock; order is kept.
    with jsonl.open("rb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(parse, json_lines(file)):
            if isinstance(found, GlitRecord) and found.id in seen:
                found = Unusable("id appears twice", found.id)
            if isinstance(found, Unusable):
                if strict:
                    pool.shutdown(cancel_futures=True)  # rather than read all the other pictures
                    raise GlitError(f"{jsonl}: {found}") from found
                report.add(found.reason, found.name)
            else:
                seen.add(found.id)
                records.append(found)
    report.read = len(records)
    report.hint = hint_at_root(jsonl, folder, report)
    return records, report


def hint_at_root(jsonl: Path, folder: Path, report: SkipReport) -> str | None:
    """Where the images may be, if not one of them is in `folder`.

    `fastgoal prepare` notes the folder beside what it writes.
    """
    if report.read or report.counts.keys() != {"image is missing"}:
        return None
    try:
        note = json.loads(jsonl.with_name(f"{jsonl.name}.provenance.json").read_text("utf-8"))
        root = str(note["root"])
    except (OSError, ValueError, TypeError, KeyError):
        root = "FOLDER"
    option = f"--root {root}, or for --eval-data --eval-root {root}"
    return f"No image is in {folder}, where their paths start. Fix: {option}"


def json_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSONL file that are not blank, with their numbers from 1."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark some editors put before UTF-8
        if line.strip():
            yield number, line


def parse_line(
    number: int, line: bytes, folder: Path, verify_images: bool, with_pairs: bool = True
) -> GlitRecord:
    """The record of one line; its images lie in `folder`. Raises Unusable."""
    name = f"line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unusable("line is not UTF-8", name) from None
    except (ValueError, RecursionError):
        raise Unusable("line is not JSON", name) from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise Unusable("line is not an object with an image", name)
    name = f"{name} ({row['image']})"
    path = inside(folder, row["image"], name)

    def size() -> tuple[int, int]:
        try:
            return open_image(path, decode=verify_images)[1:]
        except Unusable as skip:
            raise Unusable(skip.reason, name) from skip

    return GlitRecord(
        **row_fields(row, name, size, with_pairs),
        id=row_id(row, row["image"]),
        image=path,
        extra={key: value for key, value in row.items() if key not in _OWN_KEYS},
    )


def row_id(row: dict[str, Any], otherwise: str) -> str:
    """A row's id as text; a null is no id."""
    identity = row.get("id")
    return otherwise if identity is None else str(identity)


def row_fields(
    row: dict[str, Any], name: str, size: Callable[[], tuple[int, int]], with_pairs: bool = True
) -> dict[str, Any]:
    """What a record takes from a row and its picture's width and height, all checked.

    `size` is asked for last, because it may have to decode the picture. Raises Unusable.
    """
    captions = _captions(row, name)
    caption = row.get("caption")
    if caption is None and captions:
        caption = captions[0]
    if not isinstance(caption, str) or not says_something(caption):
        raise Unusable("caption is empty", name)
    try:
        "".join([caption, *captions]).encode()
    except UnicodeEncodeError:
        raise Unusable("caption is not valid Unicode", name) from None
    sentences = row.get("sentences") or split_sentences(caption)
    if not _make_up(sentences, caption):
        raise Unusable("sentences do not make up the caption", name)
    width, height = size()
    pairs = (row.get("pairs") or []) if with_pairs else []
    if pairs and (row.get("width", width), row.get("height", height)) != (width, height):
        raise Unusable("boxes are for a picture of another size", name)
    return {
        "caption": caption,
        "captions": captions,
        "sentences": tuple(sentences),
        "width": width,
        "height": height,
        "pairs": _parse_pairs(pairs, len(sentences), width, height, name),
    }


def _captions(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """The captions that a row lists, without those that say nothing. Raises Unusable."""
    captions = row.get("captions")
    if captions is None:
        return ()
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise Unusable("captions are not a list of texts", name)
    return tuple(text for text in captions if says_something(text))


def says_something(text: str) -> bool:
    """Whether there is anything in a text that can be seen."""
    return any(c.isprintable() and not c.isspace() for c in text)


def _make_up(sentences: object, caption: str) -> bool:
    """Whether the sentences are the caption, cut at whitespace and nothing left out."""
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        return False
    return all(s.strip() for s in sentences) and " ".join(sentences).split() == caption.split()


def inside(folder: Path, image: str, name: str) -> Path:
    """The path of an annotation's image, which may not leave the folder. Raises Unusable."""
    # An absolute path of another system is no less a way out once the data set is carried there.
    absolute = PurePosixPath(image).is_absolute() or PureWindowsPath(image).anchor
    try:
        path = (folder / image).resolve()
    except (OSError, ValueError, RuntimeError):  # a zero byte, a name too long, links in a circle
        raise Unusable("image is missing", name) from None
    if absolute or not path.is_relative_to(folder):
        raise Unusable("image leaves the data folder", name)
    return path


def _parse_pairs(
    rows: Any, sentences: int, width: int, height: int, name: str
) -> tuple[LocalPair, ...]:
    pairs = []
    try:
        for row in rows:
            x1, y1, x2, y2 = (float(x) for x in row["box"])
            sentence, region, score = row["sentence"], str(row["region"]), float(row["score"])
            # Detectors round their boxes to a little past the edge: it is enough to overlap.
            overlaps = max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)
            if not overlaps or type(sentence) is not int or not 0 <= sentence < sentences:
                raise ValueError
            pairs.append(LocalPair(sentence, (x1, y1, x2, y2), region, score))
    except (TypeError, ValueError, KeyError):
        raise Unusable("local pair names no sentence or no part of the picture", name) from None
    return tuple(pairs)


def write_glit(records: Iterable[GlitRecord], path: str | Path) -> Path:
    """Write a GLIT file whose images are relative to its own folder, whole or not at all.

    Raises GlitError for a record whose image lies outside that folder.
    """
    path = Path(path)
    folder = path.parent.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name, so that two writers do not share it; in the same folder, so that the move is
    # one step.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(to_row(record, folder), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def to_row(record: GlitRecord, folder: Path) -> dict[str, Any]:
    """A record as one line's object; raises GlitError where its image lies outside `folder`."""
    image = record.image.resolve()
    if not image.is_relative_to(folder):
        raise GlitError(
            f"{record.id}: image {record.image} lies outside {folder}. "
            "Fix: write the file into the data folder"
        )
    return {
        "id": record.id,
        "image": image.relative_to(folder).as_posix(),
        "width": record.width,
        "height": record.height,
        "caption": record.caption,
        **({"captions": list(record.captions)} if record.captions else {}),
        "sentences": list(record.sentences),
        "pairs": [pair._asdict() for pair in record.pairs],
    } | record.extra

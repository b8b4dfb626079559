"""From images and captions to local pairs, in parts that can be stopped, shared out and resumed.

The input is cut into parts of so many lines. What becomes of a part depends on its lines, the
model, the detector and the options alone, and is written in one step below `OUT.parts/`; a run
that was killed goes on with the parts that are missing, and several processes can each make their
share. Whoever finds all parts there joins them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .atomic_files import write_text_atomically
from .caft.captions import split_published
from .captions import token_spans
from .errors import ConfigError, GlitError, UserError
from .flism import Matched, Matcher, Picture
from .glit import hint_at_root, json_lines, parse_line, to_row
from .parts import RUN, part_path, remove_parts
from .pictures import load_image
from .preprocessing import CLIP_NORMALISATION
from .skips import SkipReport, Unusable

PART = 256  # lines


class PrepareError(UserError, RuntimeError):
    """Local pairs can not be made, or not here; the message says why and what to do."""


class Share(NamedTuple):
    """Which parts are this process's: those whose number leaves `place` when divided by `of`."""

    place: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """From "2/8", the second of eight. Raises ConfigError."""
        first, _, last = text.partition("/")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ConfigError(f"a shard is written like 2/8, the second of eight; got {text!r}")
        return cls(int(first) - 1, int(last))


@dataclass(frozen=True)
class Prepared:
    """How far the pairs are."""

    path: Path
    done: bool
    """the whole file is there; False where other shards have parts to make"""
    report: SkipReport
    """what was kept and left out: of the whole file, or of this shard's parts"""
    parts: int
    parts_missing: int
    images: int = 0
    """matched by this call, and not before"""
    seconds: float = 0.0


class Input(NamedTuple):
    """A JSONL file of images and captions, cut into parts."""

    path: Path
    starts: list[int]
    """where each part begins, in bytes"""
    first_lines: list[int]
    """the number, from 1, of each part's first line"""
    lines: int
    digest: str

    def part(self, number: int) -> Iterator[tuple[int, bytes]]:
        """The lines of a part that are not blank, with their numbers."""
        last = number + 1 == len(self.starts)
        with self.path.open("rb") as file:
            file.seek(self.starts[number])
            data = file.read() if last else file.read(self.starts[number + 1] - self.starts[number])
        for at, line in json_lines(io.BytesIO(data)):
            yield self.first_lines[number] + at - 1, line


def cut(path: Path, lines_a_part: int = PART) -> Input:
    """Where the parts of a file lie, and a digest of all of it. Raises PrepareError."""
    if not path.is_file():
        raise PrepareError(f"{path}: there is no such file")
    digest, starts, first_lines, at, number = hashlib.sha256(), [], [], 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (number - 1) % lines_a_part == 0:
                starts.append(at)
                first_lines.append(number)
            digest.update(line)
            at += len(line)
    if not starts:
        raise PrepareError(f"{path} is empty")
    return Input(path, starts, first_lines, number, digest.hexdigest()[:16])


def prepare(
    data: Path,
    out: Path,
    matcher: Matcher,
    *,
    root: Path | None = None,
    identity: dict[str, Any] | None = None,
    keep_pairs: int | None = None,
    published: bool = False,
    share: Share | None = None,
    lines_a_part: int = PART,
    on_images: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Write a GLIT file with local pairs for every usable line of `data`.

    Args:
        data: JSONL with image and caption a line (`glit`); pairs that are there are made anew.
        out: the GLIT file; beside it `OUT.provenance.json`, and `OUT.parts/` while it is made.
        matcher: its model should be in evaluation mode.
        root: folder of the images, which the paths of both files are relative to (default: that of
            `data`).
        identity: what else decides the result, e.g. the model's name and its weights' digest.
        keep_pairs: of each picture, the best ones; None: one for every sentence.
        published: cut captions at every full stop and newline, as published code does, and join
            them its way; the caption as it was is kept as `original_caption`.
        share: this process's parts, where several work on one file.
        lines_a_part: what is lost at most when a run is killed.
        on_images: called with (lines done, lines in this process's parts) now and then.

    Raises:
        PrepareError: no input, or none of it usable; parts or a result that were made with other
            options.
    """
    root = (data.parent if root is None else root).resolve()
    source, share = cut(data, lines_a_part), share or Share()
    provenance: dict[str, Any] = {
        "data": source.digest, "lines": source.lines, "lines_a_part": lines_a_part,
        "keep_pairs": keep_pairs, "published": published, "rules": asdict(matcher.rules),
        "image_size": matcher.image_size, "context_length": matcher.tokenizer.context_length,
        "detector": None if matcher.detector is None else matcher.detector.identity(),
        "batch_size": matcher.batch_size, "bfloat16": matcher.autocast, **(identity or {}),
    }  # fmt: skip
    if matcher.normalisation != CLIP_NORMALISATION:  # older files do not say, and had no other
        provenance["normalisation"] = matcher.normalisation._asdict()
    name = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:16]
    folder, beside = _beside(out, ".parts"), _beside(out, ".provenance.json")
    if (finished := _finished(out, beside, name)) is not None:
        remove_parts(folder)
        return Prepared(out, True, finished, len(source.starts), 0)
    _claim(folder, name, provenance)

    mine = [n for n in range(len(source.starts)) if n % share.of == share.place]
    todo = [n for n in mine if not part_path(folder, n).is_file()]
    lines = _lines_in(source, todo, lines_a_part)
    images, seen, began = 0, 0, time.perf_counter()
    for number in todo:
        rows, skips = [], []
        numbered = list(source.part(number))
        for found in matcher.match(numbered, lambda line: _read(*line, root, published)):
            seen += 1
            if isinstance(found, Unusable):
                skips.append([found.reason, found.name])
            else:
                rows.append(_row(found, root, keep_pairs, name))
            if on_images is not None:
                on_images(seen, lines)
        images += len(rows)
        text = json.dumps({"rows": rows, "skips": skips}, ensure_ascii=False)
        write_text_atomically(part_path(folder, number), text)
    seconds = time.perf_counter() - began

    missing = sum(not part_path(folder, n).is_file() for n in range(len(source.starts)))
    report = None if missing else _join(folder, len(source.starts), out)
    if report is None:
        # Another shard may have joined them meanwhile, and taken the parts away.
        report = _finished(out, beside, name)
        if report is None and missing:
            report = _report(folder, mine)
            return Prepared(out, False, report, len(source.starts), missing, images, seconds)
        if report is None:
            raise PrepareError(f"parts of {folder} were removed meanwhile. Fix: run it again")
    elif not report.read:
        remove_parts(folder)  # of data that is mended they would be another run's
        report.hint = hint_at_root(data, root, report)
        raise PrepareError(f"{data} has no usable record, so nothing was written. {report}")
    else:
        notes = {"name": name, **provenance, "read": report.read, "skipped": report.counts}
        notes["root"] = str(root)  # for who looks for the images; the pairs do not depend on it
        _note(folder, beside, json.dumps(notes | {"names": report.names}, indent=1) + "\n")
    remove_parts(folder)
    return Prepared(out, True, report, len(source.starts), 0, images, seconds)


def kept_lines(data: Path, out: Path, lines_a_part: int = PART) -> tuple[int, int]:
    """How many lines of `data` lie in parts that are done, and how many there are."""
    source, folder = cut(data, lines_a_part), _beside(out, ".parts")
    done = [n for n in range(len(source.starts)) if part_path(folder, n).is_file()]
    return _lines_in(source, done, lines_a_part), source.lines


# -- one part -------------------------------------------------------------------------------------


def _read(number: int, line: bytes, root: Path, published: bool) -> Picture | Unusable:
    try:
        record = parse_line(number, line, root, verify_images=False, with_pairs=False)
        image = load_image(record.image)
    except Unusable as skip:
        return skip
    except GlitError as error:
        return Unusable("image is corrupt", f"line {number} ({error})")
    if published:
        pieces = published_sentences(record.caption)
        if not pieces:
            return Unusable("caption has no sentence the published way", f"line {number}")
        record = replace(
            record,
            caption=" ".join(pieces),
            sentences=tuple(pieces),
            extra=record.extra | {"original_caption": record.caption},
        )
    return Picture(record, image, record.image.relative_to(root).as_posix())


def published_sentences(caption: str) -> list[str]:
    """What `published` makes of a caption: sentences that, joined by spaces, are a new one."""
    return [f"{piece}." for piece in split_published(caption)]


def _row(found: Matched, root: Path, keep_pairs: int | None, provenance: str) -> dict[str, Any]:
    record = found.record
    regions = [
        {"name": name, "box": list(box)} | ({} if score is None else {"score": score})
        for name, box, score in found.regions
    ]
    kept = replace(record, pairs=record.pairs[:keep_pairs])
    more = {"spans": token_spans(found.words), "regions": regions, "provenance": provenance}
    return to_row(kept, root) | more


# -- parts and the whole --------------------------------------------------------------------------


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _lines_in(source: Input, parts: Sequence[int], lines_a_part: int) -> int:
    last = len(source.starts) - 1
    short = source.lines - last * lines_a_part
    return sum(short if number == last else lines_a_part for number in parts)


def _claim(folder: Path, name: str, provenance: dict[str, Any]) -> None:
    """Make the parts' folder this run's. Raises PrepareError where it is another's."""
    note = folder / RUN
    if note.is_file():
        there = json.loads(note.read_text("utf-8"))
        differ = [
            key
            for key in sorted({*there, *provenance})
            if there.get(key) != json.loads(json.dumps(provenance.get(key)))
        ]
        if differ:
            raise PrepareError(
                f"{folder} holds parts of a run that differs in {', '.join(differ)}. Fix: run it "
                "with the same options and data, or remove that folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(note, json.dumps(provenance, indent=1) + "\n")


def _finished(out: Path, beside: Path, name: str) -> SkipReport | None:
    """What was kept and left out, if the file of this very run is there. Raises PrepareError."""
    notes = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    if not out.exists():
        if notes.get("name") != name:  # of a file that was removed, and not of the one to come
            beside.unlink(missing_ok=True)
        return None
    if notes.get("name") != name:
        if notes or not _beside(out, ".parts").is_dir():
            raise PrepareError(
                f"{out} is there and was made otherwise. Fix: another --out, or remove it"
            )
        return None  # killed between the file and its note: joined anew
    return SkipReport(notes["read"], notes["skipped"], notes["names"])


def _parts(folder: Path, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        if (path := part_path(folder, number)).is_file():
            yield json.loads(path.read_text("utf-8"))


def _report(folder: Path, numbers: Sequence[int]) -> SkipReport:
    report = SkipReport()
    for part in _parts(folder, numbers):
        report.read += len(part["rows"])
        for reason, name in part["skips"]:
            report.add(reason, name)
    return report


def _join(folder: Path, parts: int, out: Path) -> SkipReport | None:
    """Write the whole file from its parts, in one step; of equal ids the first stays.

    None where another shard did so meanwhile, and took the parts away. Without a record there is
    no file.
    """
    report, seen, joined = SkipReport(), set(), 0
    # Among the parts, so that what a killed run leaves of it goes with them.
    temporary = folder / f"joined-{secrets.token_hex(4)}"
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for part in _parts(folder, range(parts)):
                joined += 1
                for reason, name in part["skips"]:
                    report.add(reason, name)
                for row in part["rows"]:
                    if row["id"] in seen:
                        report.add("id appears twice", row["id"])
                        continue
                    seen.add(row["id"])
                    report.read += 1
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if joined < parts:
            return None
        if report.read:
            temporary.replace(out)
    except FileNotFoundError:
        return None
    finally:
        temporary.unlink(missing_ok=True)
    return report


def _note(folder: Path, beside: Path, text: str) -> None:
    """Write what the file was made with beside it, in one step, and from among the parts, too."""
    temporary = folder / f"note-{secrets.token_hex(4)}"
    try:
        write_text_atomically(temporary, text)
        temporary.replace(beside)
    except FileNotFoundError:  # another shard was first, and took the parts away
        if not beside.is_file():
            raise

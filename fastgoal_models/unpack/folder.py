"""A folder of images with a `captions.jsonl`, written in parts that outlast interruptions.

Samples are numbered in the order of their source, and every so many are a part. A part's pictures
lie in a folder of their own; its lines, and what was left out of it, are written in one step below
`.unpack/` once they are all there. A run that was killed goes on behind the last part that is. When
all are, they are joined, and what they were made with is noted beside the file.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..atomic_files import write_text_atomically
from ..errors import UserError
from ..parts import RUN, part_path, remove_parts
from ..pictures import decode_image
from ..skips import SkipReport, Unusable
from .samples import Sample, Source

PART = 128  # samples: what is done again at most when a run was killed
JSONL = "captions.jsonl"
_PARTS = ".unpack"
_NOTE = f"{JSONL}.provenance.json"
_WORKERS = min(8, os.cpu_count() or 1)
_AHEAD = 4 * _WORKERS  # pictures in memory
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
# Of names that differ in more than their case, on every system a name like any other.
_PLAIN = re.compile(
    r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[a-z0-9_][a-z0-9_.-]{0,99}", re.IGNORECASE | re.ASCII
)


class UnpackError(UserError, RuntimeError):
    """A source that can not be unpacked, or not here; the message says why and what to do."""


@dataclass(frozen=True)
class Unpacked:
    """What became of a source."""

    jsonl: Path
    report: SkipReport
    """of the whole source"""
    samples: int
    """handled by this call, and not before"""
    seconds: float


class _Picture(NamedTuple):
    sample: Sample
    data: bytes
    ending: str


def write_folder(
    source: Source,
    out: Path,
    limit: int | None = None,
    on_samples: Callable[[int, int | None], None] = lambda done, of: None,
) -> Unpacked:
    """Write a source's samples, or its first `limit`, to `out/images` and `out/captions.jsonl`.

    Pictures are files as their authors made them, under their authors' name where that is a plain
    one. A sample whose picture can not be decoded, whose id came before or whose line JSON can not
    hold is left out and counted, besides what its source leaves out.

    Args:
        on_samples: called with (samples done, samples if known) now and then.

    Raises UnpackError for a folder that holds something else, or that was unpacked from something
    else, and where no sample can be used.
    """
    identity = json.loads(json.dumps({**source.identity, "--limit": limit}))
    parts = out / _PARTS
    if (finished := _finished(out, identity)) is not None:
        remove_parts(parts)
        return Unpacked(out / JSONL, finished, 0, 0.0)
    _claim(out, identity)

    seen: set[str] = set()
    number, done, state = 0, 0, None
    for part in _parts(parts):
        seen.update(row["id"] for row in part["rows"])
        number, done, state = number + 1, done + part["samples"], part["state"]
    total = limit if source.total is None else min(source.total, limit or source.total)
    before, began = done, time.perf_counter()
    left = None if limit is None else max(limit - done, 0)
    samples = islice(source.samples(done, state), left)
    samples = _counted(samples, done, lambda at: on_samples(at, total))
    with ThreadPoolExecutor(_WORKERS) as pool:
        while True:
            part = _make_part(samples, out, number, seen, pool)
            if not part["samples"]:
                break
            part["state"] = source.state()
            write_text_atomically(part_path(parts, number), json.dumps(part, ensure_ascii=False))
            number, done = number + 1, done + part["samples"]

    report = _join(out, source.report)
    if not report.read:
        remove_parts(parts)  # so that another option can be tried
        raise UnpackError(f"no sample of SOURCE can be used. {report}")
    notes = {"made_with": identity, "read": report.read, "skipped": report.counts}
    # From among the parts, too, so that nothing of a killed run stays in the folder.
    write_text_atomically(parts / _NOTE, json.dumps(notes | {"names": report.names}, indent=1))
    (parts / _NOTE).replace(out / _NOTE)
    remove_parts(parts)
    return Unpacked(out / JSONL, report, done - before, time.perf_counter() - began)


def _counted(
    samples: Iterator[Sample | Unusable], done: int, on_sample: Callable[[int], None]
) -> Iterator[Sample | Unusable]:
    for at, sample in enumerate(samples, start=done):
        on_sample(at)
        yield sample


def _make_part(
    samples: Iterator[Sample | Unusable],
    out: Path,
    number: int,
    seen: set[str],
    pool: ThreadPoolExecutor,
) -> dict[str, Any]:
    """Write the pictures of a part's samples; their lines, and what was left out.

    `seen` are the ids of the lines before, to which theirs are added.
    """
    rows: list[dict[str, Any]] = []
    skips: list[list[str]] = []
    done, used = 0, set[str]()
    while window := list(islice(samples, min(_AHEAD, PART - done))):
        kept = []
        # Decoding is most of the work and leaves the interpreter's lock; order is kept.
        for place, found in enumerate(pool.map(_checked, window), start=done):
            if isinstance(found, _Picture) and found.sample.row["id"] in seen:
                found = Unusable("id appears twice", found.sample.row["id"])
            if isinstance(found, Unusable):
                skips.append([found.reason, _printable(found.name)])
                continue
            row = found.sample.row
            seen.add(row["id"])
            name = f"{_free_name(found.sample.stem, place, used)}.{found.ending}"
            image = f"images/{number:05}/{name}"
            rows.append({"id": row["id"], "image": image} | row)
            kept.append((out / _PARTS, out / image, found.data))
        list(pool.map(lambda picture: _write(*picture), kept))
        done += len(window)
    return {"samples": done, "rows": rows, "skips": skips}


# -- one sample -----------------------------------------------------------------------------------


def _checked(sample: Sample | Unusable) -> _Picture | Unusable:
    """A sample that every command can read, or why it is left out."""
    if isinstance(sample, Unusable):
        return sample
    try:
        json.dumps(sample.row, ensure_ascii=False).encode()
        data = sample.image()
        if not data:
            raise Unusable("image is empty (zero bytes)", sample.name)
        decode_image(data, sample.name)
        with Image.open(io.BytesIO(data)) as picture:
            kind = picture.format or "image"
    except Unusable as skip:
        # Pillow's own words are never twice the same: they tell where in memory the file was.
        return Unusable(skip.reason, sample.name)
    except UnicodeEncodeError:
        return Unusable("text is not valid Unicode", sample.name)
    except (TypeError, ValueError, RecursionError):
        return Unusable("a value can not be written as JSON", sample.name)
    return _Picture(sample, data, _ENDINGS.get(kind, kind.lower()))


def _free_name(stem: str, place: int, used: set[str]) -> str:
    """The authors' name if it is plain, else a number: one that no other picture of the part has.

    The number is the place within the part, and small: `fastgoal eval --trained-on` takes pictures
    with a telling name in common for one and the same.
    """
    names = chain(
        [stem] if _PLAIN.fullmatch(stem) else [],
        [f"{place:04}"],
        (f"{place:04}-{again}" for again in count(1)),
    )
    name = next(name for name in names if name.lower() not in used)
    used.add(name.lower())
    return name


def _write(parts: Path, path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Among the parts, so that what a killed run leaves of it goes with them.
    temporary = parts / f"image-{secrets.token_hex(8)}"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _printable(name: str) -> str:
    """Without the halves of characters that stand for bytes of a file's name."""
    return name.encode("utf-8", "backslashreplace").decode()


# -- parts and the whole --------------------------------------------------------------------------


def _finished(out: Path, identity: dict[str, Any]) -> SkipReport | None:
    """What was kept and left out, if all of this very source is there. Raises UnpackError."""
    if not (out / _NOTE).is_file():
        return None
    notes = _load(out / _NOTE)
    _refuse_another(out, notes["made_with"], identity)
    if not (out / JSONL).is_file():  # removed, and so wanted anew
        return None
    return SkipReport(notes["read"], notes["skipped"], notes["names"])


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder this run's. Raises UnpackError where it is another's."""
    run = out / _PARTS / RUN
    if run.is_file():
        _refuse_another(out, _load(run), identity)
        return
    if out.exists() and not out.is_dir():
        raise UnpackError(f"--out {out} is a file. Fix: name a folder")
    there = [name for name in (JSONL, "images") if os.path.lexists(out / name)]
    if there and not (out / _NOTE).is_file():
        raise UnpackError(
            f"--out {out} holds {' and '.join(there)} already, not of this command. "
            "Fix: name another folder"
        )
    run.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(run, json.dumps(identity, indent=1) + "\n")


def _refuse_another(out: Path, there: dict[str, Any], identity: dict[str, Any]) -> None:
    differ = [
        "SOURCE (it is another, or has changed)"
        if key == "SOURCE"
        else f"{key} (there {_shown(there.get(key))}, here {_shown(identity.get(key))})"
        for key in identity | there
        if there.get(key) != identity.get(key)
    ]
    if differ:
        raise UnpackError(
            f"--out {out} was unpacked with another {', '.join(differ)}. Fix: the same arguments "
            "as there, another --out, or remove that folder"
        )


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _parts(parts: Path) -> Iterator[dict[str, Any]]:
    for number in count():
        if not (path := part_path(parts, number)).is_file():
            return
        yield _load(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UnpackError(f"{path} is damaged. Fix: remove the folder {path.parent}") from error


def _join(out: Path, known: SkipReport) -> SkipReport:
    """Write the whole file from its parts, in one step, unless there is no line."""
    report = SkipReport()
    for reason, amount in known.counts.items():
        report.counts[reason] = amount
        report.names[reason] = [_printable(name) for name in known.names[reason]]
    temporary = out / _PARTS / f"joined-{secrets.token_hex(4)}"
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for part in _parts(out / _PARTS):
            for reason, name in part["skips"]:
                report.add(reason, name)
            for row in part["rows"]:
                report.read += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if report.read:
        temporary.replace(out / JSONL)
    return report

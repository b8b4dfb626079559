"""Real photographs with long captions, readable offline.

The pictures are not part of this library: they lie inside packages that the extra `demo` installs
(scikit-image, scikit-learn, matplotlib), at the same place and with the same bytes in all the
versions that the extra allows. What we add is `photographs.jsonl`: one object a line with a long
caption of our own, its sentences, and the picture's place, size, licence and source.
"""

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import how_to_install

_FIX = f"Fix: {how_to_install('demo')}"


@dataclass(frozen=True)
class Photograph:
    """One picture on this machine and what is known about it.

    `sentences` joined by single spaces are exactly `caption`; `width` and `height` are in pixels.
    """

    id: str
    path: Path
    width: int
    height: int
    caption: str
    sentences: tuple[str, ...]
    licence: str
    source: str


def load_photographs() -> list[Photograph]:
    """All photographs, in the order of the annotation file.

    Raises FileNotFoundError, naming the package, when a package or one of its pictures is missing.
    """
    return [_photograph(row) for row in _rows()]


def write_annotations(folder: Path) -> Path:
    """Lay the photographs out as an ordinary data folder and return its annotation file.

    Pictures go to `folder/images/<id><ext>`, annotations to `folder/annotations.jsonl`, whose
    `image` is relative to `folder`. A second call copies nothing that is already there in the same
    size. Every file appears whole or not at all, so an interrupted call can simply be repeated.
    """
    folder = Path(folder)
    lines = []
    for row in _rows():
        photograph = _photograph(row)
        image = f"images/{photograph.id}{photograph.path.suffix}"
        _copy(photograph.path, folder / image)
        entry = {key: value for key, value in row.items() if key != "package"} | {"image": image}
        lines.append(json.dumps(entry) + "\n")
    annotations = folder / "annotations.jsonl"
    text = "".join(lines)
    _write(annotations, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
    return annotations


def _rows() -> list[dict[str, Any]]:
    text = files("fastgoal_models.demo").joinpath("photographs.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def _photograph(row: dict[str, Any]) -> Photograph:
    path = _package_folder(row["package"]) / row["image"]
    if not path.is_file():
        raise FileNotFoundError(
            f"the package {row['package']!r} has no picture {row['image']!r} "
            f"(looked for {path}). {_FIX}"
        )
    return Photograph(
        id=row["id"],
        path=path,
        width=row["width"],
        height=row["height"],
        caption=row["caption"],
        sentences=tuple(row["sentences"]),
        licence=row["licence"],
        source=row["source"],
    )


def _package_folder(package: str) -> Path:
    # Only looked up, not imported: these packages are slow to import and we want just their files.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {package!r}, which holds some of the demo photographs, is not installed. "
            f"{_FIX}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    _write(target, lambda path: shutil.copyfile(source, path))


def _write(target: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary neighbour of `target`, then move it into place in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A random name, so that two processes that lay out the same folder do not share it.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        fill(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)

"""Which test images were trained on: results on those say little."""

from __future__ import annotations

import glob
import hashlib
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

from .caft.data import IMAGE_ENDINGS, json_object
from .errors import ConfigError
from .glit import Unusable, json_lines
from .run_config import CONFIG_FILE
from .sets import CaptionSet


class TrainingData(NamedTuple):
    """What a run was trained on, as it says itself."""

    note: Path
    """the run's config.yaml"""
    data: Path
    root: Path | None


def noted_data(model: str) -> TrainingData | None:
    """What the run notes of which `model` is the folder, or that of a checkpoint; None if nothing.

    Paths start at the folder that `fastgoal train` was called in.
    """
    folder = Path(model).absolute()
    note = next((f / CONFIG_FILE for f in (folder, *folder.parents[:2]) if _is_run(f)), None)
    if note is None or not folder.is_dir():
        return None
    try:
        options = yaml.safe_load(note.read_text("utf-8"))
        root = options.get("root")
        return TrainingData(note, Path(options["data"]), None if root is None else Path(root))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return None


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / "checkpoints").is_dir()


def training_images(annotations: Path, root: Path | None = None) -> list[Path]:
    """The images that a file of training data names, whether they are here or not.

    JSON lines with an `image`, relative to `root` (default: the file's folder), or shards,
    'part-*.tar', whose images lie in them. Raises ConfigError where it names none.
    """
    shards = sorted(glob.glob(str(annotations))) if annotations.suffix == ".tar" else []
    if not shards and not annotations.is_file():
        raise ConfigError(f"--trained-on {annotations}: there is no such file")
    names = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names += [m.name for m in tar if m.name.lower().rpartition(".")[2] in IMAGE_ENDINGS]
    if not shards:
        with annotations.open("rb") as file:
            for number, line in json_lines(file):
                try:
                    image = json_object(line, f"line {number}").get("image")
                except Unusable:
                    continue
                if isinstance(image, str):
                    names.append(image)
    if not names:
        raise ConfigError(f"--trained-on {annotations} names no image: nothing was compared")
    return [(root or annotations.parent) / name for name in names]


def trained_on(tested: CaptionSet, training: Iterable[Path]) -> list[str]:
    """The ids of test images that are among the training images: by name, or byte for byte.

    By the file's name without its ending, where that is no mere number below a million: GLIT100k
    and DCI both keep SA-1B's names. By content only files of equal size are compared.
    """
    names: set[str] = set()
    sizes: dict[int, list[Path]] = {}
    for path in training:
        names.add(path.stem)
        if path.is_file():
            sizes.setdefault(path.stat().st_size, []).append(path)
    digests: dict[int, set[bytes]] = {}
    found = []
    for item in tested.images:
        if _telling(item.image.stem) and item.image.stem in names:
            found.append(item.id)
        elif item.image.is_file() and (size := item.image.stat().st_size) in sizes:
            if size not in digests:
                digests[size] = {_digest(path) for path in sizes[size]}
            if _digest(item.image) in digests[size]:
                found.append(item.id)
    return found


def _telling(stem: str) -> bool:
    return not (stem.isdecimal() and int(stem) < 1_000_000)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()

"""Pictures and captions from a dataset of the `datasets` library, already loaded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..glit import Unusable
from .base import CaptionSet, Row, SetError, gather

_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


def read_hugging_face(
    dataset: Any,
    folder: str | Path,
    image_column: str = "image",
    caption_column: str = "caption",
    id_column: str | None = None,
) -> CaptionSet:
    """One split of a dataset as a CaptionSet, its pictures written to the folder as they are.

    It downloads nothing and runs no code of the dataset: load that yourself, and pass
    `load_dataset(…, split="test")`. The caption column holds a text or a list of them.
    Raises SetError where the `datasets` package or a column is missing, for several splits at
    once, and for a dataset without any usable row.
    """
    try:
        from datasets import Image as ImageFeature  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise SetError(
            "reading a Hugging Face dataset needs the package `datasets`. Fix: pip install datasets"
        ) from error
    if isinstance(dataset, dict):
        raise SetError(f"the dataset has several splits. Fix: pass one of {', '.join(dataset)}")
    columns = list(dataset.column_names or [])
    for column in filter(None, (image_column, caption_column, id_column)):
        if column not in columns:
            raise SetError(f'the dataset has no column "{column}", only {", ".join(columns)}')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [column for column in (image_column, caption_column, id_column) if column]
    # Not decoded: the file's own bytes are written, as its authors made them.
    dataset = dataset.select_columns(wanted).cast_column(image_column, ImageFeature(decode=False))
    found = gather(_rows(dataset, folder, *wanted), folder, CaptionSet("hugging-face", []))
    if not found.images:
        raise SetError(f"no row of the dataset can be used. {found.report}")
    return found


def _rows(
    dataset: Any, folder: Path, image_column: str, caption_column: str, id_column: str | None = None
) -> Iterator[Row | Unusable]:
    for number, row in enumerate(dataset):
        try:
            image = _write(row[image_column], folder, f"{number:07}")
        except Unusable as skip:
            yield skip
            continue
        captions = row[caption_column]
        yield (
            number if id_column is None else row[id_column],
            image,
            [captions] if isinstance(captions, str) else captions,
        )


def _write(image: Any, folder: Path, stem: str) -> str:
    data = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(data, bytes):
        # It may name any file of this machine instead, which is not ours to copy.
        raise Unusable("image is not in the dataset itself", f"row {stem}")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            ending = _FORMATS.get(picture.format or "", "image")
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise Unusable("image is corrupt", f"row {stem}") from error
    name = f"{stem}.{ending}"
    (folder / name).write_bytes(data)
    return name

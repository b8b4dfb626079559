"""ImageInWords: three `data.jsonl`, over pictures of DOCCI, DOCCI-AAR and DCI.

The caption is the field `IIW`; the picture's name is `image`, in IIW-400 `image/key`, mostly
without `.jpg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..skips import Unusable
from .base import CaptionSet, Layout, Row, first_of, gather, read_json_lines, require

# The folder of the file, in both spellings that the authors' repository has known; the folder of
# its pictures; and where in it an unpacked archive leaves them.
_PARTS = (
    (("DOCCI_Test", "DOCCI_TEST"), "docci", ("images",)),
    (("IIW-400",), "docci_aar", ("images_aar",)),
    (("DCI_Test", "DCI_TEST"), "dci", ("densely_captioned_images/photos", "photos")),
)


def _read(root: Path, layout: Layout) -> CaptionSet:
    found = CaptionSet(layout.name, [], layout.ks)
    for names, images, inner in _PARTS:
        file = require(first_of(root, *(f"{name}/data.jsonl" for name in names)), layout)
        folder = first_of(require(root / images, layout), *inner, ".")
        gather(_rows(file, folder, layout), folder, found)
    return found


def _rows(file: Path, folder: Path, layout: Layout) -> Iterator[Row | Unusable]:
    present = {path.name for path in folder.iterdir()}
    for row in read_json_lines(file, layout):
        if isinstance(row, Unusable):
            yield row
            continue
        key = row.get("image", row.get("image/key"))
        image = key
        if isinstance(key, str):
            key = key.removesuffix(".jpg")
            image = f"{key}.jpg"
            # DOCCI-AAR's archive knows some of the pictures of IIW-400 by their place in training.
            other = image.replace("aar_test_", "aar_train_")
            image = other if image not in present and other in present else image
        yield key, image, [row.get("IIW")]


LAYOUTS = (
    Layout(
        "iiw",
        "ImageInWords",
        _read,
        "https://github.com/google/imageinwords (datasets/), the images from "
        "https://google.github.io/docci/#downloads (docci_images.tar.gz, docci_images_aar.tar.gz) "
        "and https://github.com/facebookresearch/DCI",
        "DOCCI_Test/, IIW-400/, DCI_Test/ with a data.jsonl each, and docci/, docci_aar/, dci/ "
        "with the images",
        (612, 612),
    ),
)

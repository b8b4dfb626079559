"""Pictures as a model sees them: read with care, upright, RGB; parts of them; tensors.

Files come from anywhere, so that reading is where things go wrong: only formats whose readers only
read are opened, none that would fill the memory, and what fails has a reason that can be counted.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import GlitError
from .skips import Unusable

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the upright picture"""

_EXIF_ORIENTATION = 0x0112
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")


def load_image(path: Path) -> Image.Image:
    """A picture as it is meant to be seen: upright, RGB, decoded to its end.

    Raises GlitError for a file that is missing, empty, not decodable, or larger than
    `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    try:
        return open_image(path, decode=True)[0]
    except Unusable as skip:
        raise GlitError(str(skip)) from skip


def open_image(path: Path, decode: bool) -> tuple[Image.Image, int, int]:
    """The picture and its upright width and height, from the header alone unless `decode`."""
    name = str(path)
    # Only regular files: opening a pipe would wait for ever.
    if not _is_file(path):
        raise Unusable("image is missing", name)
    if path.stat().st_size == 0:
        raise Unusable("image is empty (zero bytes)", name)
    return _read_image(path, name, decode)


def decode_image(data: bytes, name: str) -> Image.Image:
    """`load_image` of a file's contents, which are called `name`. Raises Unusable."""
    return _read_image(io.BytesIO(data), name, decode=True)[0]


def upright_size(data: bytes, name: str, decode: bool) -> tuple[int, int]:
    """Width and height of a file's contents, from the header alone unless `decode`.

    Raises Unusable.
    """
    return _read_image(io.BytesIO(data), name, decode)[1:]


def _read_image(file: Path | io.BytesIO, name: str, decode: bool) -> tuple[Image.Image, int, int]:
    try:
        with Image.open(file, formats=_formats()) as image:
            # Pillow itself only warns here, and refuses at twice the size.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Unusable(f"image has more than {limit:,} pixels", name)
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8):  # a quarter turn
                width, height = height, width
            if decode:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                image = _to_rgb(image)
            return image, width, height
    except (Unusable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"image has more than {Image.MAX_IMAGE_PIXELS:,} pixels", name) from None
    except UnidentifiedImageError:  # in whose message stands where in memory the file is
        raise Unusable("image is corrupt", f"{name} (no picture in a known format)") from None
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise Unusable("image is corrupt", f"{name} ({error})") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those of Pillow's readers that only read: it hands PostScript to a program that runs it."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255, which turns nearly all of them white.
        grey = np.asarray(image).astype(np.int64)
        if image.mode != "I" or grey.max(initial=0) > 255:
            grey = grey >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_region(image: Image.Image, box: Box) -> Image.Image:
    """The pixels a box touches, at least one of them, within the picture."""
    x1, x2 = _pixel_range(box[0], box[2], image.width)
    y1, y2 = _pixel_range(box[1], box[3], image.height)
    return image.crop((x1, y1, x2, y2))


def crop_pixels(pixels: np.ndarray, box: Box) -> np.ndarray:
    """`crop_region` of a picture's pixels (H, W, 3): a view of them."""
    height, width = pixels.shape[:2]
    x1, x2 = _pixel_range(box[0], box[2], width)
    y1, y2 = _pixel_range(box[1], box[3], height)
    return pixels[y1:y2, x1:x2]


def _pixel_range(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(max(math.floor(low), 0), size - 1)
    return first, min(max(math.ceil(high), first + 1), size)


def image_tensor(
    image: Image.Image | np.ndarray,
    image_size: int,
    mean: Sequence[float] = OPENAI_DATASET_MEAN,
    std: Sequence[float] = OPENAI_DATASET_STD,
) -> Tensor:
    """A picture squashed to S × S (bicubic, antialiased) and normalised: (3, S, S) float32.

    The picture may be its pixels (H, W, 3), uint8. Squashed, not cropped, so that boxes scale with
    the picture and nothing of it is lost.
    """
    pixels = image if isinstance(image, np.ndarray) else np.array(image)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    # On bytes, in one thread: several times faster than Pillow for the same filter, and as near to
    # it in float64. Both round to bytes between the two passes, here and there to another one.
    size = (image_size, image_size)
    squashed = F.interpolate(whole, size=size, mode="bicubic", antialias=True)[0]
    # In NumPy, which leaves the interpreter's lock and starts no threads of its own: this runs in
    # threads that read ahead.
    pixels = squashed.numpy().astype(np.float32, order="C")
    pixels /= np.float32(255)
    pixels -= np.array(mean, np.float32)[:, None, None]
    pixels /= np.array(std, np.float32)[:, None, None]
    return torch.from_numpy(pixels)

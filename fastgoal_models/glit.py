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

import io
import json
import math
import os
import random
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from .captions import pack_row, sentence_tokens, split_sentences
from .errors import ConfigError, UserError
from .fast_goal import FastGoalBatch
from .preprocessing import CLIP_NORMALISATION, Normalisation

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the upright picture"""

PAIR_SAMPLINGS = ("best", "uniform", "weighted")
LONG_CAPTIONS = ("cut", "chunk")

_EXIF_ORIENTATION = 0x0112
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")
_OWN_KEYS = ("id", "image", "width", "height", "caption", "captions", "sentences", "pairs")


class GlitError(UserError, ValueError):
    """A record, picture or data set that can not be used; the message names it and says why."""


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


@dataclass
class SkipReport:
    """What was left out of a data set and why: counts, and the first few names, per reason."""

    read: int = 0
    """records that are kept"""
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    hint: str | None = None
    """what to do about it, where that is known"""

    NAMES_KEPT = 3

    @property
    def skipped(self) -> int:
        return sum(self.counts.values())

    def add(self, reason: str, name: str) -> None:
        """Count one more, and keep its name if it is among the first of its reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < self.NAMES_KEPT:
            kept.append(name)

    def __str__(self) -> str:
        if not self.counts:
            return f"{self.read} records read, none skipped"
        lines = [f"{self.read} records read, {self.skipped} skipped:"]
        for reason, count in self.counts.items():
            more = ", …" if count > len(self.names[reason]) else ""
            lines.append(f"  {count} × {reason}: {', '.join(self.names[reason])}{more}")
        return "\n".join([*lines, self.hint] if self.hint else lines)


class Unusable(Exception):
    """A record that is left out: why, and what to call it."""

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason, self.name = reason, name


# -- pictures -------------------------------------------------------------------------------------


def load_image(path: Path) -> Image.Image:
    """A picture as it is meant to be seen: upright, RGB, decoded to its end.

    Raises GlitError for a file that is missing, empty, not decodable, or larger than
    `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    try:
        return _open_image(path, decode=True)[0]
    except Unusable as skip:
        raise GlitError(str(skip)) from skip


def _open_image(path: Path, decode: bool) -> tuple[Image.Image, int, int]:
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


# -- reading and writing --------------------------------------------------------------------------


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
            return _open_image(path, decode=verify_images)[1:]
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


# -- training data --------------------------------------------------------------------------------


class FastGoalDataset(Dataset[FastGoalBatch]):
    """Records with local pairs as what a training step needs, one picture at a time.

    Captions are tokenised once, here. An item's local pair is the record's best one whose sentence
    has words within the context (its best one where none has), or with `sampling` one that is drawn
    anew each epoch. Pictures and regions are squashed to S × S (`image_tensor`), without any
    augmentation, so that an item is always the same. `dataset[i]` is a FastGoalBatch without the
    batch axis, of the best pair; `dataset.at(epoch, i)` is that of the drawn one, and the same
    whenever it is asked for. Give `collate` to a DataLoader.

    Args:
        records: each with at least one local pair.
        tokenizer: CLIP's; of any context.
        image_size: S.
        context_length: L, the tokens of a text, start and end included.
        normalisation: of the pictures; the model's own.
        sampling: "best"; or one of the `top_k` best pairs, "uniform" each as often, "weighted" as
            often as its score is high (one that is not above 0 never, unless all are).
        top_k: pairs to draw from; fewer where a record has fewer within the context.
        seed: of the draws, which depend on it, the epoch and the item's number alone.
        long_captions: "cut" keeps of a caption what fits. "chunk" makes an item of each run of
            whole sentences that fits, as long as possible, with the pairs of those sentences; runs
            without a pair are left out. Items of one record have the same picture: a loss takes
            them for negatives of each other where they meet in a batch.
        load: a record's picture, upright and RGB, where it is not in the file `record.image`.

    Attributes, besides the arguments: `records` and `pairs`, the record and the best pair of each
    item; `truncated`, the items that lose the end of their text, of which a warning tells; `long`,
    the captions that run past the context; `left_out`, the runs without a pair; `single`, the items
    with only one pair to draw from.

    Raises GlitError for no records, or for records without pairs; ConfigError for a `sampling`,
    `top_k` or `long_captions` that is not one of the above.
    """

    def __init__(
        self,
        records: Sequence[GlitRecord],
        tokenizer: SimpleTokenizer,
        image_size: int,
        context_length: int = 248,
        normalisation: Normalisation = CLIP_NORMALISATION,
        *,
        sampling: str = "best",
        top_k: int = 3,
        seed: int = 0,
        long_captions: str = "cut",
        load: Callable[[Any], Image.Image] | None = None,
    ) -> None:
        if sampling not in PAIR_SAMPLINGS:
            raise ConfigError(f"--pairs must be one of {PAIR_SAMPLINGS}; got {sampling!r}")
        if long_captions not in LONG_CAPTIONS:
            raise ConfigError(
                f"--long-captions must be one of {LONG_CAPTIONS}; got {long_captions!r}"
            )
        if top_k < 1:
            raise ConfigError(f"--top-k must be at least 1; got {top_k}")
        if not records:
            raise GlitError("there are no records to train on")
        unmatched = [record.id for record in records if not record.pairs]
        if unmatched:
            raise GlitError(
                f"{len(unmatched)} of {len(records)} records have no local pair "
                f"({', '.join(unmatched[:3])}{', …' if len(unmatched) > 3 else ''}). "
                "Fix: run fastgoal_models.match_pairs on them first"
            )
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.context_length = context_length
        self.normalisation = normalisation
        self.sampling, self.seed = sampling, seed
        self._load = load
        room = context_length - 2
        kept = 1 if sampling == "best" else top_k
        tokens: list[int] = []
        starts = [0]
        self.records: list[GlitRecord] = []
        self._choices: list[list[_Choice]] = []
        self.long = self.left_out = 0
        for record in records:
            words = sentence_tokens(record.caption, record.sentences, tokenizer)
            ends = np.cumsum([0, *map(len, words)]).tolist()
            self.long += ends[-1] > room
            runs = [(0, len(words))]
            if long_captions == "chunk":
                runs = _runs_that_fit([len(sentence) for sentence in words], room)
            for first, last in runs:
                choices = _choices(record.pairs, ends, first, last, room)
                if not choices:
                    self.left_out += 1
                    continue
                self.records.append(record)
                self._choices.append(choices[:kept])
                tokens.extend(token for sentence in words[first:last] for token in sentence)
                starts.append(len(tokens))
        self.pairs: list[LocalPair] = [choices[0].pair for choices in self._choices]
        self.single = sum(len(choices) == 1 for choices in self._choices)
        # One flat tensor: workers share it, and a hundred thousand captions take 50 MB.
        self._tokens = torch.tensor(tokens, dtype=torch.int32)
        self._starts = starts
        self.truncated = int((np.diff(starts) > room).sum())
        if self.truncated:
            what = "captions" if long_captions == "cut" else "runs of sentences"
            warnings.warn(
                f"{self.truncated} of {len(self)} {what} are longer than {context_length} "
                "tokens and lose their end",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> FastGoalBatch:
        return self._item(index, self._choices[index][0])

    def at(self, epoch: int, index: int) -> FastGoalBatch:
        """Item `index` with the pair that was drawn for it in `epoch`."""
        return self._item(index, self._choices[index][self._drawn(epoch, index)])

    def _drawn(self, epoch: int, index: int) -> int:
        choices = self._choices[index]
        if len(choices) == 1:
            return 0
        # Mixed through a string, so that neighbouring seeds, epochs and items share nothing.
        generator = random.Random(f"pair/{self.seed}/{epoch}/{index}")
        scores = [choice.pair.score for choice in choices]
        weights = [score if 0 < score < math.inf else 0.0 for score in scores]
        if self.sampling == "uniform" or not any(weights):
            return generator.randrange(len(choices))
        return generator.choices(range(len(choices)), weights)[0]

    def _item(self, index: int, choice: _Choice) -> FastGoalBatch:
        record, (pair, start, end) = self.records[index], choice
        words = self._tokens[self._starts[index] : self._starts[index + 1]].tolist()
        room = self.context_length - 2
        image = load_image(record.image) if self._load is None else self._load(record)
        local = crop_region(image, pair.box)
        return FastGoalBatch(
            images=image_tensor(image, self.image_size, *self.normalisation),
            texts=pack_row(words, self.tokenizer, self.context_length),
            local_images=image_tensor(local, self.image_size, *self.normalisation),
            local_texts=pack_row(words[start:end], self.tokenizer, self.context_length),
            boxes=torch.tensor(pair.box, dtype=torch.float32),
            image_sizes=torch.tensor((record.width, record.height)),
            spans=torch.tensor((min(start, room) + 1, min(end, room) + 1)),
            lengths=torch.tensor(min(len(words), room) + 2),
        )


class _Choice(NamedTuple):
    """A pair that an item can have."""

    pair: LocalPair
    start: int
    """of the sentence's tokens within the item's"""
    end: int


def _choices(
    pairs: Sequence[LocalPair], ends: Sequence[int], first: int, last: int, room: int
) -> list[_Choice]:
    """The pairs of sentences first ... last − 1 that have words in the first `room` of theirs.

    The best one where none has; an empty list where the sentences have no pair.
    """
    begin = ends[first]
    choices = [
        _Choice(pair, ends[pair.sentence] - begin, ends[pair.sentence + 1] - begin)
        for pair in pairs
        if first <= pair.sentence < last
    ]
    fitting = [choice for choice in choices if choice.start < min(choice.end, room)]
    return fitting or choices[:1]


def _runs_that_fit(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Sentences of these many tokens as half-open runs of at most `room`, each as long as it can.

    A sentence that alone is longer is a run of its own.
    """
    runs, first, used = [], 0, 0
    for number, length in enumerate(lengths):
        if used + length > room and number > first:
            runs.append((first, number))
            first, used = number, 0
        used += length
    return [*runs, (first, len(lengths))]


def collate(items: Sequence[FastGoalBatch]) -> FastGoalBatch:
    """Items of a FastGoalDataset as one batch."""
    return FastGoalBatch(*(torch.stack(parts) for parts in zip(*items, strict=True)))

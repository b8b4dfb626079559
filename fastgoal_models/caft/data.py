"""CAFT's data: an image and K captions of each sample, from a folder with JSONL or from shards.

A sample has captions by name. DreamLIP's keys are known (`raw_caption`, `shortIB_captions`,
`longIB_captions` and the same of SV and LLA); so is one `caption`, which counts as a long one.

    {"image": "images/cat.jpg", "raw_caption": "a cat", "longIB_captions": "A cat sits … . It …"}

What can not be used is counted and named in a `SkipReport`; it never stops a run.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from open_clip import SimpleTokenizer
from PIL import Image
from torch import Tensor

from ..captions import split_sentences
from ..errors import GlitError, UserError
from ..glit import inside, json_lines, row_id
from ..picture_check import PictureCheck
from ..pictures import decode_image, image_tensor, load_image
from ..shard_names import shard_paths
from ..skips import SkipReport, Unusable
from .captions import Merge, merge, merge_published, split_published, training_captions

CAPTION_KEYS = (
    "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions",
    "shortLLA_captions", "longLLA_captions",
)  # fmt: skip
"""the keys of DreamLIP's shards"""

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
"""of a shard's images"""

Sentences = dict[str, list[str]]
"""the sentences of each caption of a sample, by its name"""


class CaftBatch(NamedTuple):
    """What one training step needs; an item of a data set is one without the batch axis."""

    images: Tensor
    """(N, 3, S, S) float32, CLIP-normalised"""
    texts: Tensor
    """(N, K, L) int64, start and end tokens included, zeros behind"""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CaftBatch:
        """The same batch on another device."""
        return CaftBatch(*(x.to(device, non_blocking=non_blocking) for x in self))


def collate(items: Sequence[CaftBatch]) -> CaftBatch:
    """Items as one batch."""
    return CaftBatch(*(torch.stack(parts) for parts in zip(*items, strict=True)))


def text_rows(captions: Sequence[str], tokenizer: SimpleTokenizer) -> Tensor:
    """(K, L) int64: the captions as the text encoder reads them, cut at the context."""
    return tokenizer(list(captions))


@dataclass(frozen=True)
class Splitting:
    """How a caption becomes sentences, and sentences a text again."""

    split: Callable[[str], list[str]] = split_sentences
    join: Merge = merge

    @classmethod
    def published(cls) -> Splitting:
        """Cuts at every full stop, newline and `</s>`."""
        return cls(split_published, merge_published)


def captions_of(row: Mapping[str, Any], splitting: Splitting) -> Sentences:
    """The sentences of a sample's captions, by name; raises Unusable where there are none."""
    found: Sentences = {}
    for key in (*CAPTION_KEYS, "caption"):
        texts = row.get(key)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list):
            continue
        strings = (text for text in texts if isinstance(text, str))
        sentences = [sentence for text in strings for sentence in splitting.split(text)]
        if sentences:
            found["long" if key == "caption" else key.removesuffix("_captions")] = sentences
    if not found:
        raise Unusable("sample has no caption", str(row.get("image", "")))
    return found


class CaftSample(Protocol):
    """What a data set needs of a sample, wherever it lies."""

    @property
    def captions(self) -> Sentences: ...

    def load(self) -> Image.Image:
        """The picture, upright and RGB."""
        ...


class CaftSamples(Protocol):
    """Samples by place."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CaftSample: ...


class CaftRecord(NamedTuple):
    """One sample of a folder."""

    image: Path
    captions: Sentences

    def load(self) -> Image.Image:
        return load_image(self.image)


def read_caft(
    jsonl: str | Path,
    root: str | Path | None = None,
    splitting: Splitting | None = None,
    check: PictureCheck | None = None,
) -> tuple[list[CaftRecord], SkipReport]:
    """Read a JSONL file: its usable samples, in order, and what was skipped.

    Left out are lines that are not UTF-8 or not a JSON object with an image, samples without a
    caption, those whose id (default: the image as it is written there) was seen before, and images
    that leave the data folder (`root`; default the file's own), are missing, empty, broken or have
    too many pixels. `check` says whether pictures are decoded; default: every one.
    """
    jsonl = Path(jsonl)
    splitting, check = splitting or Splitting(), check or PictureCheck()
    folder = (jsonl.parent if root is None else Path(root)).resolve()
    report, records = SkipReport(), {}

    def judged(numbered: tuple[int, bytes]) -> tuple[str, CaftRecord] | Unusable:
        def read(decode: bool) -> tuple[str, CaftRecord]:
            return _record(*numbered, folder, splitting, decode)

        return check.judge(str(numbered[0]), read)

    # Decoding is most of the work and leaves the interpreter's lock; order is kept.
    with jsonl.open("rb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(judged, json_lines(file)):
            if not isinstance(found, Unusable) and found[0] in records:
                found = Unusable("id appears twice", found[0])
            if isinstance(found, Unusable):
                report.add(found.reason, found.name)
            else:
                records[found[0]] = found[1]
    report.read = len(records)
    return list(records.values()), report


def _record(
    number: int, line: bytes, folder: Path, splitting: Splitting, decode: bool
) -> tuple[str, CaftRecord]:
    """The id and the sample of one line. Raises Unusable."""
    name = f"line {number}"
    row = json_object(line, name)
    if not isinstance(row.get("image"), str):
        raise Unusable("line is not an object with an image", name)
    path = inside(folder, row["image"], f"{name} ({row['image']})")
    captions = captions_of(row, splitting)
    if decode:
        try:
            load_image(path)
        except GlitError as error:
            raise Unusable("image can not be used", str(error)) from error
    elif not path.is_file():
        raise Unusable("image is missing", f"{name} ({row['image']})")
    return row_id(row, row["image"]), CaftRecord(path, captions)


def json_object(line: bytes, name: str) -> dict[str, Any]:
    """The JSON object in a line or a file called `name`. Raises Unusable."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unusable("line is not UTF-8", name) from None
    except (ValueError, RecursionError):
        raise Unusable("line is not JSON", name) from None
    if not isinstance(row, dict):
        raise Unusable("line is not an object", name)
    return row


class CaftDataset:
    """Samples of a folder or of shards; each epoch has other parts and extras of their captions.

    `at(epoch, index)` is a function of the seed, the epoch and the index alone: the same in every
    worker and after every resume. Images are squashed to S x S, without augmentation.

    Raises UserError for no records.
    """

    def __init__(
        self,
        records: CaftSamples,
        tokenizer: SimpleTokenizer,
        image_size: int,
        *,
        seed: int = 0,
        splitting: Splitting | None = None,
    ) -> None:
        if not records:
            raise UserError("there are no samples to train on")
        self.records, self.tokenizer, self.image_size = records, tokenizer, image_size
        self.seed, self.splitting = seed, splitting or Splitting()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> CaftBatch:
        return self.at(0, index)

    def at(self, epoch: int, index: int) -> CaftBatch:
        """The item, without the batch axis."""
        record = self.records[index]
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        texts = training_captions(record.captions, rng, join=self.splitting.join)
        image = image_tensor(record.load(), self.image_size)
        return CaftBatch(image, text_rows(texts, self.tokenizer))


def shard_samples(
    shards: str | Sequence[str],
    tokenizer: SimpleTokenizer,
    image_size: int,
    report: SkipReport,
    *,
    seed: int = 0,
    epoch: int = 0,
    splitting: Splitting | None = None,
) -> Iterator[CaftBatch]:
    """The samples of webdataset shards with DreamLIP's keys, once, in an order of seed and epoch.

    Needs the package webdataset. Shards are shuffled and dealt out to nodes and workers; a sample's
    captions depend on the seed, the epoch and its key. There is no resume within an epoch.

    Args:
        shards: "part-*.tar", "part-{000..099}.tar" or several of those, or paths.
        report: counts what was left out, and names it.

    Raises:
        UserError: webdataset is not installed, or a shard is missing.
    """
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise UserError("shards need the package webdataset: pip install webdataset") from error
    splitting = splitting or Splitting()

    def name_and_go_on(error: Exception) -> bool:
        report.add("shard is broken", f"{type(error).__name__}: {error}")
        return True

    # Files that are here, and nothing else: webdataset would run what follows a "pipe:".
    patterns = [shards] if isinstance(shards, str) else shards
    urls = [str(path) for pattern in patterns for path in shard_paths(pattern, "shards")]
    random.Random(f"{seed}/{epoch}").shuffle(urls)
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(handler=name_and_go_on),
    )
    for sample in pipeline:
        key = str(sample.get("__key__", ""))
        try:
            image = _decoded(sample, key)
            captions = captions_of(json_object(sample.get("json", b"{}"), key), splitting)
        except Unusable as unusable:
            report.add(unusable.reason, unusable.name or key)
            continue
        rng = random.Random(f"{seed}/{epoch}/{key}")
        texts = training_captions(captions, rng, join=splitting.join)
        report.read += 1
        yield CaftBatch(image_tensor(image, image_size), text_rows(texts, tokenizer))


def _decoded(sample: Mapping[str, Any], key: str) -> Image.Image:
    data = next((sample[end] for end in IMAGE_ENDINGS if end in sample), None)
    if not data:
        raise Unusable("sample has no image", key)
    return decode_image(data, key)

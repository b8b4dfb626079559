"""FLISM, FAST-GOAL's local pairs (arXiv 2605.26615): which sentence tells of which region.

Regions are the four quadrants, the centre and what a detector finds; sentences and crops are
embedded by a CLIP, and each sentence takes its most similar region.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from .captions import pack_row, sentence_tokens
from .detectors import Detection, Detector
from .errors import ConfigError
from .fast_goal import FastGoalModel
from .glit import GlitRecord, LocalPair
from .pictures import Box, crop_pixels, image_tensor, load_image
from .preprocessing import CLIP_NORMALISATION, Normalisation
from .skips import Unusable

Item = TypeVar("Item")


class Encoder(Protocol):
    """A CLIP: a FastGoalModel, an open_clip model, or anything that encodes like them.

    On a CPU several threads call it at once.
    """

    def encode_image(self, images: Tensor, /) -> Tensor: ...

    def encode_text(self, texts: Tensor, /) -> Tensor: ...


class Region(NamedTuple):
    """A part of a picture that a sentence may tell of."""

    name: str
    """"upper left", …, or what a detector calls it"""
    box: Box
    score: float | None = None
    """the detector's"""


@dataclass(frozen=True)
class RegionRules:
    """Which parts of a picture are looked at."""

    fixed: bool = True
    """the four quadrants and the centre; without them a picture may have no region at all"""
    most: int = 32
    """boxes of a detector that are kept, the surest ones"""
    least_area: float = 0.0
    """share of the picture that a detector's box must have"""

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ConfigError(f"most must be 0 or more; got {self.most}")
        if not 0 <= self.least_area <= 1:
            raise ConfigError(f"least_area is a share, from 0 to 1; got {self.least_area}")

    def regions(self, width: int, height: int, found: Sequence[Detection] = ()) -> list[Region]:
        """The regions of a picture: the fixed ones, then a detector's, cut to the picture."""
        fixed = fixed_regions(width, height) if self.fixed else {}
        regions = [Region(name, box) for name, box in fixed.items()]
        for detection in found:
            x1, y1, x2, y2 = detection.box
            box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
            area = (box[2] - box[0]) * (box[3] - box[1])
            real = box[0] < box[2] and box[1] < box[3]  # False for NaN, too
            if real and area >= self.least_area * width * height:
                regions.append(Region(detection.label, box, detection.score))
        return regions[: len(fixed) + self.most]


def fixed_regions(width: int, height: int) -> dict[str, Box]:
    """The four quadrants and the centre box, which has half the sides: x1, y1, x2, y2 in pixels."""
    w, h = float(width), float(height)
    return {
        "upper left": (0.0, 0.0, w / 2, h / 2),
        "upper right": (w / 2, 0.0, w, h / 2),
        "lower left": (0.0, h / 2, w / 2, h),
        "lower right": (w / 2, h / 2, w, h),
        "centre": (w / 4, h / 4, 3 * w / 4, 3 * h / 4),
    }


def best_pair(record: GlitRecord) -> LocalPair:
    """The pair FAST-GOAL trains on, the most similar one. Raises ValueError where there is none."""
    if not record.pairs:
        raise ValueError(f"{record.id} has no local pair. Fix: run match_pairs first")
    return record.pairs[0]


def match_pairs(
    model: Encoder,
    records: Sequence[GlitRecord],
    *,
    tokenizer: SimpleTokenizer | None = None,
    image_size: int | None = None,
    normalisation: Normalisation | None = None,
    detector: Detector | None = None,
    rules: RegionRules | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[GlitRecord]:
    """Give each sentence its most similar region: the records anew, their pairs best first.

    Regions (squashed crops) and sentences are embedded in batches; similarity is the cosine. Of
    equal scores the region, then the sentence, that comes first wins. `tokenizer`, `image_size` and
    `normalisation` default to the model's own (the last to CLIP's where it has none), `device` to
    where the model is. The model's training mode is put back afterwards.

    For sets that do not fit in memory, or take longer than one sitting: `fastgoal prepare`.

    Raises GlitError, naming it, for a picture that can not be read.
    """
    matcher = Matcher(
        model, tokenizer=tokenizer, image_size=image_size, normalisation=normalisation,
        detector=detector, rules=rules or RegionRules(), batch_size=batch_size, device=device,
    )  # fmt: skip
    module = model if isinstance(model, nn.Module) else nn.Module()
    was_training = module.training
    module.eval()
    try:
        with tqdm(
            total=len(records), desc="local pairs", unit="image", disable=not progress
        ) as bar:
            matched = []
            for found in matcher.match(records, _opened):
                assert isinstance(found, Matched)  # what can not be read is an error
                matched.append(found.record)
                bar.update()
    finally:
        module.train(was_training)
    return matched


class Picture(NamedTuple):
    """What is matched."""

    record: GlitRecord
    image: Image.Image
    name: str
    """what the detector calls it"""


def _opened(record: GlitRecord) -> Picture:
    return Picture(record, load_image(record.image), str(record.image))


class Matched(NamedTuple):
    """A record with its pairs, and what they were chosen from."""

    record: GlitRecord
    regions: list[Region]
    words: list[list[int]]
    """`sentence_tokens` of its caption"""


class Matcher:
    """Finds local pairs, a group of pictures at a time: each is decoded once, all share batches."""

    def __init__(
        self,
        model: Encoder,
        *,
        tokenizer: SimpleTokenizer | None = None,
        image_size: int | None = None,
        normalisation: Normalisation | None = None,
        detector: Detector | None = None,
        rules: RegionRules,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        autocast: bool = False,
    ) -> None:
        """`batch_size`: crops, and sentences, encoded at once. `autocast`: bfloat16 towers."""
        self.model, self.detector, self.rules = model, detector, rules
        self.tokenizer: SimpleTokenizer = tokenizer or _own(model, "tokenizer")
        self.image_size: int = image_size or _own(model, "image_size")
        self.normalisation: Normalisation = normalisation or getattr(
            model, "normalisation", CLIP_NORMALISATION
        )
        self.batch_size = batch_size
        if device is None:
            weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
            device = "cpu" if weight is None else weight.device
        self.device, self.autocast = torch.device(device), autocast
        if detector is None and not rules.fixed:
            raise ConfigError("there are no regions without the fixed ones and without a detector")
        expected = (5 if rules.fixed else 0) + (5 if detector is not None else 0)
        self.images_at_once = max(1, batch_size // expected)
        # Memory of another device is for the activations of one batch.
        self._turn: AbstractContextManager[Any] = (
            nullcontext() if self.device.type == "cpu" else threading.Lock()
        )

    def match(
        self, items: Sequence[Item], read: Callable[[Item], Picture | Unusable]
    ) -> Iterator[Matched | Unusable]:
        """What becomes of each item, in order: its pairs, or why `read` could not use it.

        A thread takes a group of items through all of its steps, and many threads one each. On a
        CPU a thread computes alone, too: small products wait for each other longer than they take.
        Another device is for one group at a time, whose next ones are decoded meanwhile.
        """
        groups = (
            items[start : start + self.images_at_once]
            for start in range(0, len(items), self.images_at_once)
        )
        threads = torch.get_num_threads()
        workers = threads if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        ahead: deque[Future[list[Matched | Unusable]]] = deque()
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for group in groups:
                ahead.append(pool.submit(self._group, group, read))
                if len(ahead) > workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # threads that are made later would begin with one

    def _group(
        self, items: Sequence[Item], read: Callable[[Item], Picture | Unusable]
    ) -> list[Matched | Unusable]:
        found = [read(item) for item in items]
        matched = iter(self._match([one for one in found if not isinstance(one, Unusable)]))
        return [one if isinstance(one, Unusable) else next(matched) for one in found]

    @torch.no_grad()
    def _match(self, pictures: Sequence[Picture]) -> list[Matched]:
        records = [picture.record for picture in pictures]
        images = [picture.image for picture in pictures]
        words = [
            sentence_tokens(record.caption, record.sentences, self.tokenizer) for record in records
        ]
        found: list[list[Detection]] = [[] for _ in records]
        if self.detector is not None and records:
            with self._turn:
                found = self.detector.detect(images, [picture.name for picture in pictures])
        regions = [
            self.rules.regions(image.width, image.height, boxes)
            for image, boxes in zip(images, found, strict=True)
        ]
        crops = [
            crop
            for image, some in zip(images, regions, strict=True)
            for crop in self._crops(image, some)
        ]
        with self._turn:
            v = self._pictures(crops)
            t = self._texts([sentence for some in words for sentence in some])
        if v is None or t is None:  # a detector that found nothing at all
            return [
                Matched(replace(record, pairs=()), [], some)
                for record, some in zip(records, words, strict=True)
            ]
        image_features = v.split([len(some) for some in regions])
        text_features = t.split([len(record.sentences) for record in records])
        return [
            Matched(replace(record, pairs=_pairs(some, of_image, of_text)), some, of_record)
            for record, some, of_record, of_image, of_text in zip(
                records, regions, words, image_features, text_features, strict=True
            )
        ]

    def _crops(self, image: Image.Image, regions: Sequence[Region]) -> list[Tensor]:
        pixels = np.array(image)  # once for all of its regions
        return [
            image_tensor(crop_pixels(pixels, region.box), self.image_size, *self.normalisation)
            for region in regions
        ]

    def _texts(self, sentences: Sequence[Sequence[int]]) -> Tensor | None:
        """Features of sentences, each encoded once, short ones with short ones."""
        once = sorted({tuple(words) for words in sentences}, key=lambda words: (len(words), words))
        if not once:
            return None
        context = self.tokenizer.context_length or DEFAULT_CONTEXT_LENGTH
        rows = torch.stack([pack_row(words, self.tokenizer, context) for words in once])
        parts = []
        for batch in rows.split(self.batch_size):
            if isinstance(self.model, FastGoalModel):  # others may want all of their context
                batch = batch[:, : int(batch[-1].argmax()) + 1]
            parts.append(self._features(self.model.encode_text, batch))
        place = {words: number for number, words in enumerate(once)}
        return torch.cat(parts)[torch.tensor([place[tuple(words)] for words in sentences])]

    def _pictures(self, crops: list[Tensor]) -> Tensor | None:
        if not crops:
            return None
        batches = (
            torch.stack(crops[start : start + self.batch_size])
            for start in range(0, len(crops), self.batch_size)
        )
        return torch.cat([self._features(self.model.encode_image, batch) for batch in batches])

    def _features(self, encode: Any, batch: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return F.normalize(encode(batch.to(self.device)).float(), dim=-1).cpu()


def _own(model: Encoder, name: str) -> Any:
    if not hasattr(model, name):
        raise TypeError(f"{type(model).__name__} has no {name}. Fix: give match_pairs {name}=...")
    return getattr(model, name)


def _pairs(regions: Sequence[Region], of_image: Tensor, of_text: Tensor) -> tuple[LocalPair, ...]:
    """Each sentence with its most similar region, best first."""
    if not regions:
        return ()
    scores, chosen = (of_text @ of_image.T).max(dim=1)
    pairs = [
        LocalPair(sentence, regions[region].box, regions[region].name, score)
        for sentence, (score, region) in enumerate(
            zip(scores.tolist(), chosen.tolist(), strict=True)
        )
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair.score))  # the earlier sentence of equal ones

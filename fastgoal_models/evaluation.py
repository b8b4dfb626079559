"""What a model makes of a set of captioned images, in numbers that can be compared with papers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import Tensor

from .caft.model import Caft
from .caft.scoring import SCORES as CAFT_SCORES
from .caft.scoring import caft_ranks, encode
from .encoding import (
    Pictures,
    Progress,
    batches_of_pictures,
    blocks_of_patches,
    caft_rows,
    caption_rows,
    encode_captions,
    encode_pictures,
    pixels_for,
)
from .errors import ConfigError
from .fast_goal import FastGoalModel
from .glit import GlitRecord
from .maxsim_blocks import best_of_kept, topk_of_blocks
from .pictures import crop_region, load_image
from .retrieval import Intervals, Ranks, Retrieval, candidates_needed, feature_ranks, ranks_of_best
from .sets import CaptionedImage, CaptionSet

CLIP_SCORES = ("global", "maxsim")
_SPARE = 64  # captions whose picture may turn out not to be readable at no cost


class Found(NamedTuple):
    """The best images of each caption, by place in the set."""

    captions: list[str]
    owners: list[int]
    """the image that each caption belongs to"""
    ranks: list[int]
    """of that image, from 1"""
    images: list[list[int]]
    """best first"""
    scores: list[list[float]]


@dataclass(frozen=True)
class Evaluated:
    """Retrieval on one set by one score."""

    score: str
    retrieval: Retrieval
    intervals: Intervals
    truncated: int
    """captions that ran past the context and lost their end, or that of a part of theirs"""
    unread: dict[str, str]
    """images that could not be read, by id, and why; their captions count nowhere"""
    found: Found | None = field(default=None, compare=False, repr=False)
    """what each caption found, where that was asked for"""

    def recalls(self, direction: str) -> dict[int, float]:
        """Recall@K of "text_to_image" or "image_to_text", by K.

        Without the K that take every candidate: that recalls all, whatever the model.
        """
        found = self.retrieval
        candidates = found.num_images if direction == "text_to_image" else found.num_texts
        return {k: recall for k, recall in getattr(found, direction).items() if k < candidates}

    def as_json(self) -> dict[str, Any]:
        """Plain values; recalls and their 95 % intervals as shares, for the K of `recalls`."""
        return {
            "score": self.score,
            "images": self.retrieval.num_images,
            "texts": self.retrieval.num_texts,
            "truncated": self.truncated,
            "unread": self.unread,
            "text_to_image": self._direction("text_to_image"),
            "image_to_text": self._direction("image_to_text"),
        }

    def _direction(self, name: str) -> dict[str, Any]:
        intervals = getattr(self.intervals, name)
        return {
            str(k): {"recall": recall, "interval": list(intervals[k])}
            for k, recall in self.recalls(name).items()
        }


def caption_set(records: Sequence[GlitRecord], name: str) -> CaptionSet:
    """Records as a set in which each picture has all captions that its row lists, or its one."""
    return CaptionSet(
        name, [CaptionedImage(r.id, r.image, r.captions or (r.caption,)) for r in records]
    )


def scores_of(model: FastGoalModel | Caft) -> tuple[str, ...]:
    """The scores that a model can be judged by; the first is the default."""
    return CAFT_SCORES if isinstance(model, Caft) else CLIP_SCORES


def evaluate_set(
    model: FastGoalModel | Caft,
    captioned: CaptionSet,
    *,
    score: str | None = None,
    ks: Sequence[int] | None = None,
    resize: str = "own",
    published: bool = False,
    batch_size: int = 64,
    show: int = 0,
    progress: Progress | None = None,
) -> Evaluated:
    """Recall@K both ways, with any number of captions an image and without a full score matrix.

    Args:
        model: put into evaluation mode meanwhile, and back afterwards.
        captioned: the images and their captions.
        score: of a CLIP "global" (the cosine of whole features) or "maxsim" (of every word with
            every patch); of a CAFT "whole", "blended" or "reranked".
        ks: default: those that papers report for the set.
        resize: "own", as published figures are made, or "squash" (`encoding.pixels_for`).
        published: cut captions for a CAFT as the published code does.
        batch_size: images, and captions, encoded at once.
        show: of a CLIP also keep this many best images of every caption, in `found`.
        progress: is called with how many more images or captions are done.

    Raises:
        ConfigError: an empty set, a score that the model has not.
    """
    score = score or scores_of(model)[0]
    if score not in scores_of(model):
        raise ConfigError(f"score must be one of {scores_of(model)}; got {score!r}")
    if not captioned.images:
        raise ConfigError(f"{captioned.name} has no images: there is nothing to evaluate")
    ks = captioned.ks if ks is None else tuple(ks)
    paths = [item.image for item in captioned.images]
    was_training, shown = model.training, None
    model.eval()
    try:
        if isinstance(model, Caft):
            ranks, truncated, found = _caft(
                model, captioned, paths, score, ks, resize, published, batch_size, progress
            )
        else:
            options = {"resize": resize, "batch_size": batch_size, "progress": progress}
            judge = _maxsim if score == "maxsim" else _global
            ranks, truncated, found, shown = judge(model, captioned, paths, ks, show, options)
    finally:
        model.train(was_training)
    unread = {captioned.images[place].id: why for place, why in found.lost.items()}
    return Evaluated(score, ranks.recall(ks), ranks.intervals(ks), truncated, unread, shown)


def _global(
    model: FastGoalModel,
    captioned: CaptionSet,
    paths: list[Path],
    ks: tuple[int, ...],
    show: int,
    options: dict[str, Any],
) -> tuple[Ranks, int, Pictures, Found | None]:
    images, found = encode_pictures(model, paths, **options)
    captions, owner = _captions(captioned, found)
    text_options = {name: options[name] for name in ("batch_size", "progress")}
    texts, truncated = encode_captions(model, captions, **text_options)
    ranks = feature_ranks(images, texts, text_image=owner)
    shown = _shown(ranks, _best_images(images, texts, show), captions, found)
    return ranks, truncated, found, shown


def _maxsim(
    model: FastGoalModel,
    captioned: CaptionSet,
    paths: list[Path],
    ks: tuple[int, ...],
    show: int,
    options: dict[str, Any],
) -> tuple[Ranks, int, Pictures, Found | None]:
    """Words are there all at once, patches a block at a time: they meet all words when made.

    Only at the end is it known which pictures could not be read. Their captions count nowhere, and
    so each image finds some captions more than are needed.
    """
    every, places = _captions(captioned, None)
    text_options = {name: options[name] for name in ("batch_size", "progress")}
    words, offsets, truncated = word_tokens(model, every, **text_options)
    needed, spare = max(candidates_needed(ks, places), show), _SPARE
    while True:
        found = Pictures()
        blocks = blocks_of_patches(model, paths, found, **options)
        by_image, by_text = topk_of_blocks(blocks, words, offsets, needed + spare)
        chosen = torch.isin(places, torch.tensor(found.kept))
        lost = int((~chosen).sum())
        if lost <= spare:
            break
        spare, options = lost, options | {"progress": None}  # all over again, counted once
    captions, owner = _captions(captioned, found)
    needed = max(candidates_needed(ks, owner), show)
    scores, images = (x[chosen.to(x.device), :needed] for x in by_text)
    ranks = ranks_of_best((best_of_kept(by_image, chosen, needed), (scores, images)), owner)
    shown = _shown(ranks, (scores[:, :show], images[:, :show]), captions, found)
    return ranks, int(truncated[chosen].sum()), found, shown


def _best_images(images: Tensor, texts: Tensor, count: int) -> tuple[Tensor, ...]:
    """(scores, places) of the `count` best images of each text."""
    count = min(count, len(images))
    blocks = [(block @ images.T).topk(count, dim=1) for block in texts.split(1024)]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _shown(
    ranks: Ranks, best: tuple[Tensor, ...], captions: list[str], found: Pictures
) -> Found | None:
    scores, images = best
    if scores.shape[1] == 0:
        return None
    kept = torch.tensor(found.kept)
    return Found(
        captions,
        kept[ranks.text_image.cpu()].tolist(),
        ranks.texts.tolist(),
        kept[images.cpu()].tolist(),
        scores.tolist(),
    )


def _caft(
    model: Caft,
    captioned: CaptionSet,
    paths: list[Path],
    score: str,
    ks: tuple[int, ...],
    resize: str,
    published: bool,
    batch_size: int,
    progress: Progress | None,
) -> tuple[Ranks, int, Pictures]:
    found = Pictures()

    def counted(batches: Iterable[Tensor]) -> Iterable[Tensor]:
        for batch in batches:
            yield batch
            if progress is not None:
                progress(len(batch))

    transform = pixels_for(PreprocessCfg(model.config.image_size), resize)
    pictures = batches_of_pictures(paths, transform, batch_size, found, progress)
    every, places = _captions(captioned, None)
    rows, truncated = caft_rows(model, every, published)
    features = encode(model, pictures, counted(rows.split(batch_size)))
    chosen = torch.isin(places, torch.tensor(found.kept))  # not those of pictures that were lost
    features = features._replace(
        part_features=features.part_features[chosen],
        whole_text_features=features.whole_text_features[chosen],
    )
    _, owner = _owners(captioned, found)
    ranks = caft_ranks(model, features, ks, score=score, text_image=owner)
    return ranks, int(truncated[chosen].sum()), found


def _captions(captioned: CaptionSet, found: Pictures | None) -> tuple[list[str], Tensor]:
    """The captions of the pictures that were read, and the place of each one's picture."""
    kept, owner = _owners(captioned, found)
    return [c for place in kept for c in captioned.images[place].captions], owner


def _owners(captioned: CaptionSet, found: Pictures | None) -> tuple[list[int], Tensor]:
    kept = list(range(len(captioned.images))) if found is None else found.kept
    counts = torch.tensor([len(captioned.images[place].captions) for place in kept])
    return kept, torch.arange(len(kept)).repeat_interleave(counts)


@torch.no_grad()
def word_tokens(
    model: FastGoalModel,
    captions: Sequence[str],
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected, L2-normalised word tokens of captions, packed (total, E), and offsets (M + 1,).

    The tokens between the start and the end token. The third, (M,) bool, is whether a caption ran
    past the context.
    """
    device = next(model.parameters()).device
    rows, lengths, truncated = caption_rows(model, captions)
    lengths = lengths - 2  # without start and end
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    words = torch.empty(0)
    for start in range(0, len(rows), batch_size):
        some = lengths[start : start + batch_size]
        batch = rows[start : start + batch_size, : int(some.max()) + 2].to(device)
        _, tokens = model.text_tokens(batch)
        tokens = F.normalize(model.project_words(tokens), dim=-1).float().cpu()
        inside = (torch.arange(tokens.shape[1]) >= 1) & (
            torch.arange(tokens.shape[1]) <= some[:, None]
        )
        if start == 0:  # room for all, once: joined from parts they would be there twice
            words = tokens.new_empty(int(offsets[-1]), tokens.shape[-1])
        words[int(offsets[start]) : int(offsets[start + len(some)])] = tokens[inside]
        if progress is not None:
            progress(len(batch))
    return words, offsets, truncated


# -- the joint set of pictures and their parts ----------------------------------------------------


class JointPrecision(NamedTuple):
    """Mean average precision at `at`, both ways, in [0, 1]."""

    text_to_image: float
    image_to_text: float
    at: int
    records: int


def average_precision_at(scores: Tensor, right: Tensor, at: int) -> Tensor:
    """(queries,) AP@`at`: the precision at each right answer within the first `at`, over all right.

    scores, right: (queries, candidates). Ties and NaN count against the model, as of ranks: the
    wrong ones stand first.
    """
    last = torch.where(right, -torch.inf, torch.inf)  # a NaN is the worst that it can be
    clean = torch.where(scores.isnan(), last.to(scores.dtype), scores)
    wrong_first = right.to(torch.int8).argsort(dim=1, stable=True)  # then a stable sort by score
    order = clean.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)
    hits = right.gather(1, wrong_first).gather(1, order)[:, :at].double()
    precision = hits.cumsum(dim=1) / torch.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(dim=1) / right.sum(dim=1).clamp_min(1)


@torch.no_grad()
def joint_precision(
    model: FastGoalModel,
    records: Sequence[GlitRecord],
    at: int = 10,
    batch_size: int = 64,
    resize: str = "own",
) -> JointPrecision:
    """GOAL's mAP@10: pictures and their regions together against captions and sentences together.

    For a caption its picture and the picture's region are right, and so for its sentence; and back.
    Records without a pair are left out. Pictures and regions are resized as in `evaluate_set`.

    Raises ConfigError where no record has a pair, GlitError for a picture that can not be read.
    """
    with_pairs = [record for record in records if record.pairs]
    if not with_pairs:
        raise ConfigError("no record has a local pair. Fix: fastgoal prepare")
    device, transform = next(model.parameters()).device, pixels_for(model.preprocess, resize)
    wholes, regions = [], []
    for start in range(0, len(with_pairs), batch_size):
        images = [(load_image(r.image), r.pairs[0].box) for r in with_pairs[start:][:batch_size]]
        for into, pictures in (
            (wholes, [transform(image) for image, _ in images]),
            (regions, [transform(crop_region(*cut)) for cut in images]),
        ):
            into.append(model.encode_image(torch.stack(pictures).to(device)).float().cpu())
    v = torch.cat([*wholes, *regions])
    texts = [record.caption for record in with_pairs]
    texts += [record.sentences[record.pairs[0].sentence] for record in with_pairs]
    t, _ = encode_captions(model, texts, batch_size=batch_size)
    owner = torch.arange(len(with_pairs)).repeat(2)

    def precision(queries: Tensor, answers: Tensor) -> float:
        """By blocks of queries: of all scores at once a hundred thousand records need 160 GB."""
        blocks = [
            average_precision_at(queries[some] @ answers.T, owner[some, None] == owner, at)
            for some in torch.arange(len(queries)).split(256)
        ]
        return float(torch.cat(blocks).mean())

    return JointPrecision(precision(t, v), precision(v, t), at, len(with_pairs))

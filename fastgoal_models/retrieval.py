"""Text-image retrieval: Recall@K both ways, with any number of captions an image.

The rank of a query is the rank of its *first* right answer, and ties are counted against the
model: every wrong answer that scores the same as the best right one stands before it, and so does
every NaN. A model that gives all pairs one score thus recalls nothing, instead of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_kernels import maxsim_topk

LONG_TEXT_KS = (1, 5, 25, 50)
SHORT_TEXT_KS = (1, 5, 10, 15)

_BOOTSTRAP_BLOCK = 1 << 20  # draws held at once, of 16 bytes each


class Retrieval(NamedTuple):
    """Recall@K in [0, 1] per K, and the number of queries behind it, for both directions."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    num_texts: int
    num_images: int


Interval = tuple[float, float]


class Intervals(NamedTuple):
    """Where each Recall@K lies with the asked-for confidence."""

    text_to_image: dict[int, Interval]
    image_to_text: dict[int, Interval]


class Ranks(NamedTuple):
    """The rank, from 1, of each query's first right answer."""

    texts: Tensor
    """(num_texts,) int64: of each text's image among all images"""
    images: Tensor
    """(Q,) int64: of the first of each image's own texts among all texts"""
    text_image: Tensor
    """(num_texts,) int64: the image that each text belongs to"""
    asked: Tensor
    """(Q,) int64: the images that own a text, ascending; the others are distractors"""

    def recall(self, ks: Sequence[int] = LONG_TEXT_KS) -> Retrieval:
        """Recall@K of both directions, 0 where there is no query."""

        def shares(ranks: Tensor) -> dict[int, float]:
            return {k: float((ranks <= k).double().mean()) if len(ranks) else 0.0 for k in ks}

        return Retrieval(shares(self.texts), shares(self.images), len(self.texts), len(self.images))

    def intervals(
        self,
        ks: Sequence[int] = LONG_TEXT_KS,
        *,
        confidence: float = 0.95,
        samples: int = 1000,
        seed: int = 0,
    ) -> Intervals:
        """Percentile intervals by bootstrap over images, each of which brings its texts along.

        So the five captions of one photograph are not taken for five independent draws.
        """
        count = len(self.asked)
        if count == 0 or not ks:
            return Intervals(dict.fromkeys(ks, (0.0, 0.0)), dict.fromkeys(ks, (0.0, 0.0)))
        place = torch.searchsorted(self.asked.cpu(), self.text_image.cpu())
        # (count, 2 + 2·K): of each image its texts, itself, and the hits of both at each K.
        hits = [torch.ones_like(place), *(self.texts.cpu() <= k for k in ks)]
        of_texts = torch.zeros(count, len(hits), dtype=torch.float64)
        of_texts.index_add_(0, place, torch.stack(hits, dim=1).double())
        hits = [torch.ones(count), *(self.images.cpu() <= k for k in ks)]
        of_images = torch.stack(hits, dim=1).double()
        columns = torch.cat([of_texts, of_images], dim=1)
        generator = torch.Generator().manual_seed(seed)
        sums = []
        rows = max(_BOOTSTRAP_BLOCK // count, 1)
        for start in range(0, samples, rows):  # all at once, every image would take 24 KB
            some = min(rows, samples - start)
            drawn = torch.randint(count, (some, count), generator=generator)
            times = torch.zeros(some, count, dtype=torch.float64)
            times.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(times))
            sums.append(times @ columns)
        texts, images = torch.cat(sums).chunk(2, dim=1)
        tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)

        def ends(sums: Tensor) -> dict[int, Interval]:
            low, high = (sums[:, 1:] / sums[:, :1]).quantile(tails, dim=0).tolist()
            return dict(zip(ks, zip(low, high, strict=True), strict=True))

        return Intervals(ends(texts), ends(images))


def first_right_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Rank, from 1, of each query's best right answer; ties and NaN count against it.

    Args:
        scores: (queries, candidates) floating point.
        right: (queries, candidates) bool, at least one True in every row.

    Returns:
        (queries,) int64: 1 + the number of wrong candidates that do not score below the best right
        one. A query all of whose right answers are NaN ranks behind every wrong answer.

    Raises:
        ValueError: the shapes differ, or a query has no right answer.
    """
    if scores.shape != right.shape or scores.ndim != 2:
        raise ValueError(
            "scores and right must both have shape (queries, candidates); got "
            f"{tuple(scores.shape)} and {tuple(right.shape)}"
        )
    if not bool(right.any(dim=1).all()):
        lost = (~right.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"every query needs a right answer; queries {lost[:5]} have none")
    return _ranks(scores, right)


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """`first_right_ranks`, where a query without a right answer ranks behind every candidate."""
    if scores.shape[1] == 0:  # without candidates amax is an error, also for no queries
        return scores.new_ones(len(scores), dtype=torch.int64)
    usable = right & ~scores.isnan()
    best = scores.masked_fill(~usable, -torch.inf).amax(dim=1, keepdim=True)
    behind = (scores < best) & usable.any(dim=1, keepdim=True)
    return 1 + (~behind & ~right).sum(dim=1)


def recall_at_k(
    scores: Tensor,
    ks: Sequence[int] = LONG_TEXT_KS,
    *,
    text_image: Tensor | None = None,
) -> Retrieval:
    """Recall@K of both directions from one score matrix.

    Args:
        scores: (num_images, num_texts).
        ks: the K to report; a K above the number of candidates recalls everything.
        text_image: (num_texts,) int64, the image each text belongs to; default: text j belongs to
            image j. Images that own no text are distractors, not queries.

    Raises:
        ValueError: shapes that do not fit, an image index out of range.
    """
    num_images, num_texts = scores.shape
    owner = owner_of_texts(text_image, num_images, num_texts).to(scores.device)
    images = torch.arange(num_images, device=scores.device)
    right = images[:, None] == owner
    asked = owner.unique()
    return Ranks(
        first_right_ranks(scores.T, right.T),
        first_right_ranks(scores[asked], right[asked]),
        owner,
        asked,
    ).recall(ks)


def feature_recall(
    image_features: Tensor,
    text_features: Tensor,
    ks: Sequence[int] = LONG_TEXT_KS,
    *,
    text_image: Tensor | None = None,
    chunk: int = 1024,
) -> Retrieval:
    """`recall_at_k` of the cosines of (num_images, D) and (num_texts, D) features."""
    return feature_ranks(image_features, text_features, text_image=text_image, chunk=chunk).recall(
        ks
    )


def feature_ranks(
    image_features: Tensor,
    text_features: Tensor,
    *,
    text_image: Tensor | None = None,
    chunk: int = 1024,
) -> Ranks:
    """The ranks by the cosines of (num_images, D) and (num_texts, D) features.

    Never holds more than `chunk` rows of the score matrix: 25,000 captions against 5,000 images
    would be half a gigabyte of it. The same texts and images rank the same for every `chunk` up
    to rounding in the last bit of a score.
    """
    if image_features.ndim != 2 or image_features.shape[1:] != text_features.shape[1:]:
        raise ValueError(
            "image_features (num_images, D) and text_features (num_texts, D) must agree in D; got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    images = F.normalize(image_features.float(), dim=1)
    texts = F.normalize(text_features.float(), dim=1)
    owner = owner_of_texts(text_image, len(images), len(texts)).to(images.device)
    owned = owner.unique()

    def ranks(queries: Tensor, answers: Tensor, query_id: Tensor, answer_id: Tensor) -> Tensor:
        blocks = [
            first_right_ranks(
                queries[start : start + chunk] @ answers.T,
                query_id[start : start + chunk, None] == answer_id,
            )
            for start in range(0, len(queries), chunk)
        ]
        return torch.cat(blocks) if blocks else owner.new_zeros(0)

    every_image = torch.arange(len(images), device=images.device)
    return Ranks(
        ranks(texts, images, owner, every_image),
        ranks(images[owned], texts, owned, owner),
        owner,
        owned,
    )


def maxsim_recall(
    image_tokens: Tensor,
    text_tokens: Tensor,
    ks: Sequence[int] = LONG_TEXT_KS,
    *,
    text_image: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    **options: Any,
) -> Retrieval:
    """`recall_at_k` of the MaxSim scores of every word with every patch, without their matrix.

    Exact, ties and NaN included, up to rounding in the last bit of a score, because the K + n best
    candidates of a query with n right answers decide: if K or more wrong ones stand before the best
    right one, at least K of those are among them.

    Args:
        image_tokens, text_tokens, image_offsets, text_offsets: as of `maxsim_topk`: padded, masked
            or ragged tokens, which may stay on the CPU while a GPU scores.
        ks: the K to report; a K above the number of candidates recalls everything.
        text_image: (num_texts,) int64, the image each text belongs to; default: text j belongs to
            image j. Images that own no text are distractors, not queries.
        options: of `maxsim_topk`: masks, direction, reduction, normalize, device, backend.
            Both ways are ranked by the scores of the one direction.

    Raises:
        ValueError: a `text_image` that does not fit, and all that `maxsim_topk` refuses.
        TypeError, BackendError: as `maxsim_topk`.
    """
    owner = owner_of_texts(
        text_image,
        len(image_tokens if image_offsets is None else image_offsets[1:]),
        len(text_tokens if text_offsets is None else text_offsets[1:]),
    )
    best = maxsim_topk(
        image_tokens, text_tokens, candidates_needed(ks, owner),
        image_offsets=image_offsets, text_offsets=text_offsets, **options,
    )  # fmt: skip
    return ranks_of_best(best, owner).recall(ks)


def candidates_needed(ks: Sequence[int], text_image: Tensor) -> int:
    """How many of each query's best candidates decide Recall@K for all `ks`."""
    return max(ks, default=0) + (int(text_image.bincount().max()) if len(text_image) else 1)


def ranks_of_best(
    best: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], text_image: Tensor
) -> Ranks:
    """The ranks from the `candidates_needed` best of each query, as a streaming top-k has them.

    Up to the largest K that was asked of `candidates_needed` they are exact; a query whose right
    answer is not among its candidates ranks behind all of them.

    Args:
        best: ((scores, texts) of each image, (scores, images) of each text).
        text_image: (num_texts,) int64, the image each text belongs to.
    """
    (image_scores, texts), (text_scores, images) = best
    owner = text_image.to(texts.device)
    asked = owner.unique()
    return Ranks(
        _ranks(text_scores, images == owner[:, None]),
        _ranks(image_scores[asked], owner[texts[asked]] == asked[:, None]),
        owner,
        asked,
    )


def owner_of_texts(text_image: Tensor | None, num_images: int, num_texts: int) -> Tensor:
    """The image of each text, checked; by default text j belongs to image j."""
    if text_image is None:
        if num_images != num_texts:
            raise ValueError(
                f"{num_images} images, {num_texts} texts: pass text_image, the image of each text"
            )
        return torch.arange(num_texts)
    if text_image.shape != (num_texts,) or text_image.is_floating_point():
        raise ValueError(
            f"text_image must be ({num_texts},) integers; got {tuple(text_image.shape)} "
            f"of {text_image.dtype}"
        )
    if num_texts and not 0 <= int(text_image.min()) <= int(text_image.max()) < num_images:
        raise ValueError(
            f"text_image must lie in [0, {num_images}); got {int(text_image.min())} to "
            f"{int(text_image.max())}"
        )
    return text_image.long()

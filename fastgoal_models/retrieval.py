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
from open_clip import image_transform
from torch import Tensor

from fastgoal_kernels import maxsim_topk

from .fast_goal import FastGoalModel
from .glit import GlitRecord, image_tensor, load_image

LONG_TEXT_KS = (1, 5, 25, 50)
SHORT_TEXT_KS = (1, 5, 10, 15)


class Retrieval(NamedTuple):
    """Recall@K in [0, 1] per K, and the number of queries behind it, for both directions."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    num_texts: int
    num_images: int


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
    asked = right.any(dim=1)
    return _retrieval(
        first_right_ranks(scores.T, right.T), first_right_ranks(scores[asked], right[asked]), ks
    )


def feature_recall(
    image_features: Tensor,
    text_features: Tensor,
    ks: Sequence[int] = LONG_TEXT_KS,
    *,
    text_image: Tensor | None = None,
    chunk: int = 1024,
) -> Retrieval:
    """`recall_at_k` of the cosines of (num_images, D) and (num_texts, D) features.

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
    return _retrieval(
        ranks(texts, images, owner, every_image), ranks(images[owned], texts, owned, owner), ks
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
    return recall_of_best(best, ks, owner)


def candidates_needed(ks: Sequence[int], text_image: Tensor) -> int:
    """How many of each query's best candidates decide Recall@K for all `ks`."""
    return max(ks, default=0) + (int(text_image.bincount().max()) if len(text_image) else 1)


def recall_of_best(
    best: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    ks: Sequence[int],
    text_image: Tensor,
) -> Retrieval:
    """`recall_at_k` from the `candidates_needed` best of each query, as a streaming top-k has them.

    Args:
        best: ((scores, texts) of each image, (scores, images) of each text).
        ks: the K to report.
        text_image: (num_texts,) int64, the image each text belongs to.
    """
    (image_scores, texts), (text_scores, images) = best
    owner = text_image.to(texts.device)
    asked = owner.unique()
    return _retrieval(
        _ranks(text_scores, images == owner[:, None]),
        _ranks(image_scores[asked], owner[texts[asked]] == asked[:, None]),
        ks,
    )


@torch.no_grad()
def evaluate(
    model: FastGoalModel,
    records: Sequence[GlitRecord],
    *,
    ks: Sequence[int] = LONG_TEXT_KS,
    resize: str = "crop",
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> Retrieval:
    """Long-text retrieval: each record's whole caption against every picture, and back.

    Args:
        model: put into evaluation mode meanwhile, and back afterwards.
        records: one caption a picture; captions past the context lose their end.
        ks: the K to report.
        resize: "crop" scales the shorter side and cuts out the centre, as CLIP's own evaluation
            does and published figures are made; "squash" is what FAST-GOAL trains on.
        batch_size: pictures, and captions, encoded at once.
        device: default: where the model is.

    Raises:
        ValueError: an unknown `resize`, or no records.
        GlitError: a picture that can not be read.
    """
    if resize not in ("crop", "squash"):
        raise ValueError(f"resize must be 'crop' or 'squash'; got {resize!r}")
    if not records:
        raise ValueError("records is empty: there is nothing to evaluate")
    size = model.image_size
    crop = image_transform(size, is_train=False, resize_mode="shortest", interpolation="bicubic")
    device = next(model.parameters()).device if device is None else torch.device(device)
    was_training = model.training
    model.eval()
    image_features, text_features = [], []
    for start in range(0, len(records), batch_size):
        chunk = records[start : start + batch_size]
        pictures = [load_image(record.image) for record in chunk]
        pixels = [crop(p) if resize == "crop" else image_tensor(p, size) for p in pictures]
        texts = model.tokenizer([record.caption for record in chunk])
        texts = texts[:, : int(texts.argmax(dim=1).max()) + 1]  # padding is never read
        image_features.append(model.encode_image(torch.stack(pixels).to(device)))
        text_features.append(model.encode_text(texts.to(device)))
    model.train(was_training)
    return feature_recall(torch.cat(image_features), torch.cat(text_features), ks)


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


def _retrieval(text_ranks: Tensor, image_ranks: Tensor, ks: Sequence[int]) -> Retrieval:
    def recall(ranks: Tensor) -> dict[int, float]:
        return {k: float((ranks <= k).double().mean()) if len(ranks) else 0.0 for k in ks}

    return Retrieval(recall(text_ranks), recall(image_ranks), len(text_ranks), len(image_ranks))

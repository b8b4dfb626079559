"""Long-text retrieval with CAFT: by the whole, by the blend of whole and parts, or re-ranked.

The blend is the published evaluation's score (arXiv 2602.02977): 0.7 whole logit + 0.3 mean logit
of the caption's four parts. Re-ranking computes the parts only for each image's sixteen best
captions by whole logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgoal_kernels import hierarchical_topk

from ..errors import ConfigError
from ..retrieval import (
    LONG_TEXT_KS,
    Ranks,
    Retrieval,
    candidates_needed,
    feature_ranks,
    owner_of_texts,
    ranks_of_best,
)
from .model import Caft

SCORES = ("whole", "blended", "reranked")

ALPHA = 0.3
"""Weight of the parts in the published evaluation."""
SHORTLIST = 16
"""Captions of each image that the published evaluation re-ranks."""


class CaftFeatures(NamedTuple):
    """What a data set's images and captions are scored by; on any device, the CPU by default."""

    fine_tokens: Tensor
    """(num_images, tokens, E)"""
    whole_image_features: Tensor
    """(num_images, E)"""
    part_features: Tensor
    """(num_texts, parts, E)"""
    whole_text_features: Tensor
    """(num_texts, E)"""


@torch.no_grad()
def encode(
    model: Caft,
    images: Iterable[Tensor],
    texts: Iterable[Tensor],
    *,
    device: torch.device | str | None = None,
    keep_on: torch.device | str = "cpu",
) -> CaftFeatures:
    """Encode batches of images and of captions, each side on its own.

    Args:
        model: put into evaluation mode meanwhile, and back afterwards.
        images: batches (N, 3, H, W), CLIP-normalised.
        texts: batches (M, parts or more, L) int64: the parts of each caption, in order; captions
            beyond `model.config.text.parts` are not looked at.
        device: where to encode; default: where the model is.
        keep_on: where the features are kept. Fine tokens are the bulk: 128 KB an image in float32.

    Raises:
        ConfigError: no images, or no texts.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    was_training = model.training
    model.eval()
    try:
        fine, coarse, parts, wholes = [], [], [], []
        for batch in images:  # each moved at once: fine tokens of many fill a GPU
            seen = model.encode_image(batch.to(device))
            fine.append(seen.fine_tokens.to(keep_on))
            coarse.append(seen.whole_features.to(keep_on))
            del seen
        for batch in texts:
            encoded = model.encode_text(batch[:, : model.config.text.parts].to(device))
            parts.append(encoded.part_features.to(keep_on))
            wholes.append(encoded.whole_features.to(keep_on))
    finally:
        model.train(was_training)
    if not fine or not parts:
        raise ConfigError("there are no images or no captions to encode")
    return CaftFeatures(
        torch.cat(fine),
        torch.cat(coarse),
        torch.cat(parts),
        torch.cat(wholes),
    )


def caft_recall(
    model: Caft,
    features: CaftFeatures,
    ks: Sequence[int] = LONG_TEXT_KS,
    *,
    score: str = "blended",
    alpha: float = ALPHA,
    shortlist: int = SHORTLIST,
    text_image: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Retrieval:
    """Recall@K both ways: `caft_ranks(...).recall(ks)`."""
    return caft_ranks(
        model, features, ks, score=score, alpha=alpha, shortlist=shortlist,
        text_image=text_image, device=device,
    ).recall(ks)  # fmt: skip


@torch.no_grad()
def caft_ranks(
    model: Caft,
    features: CaftFeatures,
    ks: Sequence[int] = LONG_TEXT_KS,
    *,
    score: str = "blended",
    alpha: float = ALPHA,
    shortlist: int = SHORTLIST,
    text_image: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Ranks:
    """The rank of each query's first right answer, both ways, without the score matrix.

    Args:
        model: gives the pool, the scales and the biases.
        features: of `encode`, by the same model.
        ks: the K that will be asked for: ranks beyond the largest are not told apart.
        score: "whole"; "blended": (1 - alpha) whole + alpha parts for every pair; "reranked": the
            same for each image's `shortlist` best captions by whole logit, all others rank last,
            in both directions.
        alpha: weight of the parts.
        shortlist: captions an image that "reranked" looks at.
        text_image: (num_texts,) int64, the image each text belongs to; default: text j belongs to
            image j.
        device: where to score; default: where the model is.

    Raises:
        ValueError: an unknown score, features that do not fit together, and all that
            `fastgoal_kernels.hierarchical_topk` refuses.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}; got {score!r}")
    device = model.logit_scale.device if device is None else torch.device(device)
    if score == "whole":
        return feature_ranks(
            features.whole_image_features.to(device),
            features.whole_text_features.to(device),
            text_image=text_image,
        )
    owner = owner_of_texts(
        text_image, len(features.whole_image_features), len(features.whole_text_features)
    )
    best = hierarchical_topk(
        model.visual_proj,
        features.fine_tokens,
        features.part_features,
        features.whole_image_features,
        features.whole_text_features,
        model.logit_scale.exp(),
        model.logit_bias,
        model.logit_scale_coarse.exp(),
        model.logit_bias_coarse,
        candidates_needed(ks, owner),
        alpha=alpha,
        shortlist=shortlist if score == "reranked" else None,
        device=device,
    )
    return ranks_of_best(best, owner)

"""What people write without this library: MaxSim and its loss in plain PyTorch.

All of them hold the (images, texts, text tokens, image tokens) tensor in the dtype of the tokens.
Tokens are (batch, tokens, dim); scores are (num_images, num_texts), means over the valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = dict[str, Tensor]  # by direction: "text_to_image", "image_to_text"


def _amax(similarity: Tensor, dim: int) -> Tensor:
    return similarity.amax(dim)  # its backward shares a gradient among equal maxima


def _max(similarity: Tensor, dim: int) -> Tensor:
    return similarity.max(dim).values


def _scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    directions: tuple[str, ...],
    text_mask: Tensor | None,
    largest: Callable[[Tensor, int], Tensor],
) -> Scores:
    similarity = torch.einsum("ird,jqd->ijqr", image_tokens, text_tokens)
    scores = {}
    if "text_to_image" in directions:
        best = largest(similarity, 3).float()
        if text_mask is None:
            scores["text_to_image"] = best.mean(2)
        else:
            scores["text_to_image"] = best.mul(text_mask).sum(2) / text_mask.sum(1)
    if "image_to_text" in directions:
        if text_mask is not None:
            similarity = similarity.masked_fill(~text_mask[None, :, :, None], -torch.inf)
        scores["image_to_text"] = largest(similarity, 2).float().mean(2)
    return scores


def scores_amax(
    image_tokens: Tensor,
    text_tokens: Tensor,
    directions: tuple[str, ...],
    text_mask: Tensor | None = None,
) -> Scores:
    """Eager MaxSim with `amax`: the usual way, and the cheaper forward."""
    return _scores(image_tokens, text_tokens, directions, text_mask, _amax)


def scores_max(
    image_tokens: Tensor,
    text_tokens: Tensor,
    directions: tuple[str, ...],
    text_mask: Tensor | None = None,
) -> Scores:
    """Eager MaxSim with `max(dim)`: keeps the winners, and has the cheaper backward."""
    return _scores(image_tokens, text_tokens, directions, text_mask, _max)


def filip_loss(scores: Scores, logit_scale: Tensor | float) -> Tensor:
    """Half of [cross-entropy of the rows + of the columns], targets on the diagonal.

    With both directions the rows are scored image_to_text and the columns text_to_image; with one,
    that one matrix serves both (FILIP, arXiv 2111.07783, equations 1 and 2).
    """
    given = [scores[way] for way in ("image_to_text", "text_to_image") if way in scores]
    rows, columns = given[0] * logit_scale, given[-1] * logit_scale
    target = torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns.T, target)) / 2


def exact_scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    directions: tuple[str, ...],
    text_mask: Tensor | None = None,
) -> Scores:
    """The yardstick for parity: one image at a time, in float32 whatever the tokens are."""
    rows = [
        _scores(image[None].float(), text_tokens.float(), directions, text_mask, _max)
        for image in image_tokens
    ]
    return {direction: torch.cat([row[direction] for row in rows]) for direction in directions}

"""The best matches by MaxSim of images that come block by block, each of which is seen once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgoal_kernels import maxsim_topk

Best = tuple[Tensor, Tensor]
"""Scores and indices (queries, at most k), best first, of equal scores the lower index first"""


def topk_of_blocks(
    blocks: Iterable[Tensor], words: Tensor, offsets: Tensor, k: int
) -> tuple[Best, Best]:
    """`maxsim_topk` of images whose tokens are never there all at once.

    Args:
        blocks: (N, tokens, E) of N images each, in order and at least one; looked at no more once
            the next one is asked for. Scores are made, and results are, on their device.
        words: (total, E), of every text.
        offsets: (M + 1,): text j is words offsets[j] to offsets[j + 1].
        k: how many of each; what there is not is left out.

    Returns:
        The best texts of each image, and the best images of each text.
    """
    by_image: list[Best] = []
    by_text: Best | None = None
    seen = 0
    for block in blocks:
        texts, (scores, images) = maxsim_topk(
            block, words, k, text_offsets=offsets, device=block.device
        )
        by_image.append(texts)
        new = scores, images + seen
        by_text = new if by_text is None else _merged(by_text, new, k)
        seen += len(block)
    if by_text is None:
        raise ValueError("blocks holds no images: there is nothing to score")
    scores, texts = zip(*by_image, strict=True)
    return (torch.cat(scores), torch.cat(texts)), by_text


def _merged(first: Best, later: Best, k: int) -> Best:
    """The k best of both; a stable sort leaves of equal scores the first ones, which are lower."""
    scores, indices = (torch.cat(pair, dim=1) for pair in zip(first, later, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), indices.gather(1, order[:, :k])


def best_of_kept(best: Best, kept: Tensor, k: int) -> Best:
    """The k best among the kept candidates, which are numbered anew; fewer where fewer are kept.

    Exact where `best` has k, and one more for each candidate that is not kept.

    Args:
        best: the best candidates of each query.
        kept: (candidates,) bool.
    """
    scores, indices = best
    kept = kept.to(indices.device)
    count = min(k, int(kept.sum()))
    order = (~kept[indices]).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    number = kept.cumsum(0) - 1
    return scores.gather(1, order), number[indices.gather(1, order)]

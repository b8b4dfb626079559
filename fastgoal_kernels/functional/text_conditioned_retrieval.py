"""Retrieval by text-conditioned pooling: FLAIR's scores, and CAFT's blend of whole and part.

Blocks of images meet blocks of captions, and of their scores only the best are kept, so that the
corpus may be of any size, and may stay on the CPU or on the disk while a GPU scores it.

Tokens and features are widened, normalised, projected and laid out by heads before they meet: what
the constants below count, so that a block with all of that stays within its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import (
    check_mask,
    check_same_device,
    check_same_dim,
    check_scalar,
    check_tensor,
    shape_of,
)
from ..ops.topk import streaming_topk, streaming_topk_of_rows
from ..reference import l2_normalize, score_dtype
from .precision import of_one_dtype, without_autocast
from .text_conditioned import pool_scores
from .token_blocks import Rows, block_pairs, copied, scoring_device

# Wide copies that are alive at once. Of tokens: keys and values, twice while they are laid out by
# heads, and one on the way. Of features: as given, of unit length, normalised, projected.
_COPIES_OF_TOKENS = 5
_COPIES_OF_FEATURES = 7
# Captions on the lists of the images that are re-ranked together.
_LISTED = 1 << 22

Best = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def text_conditioned_topk(
    pool: nn.Module,
    image_tokens: Tensor,
    text_features: Tensor,
    k: int,
    *,
    image_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Best:
    """The k best captions of each image and the k best images of each caption, streaming.

    By the cosines of `text_conditioned_scores`, whose full matrix is never held. The tokens, the
    features or both may live on the CPU, pinned or memory-mapped too, while a GPU scores: beside
    the results it holds at most 256 MB for each side, most of which are what is made of the tokens
    and features, the scores of at most four million pairs and the backend's own workspace. Not
    differentiable. Under `torch.autocast` tokens and features are taken in its dtype.

    Args:
        pool: a TextConditionedPool, or a published block of the same layout, where the scoring is.
            One that FSDP2 shards on its own is gathered block by block, after
            `register_fsdp_forward_method(pool, "scores")`; all processes then need equally many
            blocks, or `pool.unshard()` first.
        image_tokens: (I, L, D) floating point.
        text_features: (J, D).
        k: at least 1; what the other side does not hold is left out.
        image_mask: (I, L) bool beside the tokens, True = a real token.
        device: where to score, and where the results are. Default: where the inputs are; if only
            one side is on the CPU, where the other one is.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        ((values, indices) of shape (I, min(k, J)), (values, indices) of shape (J, min(k, I)));
        best first, of equal scores the lower index first, NaN before all. Values float32 (float64
        for float64 input), indices int64.

    Raises:
        ValueError: k below 1, shapes or dimensions that do not fit, a device that is not there,
            inputs on two devices other than the CPU and no `device`.
        TypeError: tokens or features that are not floating point, a `pool` of another layout.

    Example:
        >>> (scores, captions), _ = text_conditioned_topk(pool, image_tokens, text_features, 10)
    """
    _check_k(k)
    check_tensor("image_tokens", image_tokens, 3, "(num_images, tokens, dim)")
    check_tensor("text_features", text_features, 2, "(num_texts, dim)")
    check_same_dim("image_tokens", image_tokens, "text_features", text_features)
    _check_image_mask("image_tokens", image_tokens, image_mask)
    scores_on = scoring_device(device, image_tokens, text_features)
    images = Rows({"image_tokens": image_tokens, "image_mask": image_mask}, _COPIES_OF_TOKENS)
    texts = Rows({"text_features": text_features}, _COPIES_OF_FEATURES)

    def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
        for some_images, some_texts, arguments in block_pairs(images, texts, scores_on):
            yield some_images, some_texts, pool_scores(pool, **arguments, backend=backend)

    like = _like(scores_on, image_tokens, text_features)
    with torch.no_grad():
        return _both_ways(images.items, texts.items, k, tiles(), like)


class _Corpus(NamedTuple):
    """What CAFT's score is made of, checked."""

    pool: nn.Module
    images: Rows
    texts: Rows
    alpha: float
    logits: dict[str, Tensor | float]  # scales and biases
    backend: str | None

    def whole(self, images: dict[str, Any], texts: dict[str, Any]) -> Tensor:
        """Logits (I, J) of the whole images and the whole captions."""
        features = images["whole_image_features"], texts["whole_text_features"]
        unit_images, unit_texts = map(_unit, of_one_dtype(*features))
        with without_autocast(unit_images):
            cosines = unit_images @ unit_texts.T
        return _logits(cosines, self.logits["whole_logit_scale"], self.logits["whole_logit_bias"])

    def part(
        self, images: dict[str, Any], texts: dict[str, Any], index: Tensor | None = None
    ) -> Tensor:
        """The mean over a caption's parts of their logits: (I, J), or (I, P) of `index`."""
        parts = texts["part_features"]
        count = parts.shape[1]
        if index is not None:
            index = index[:, :, None] * count + torch.arange(count, device=index.device)
            index = index.flatten(1)
        cosines = pool_scores(
            self.pool, images["fine_tokens"], _unit(parts).flatten(0, 1),
            image_mask=images["image_mask"], text_index=index, backend=self.backend,
        )  # fmt: skip
        cosines = cosines.unflatten(1, (-1, count)).mean(dim=2)
        return _logits(cosines, self.logits["logit_scale"], self.logits["logit_bias"])

    def blend(self, whole: Tensor, part: Tensor) -> Tensor:
        return (1 - self.alpha) * whole + self.alpha * part


def hierarchical_scores(
    pool: nn.Module,
    fine_tokens: Tensor,
    part_features: Tensor,
    whole_image_features: Tensor,
    whole_text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    whole_logit_scale: Tensor | float,
    whole_logit_bias: Tensor | float,
    *,
    alpha: float = 0.3,
    image_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """CAFT's score of every image with every long caption (arXiv 2602.02977).

        (1 - alpha) * whole logit + alpha * mean over the caption's parts of the part's logit

    The whole logit compares the whole image's feature with the whole caption's, a part's logit is
    that of `text_conditioned_scores` over the fine tokens; both are scale * cosine + bias. Part
    features are brought to unit length first, before the pool's LN_q too, as CAFT does when it
    evaluates (it does not when it trains). Under `torch.autocast` tokens and features are taken in
    its dtype, and the rest is float32.

    Args:
        pool: a TextConditionedPool, or a published block of the same layout.
        fine_tokens: (I, L, D) floating point.
        part_features: (J, P, D): the P parts of each caption, as the part encoder gives them.
        whole_image_features: (I, E), any length.
        whole_text_features: (J, E), any length.
        logit_scale, logit_bias: of the parts; the multiplier itself: floats or 0-dim tensors.
        whole_logit_scale, whole_logit_bias: of the whole.
        alpha: weight of the parts, from 0 to 1; CAFT reports 0.3.
        image_mask: (I, L) bool, True = a real fine token.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (I, J) float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, devices or dimensions that do not fit, an alpha outside of [0, 1].
        TypeError: tensors that are not floating point, a `pool` of another layout.
    """
    corpus = _corpus(
        pool, fine_tokens, part_features, whole_image_features, whole_text_features, logit_scale,
        logit_bias, whole_logit_scale, whole_logit_bias, alpha, image_mask, None, backend,
    )[0]  # fmt: skip
    images, texts = corpus.images.arguments, corpus.texts.arguments
    return corpus.blend(corpus.whole(images, texts), corpus.part(images, texts))


def hierarchical_topk(
    pool: nn.Module,
    fine_tokens: Tensor,
    part_features: Tensor,
    whole_image_features: Tensor,
    whole_text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    whole_logit_scale: Tensor | float,
    whole_logit_bias: Tensor | float,
    k: int,
    *,
    alpha: float = 0.3,
    shortlist: int | None = None,
    image_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Best:
    """The k best captions of each image and images of each caption by CAFT's score, streaming.

    With a `shortlist` the parts are scored only for each image's best captions by whole logit; of
    equal ones the lower index is taken. That list is made per image and serves both directions: all
    other pairs rank last, with -inf, as in CAFT's evaluation (which takes 16).

    Memory is bounded as in `text_conditioned_topk`, with any shortlist: no more captions are taken
    to the device at once than fit a block, and the lists of some images with at most four million
    captions in all are at work at once, another 256 MB.

    Args:
        k: at least 1; what the other side does not hold is left out.
        shortlist: captions an image; None scores every pair in full.
        device: where to score, and where the results are. Default: where the inputs are; if only
            one side is on the CPU, where the other one is.
        Others: as of `hierarchical_scores`; each side, its mask beside it, on a device of its own.

    Returns:
        As `text_conditioned_topk`.

    Raises:
        ValueError: k or shortlist below 1, and all that `hierarchical_scores` refuses.
        TypeError: as `hierarchical_scores`.
    """
    _check_k(k)
    if shortlist is not None and (not isinstance(shortlist, int) or shortlist < 1):
        raise ValueError(f"shortlist must be None or an int of at least 1; got {shortlist!r}")
    corpus, scores_on = _corpus(
        pool, fine_tokens, part_features, whole_image_features, whole_text_features, logit_scale,
        logit_bias, whole_logit_scale, whole_logit_bias, alpha, image_mask, device, backend,
        streams=True,
    )  # fmt: skip
    like = _like(scores_on, fine_tokens, part_features)
    tiles = (
        _every_pair(corpus, scores_on)
        if shortlist is None
        else _shortlisted(corpus, scores_on, shortlist, like)
    )
    with torch.no_grad():
        return _both_ways(corpus.images.items, corpus.texts.items, k, tiles, like)


def _every_pair(corpus: _Corpus, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    for images, texts, block in block_pairs(corpus.images, corpus.texts, device):
        yield images, texts, corpus.blend(corpus.whole(block, block), corpus.part(block, block))


def _shortlisted(
    corpus: _Corpus, device: torch.device, shortlist: int, like: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles that are -inf but where a caption is on the image's list."""
    num_texts = corpus.texts.items
    whole_texts = Rows(
        {"whole_text_features": corpus.texts.arguments["whole_text_features"]}, _COPIES_OF_FEATURES
    )
    most = max(_LISTED // max(min(shortlist, num_texts), 1), 1)
    for some_images in corpus.images.blocks(most):
        images = corpus.images.on(device, some_images)
        count = some_images.stop - some_images.start
        wholes = (
            (some_texts, corpus.whole(images, whole_texts.on(device, some_texts)))
            for some_texts in whole_texts.blocks()
        )
        whole, index = streaming_topk_of_rows((count, num_texts), shortlist, wholes, like)
        blended = corpus.blend(whole, _listed_parts(corpus, device, images, index, like))
        for some_texts in whole_texts.blocks():
            tile = like.new_full((count, some_texts.stop - some_texts.start), -torch.inf)
            inside = (index >= some_texts.start) & (index < some_texts.stop)
            row, column = inside.nonzero(as_tuple=True)
            tile[row, index[row, column] - some_texts.start] = blended[row, column]
            yield some_images, some_texts, tile


def _listed_parts(
    corpus: _Corpus, device: torch.device, images: dict[str, Any], index: Tensor, like: Tensor
) -> Tensor:
    """What `_Corpus.part` gives for the captions on the images' lists `index`.

    Some images at a time: only the captions on their lists travel, each once, and are no more than
    a block holds. The list of one image may be longer: then it is cut.
    """
    part_features = corpus.texts.arguments["part_features"]
    assert part_features is not None
    fitting = Rows({"part_features": part_features}, _COPIES_OF_FEATURES).fitting
    count, length = index.shape
    columns = max(min(fitting, length), 1)
    rows = max(fitting // columns, 1)
    part = like.new_empty(count, length)
    for first in range(0, count, rows):
        some = slice(first, first + rows)
        some_images = {name: None if x is None else x[some] for name, x in images.items()}
        for column in range(0, length, columns):
            listed = some, slice(column, column + columns)
            chosen, place = index[listed].unique(return_inverse=True)
            parts = copied(part_features[chosen.to(part_features.device)], device)
            part[listed] = corpus.part(some_images, {"part_features": parts}, place)
    return part


def _unit(x: Tensor) -> Tensor:
    return l2_normalize(x.to(score_dtype(x.dtype)))


def _logits(cosines: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    scale, bias = (
        x.reshape(()).to(cosines.device) if isinstance(x, Tensor) else x for x in (scale, bias)
    )
    return scale * cosines + bias


def _like(device: torch.device, image: Tensor, text: Tensor) -> Tensor:
    dtype = torch.promote_types(image.dtype, text.dtype)
    return torch.empty(0, dtype=score_dtype(dtype), device=device)


def _both_ways(
    num_images: int,
    num_texts: int,
    k: int,
    tiles: Iterator[tuple[slice, slice, Tensor]],
    like: Tensor,
) -> Best:
    by_image, captions, by_text, images = streaming_topk((num_images, num_texts), k, tiles, like)
    return (by_image, captions), (by_text, images)


def _check_k(k: object) -> None:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an int of at least 1; got {k!r}")


def _check_image_mask(name: str, tokens: Tensor, image_mask: Tensor | None) -> None:
    if image_mask is not None:
        check_mask("image_mask", image_mask, f"{name} (num_images, tokens)", tokens.shape[:2])
        check_same_device(name, tokens, image_mask=image_mask)


def _corpus(
    pool: nn.Module,
    fine_tokens: Tensor,
    part_features: Tensor,
    whole_image_features: Tensor,
    whole_text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    whole_logit_scale: Tensor | float,
    whole_logit_bias: Tensor | float,
    alpha: float,
    image_mask: Tensor | None,
    device: torch.device | str | None,
    backend: str | None,
    streams: bool = False,
) -> tuple[_Corpus, torch.device]:
    """The inputs, checked, and where they are scored: where they all are, unless they stream."""
    check_tensor("fine_tokens", fine_tokens, 3, "(num_images, tokens, dim)")
    check_tensor("part_features", part_features, 3, "(num_texts, parts, dim)")
    check_tensor("whole_image_features", whole_image_features, 2, "(num_images, dim)")
    check_tensor("whole_text_features", whole_text_features, 2, "(num_texts, dim)")
    if part_features.shape[1] == 0:
        raise ValueError(f"part_features {shape_of(part_features)} must hold at least one part")
    for name, whole, items_name, items in (
        ("whole_image_features", whole_image_features, "fine_tokens", fine_tokens),
        ("whole_text_features", whole_text_features, "part_features", part_features),
    ):
        if len(whole) != len(items):
            raise ValueError(
                f"{name} {shape_of(whole)} must have a row for each of the {len(items)} items of "
                f"{items_name} {shape_of(items)}"
            )
    check_same_dim("fine_tokens", fine_tokens, "part_features", part_features)
    check_same_dim(
        "whole_image_features", whole_image_features, "whole_text_features", whole_text_features
    )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1]; got {alpha}")
    logits = {
        "logit_scale": logit_scale,
        "logit_bias": logit_bias,
        "whole_logit_scale": whole_logit_scale,
        "whole_logit_bias": whole_logit_bias,
    }
    for name, value in logits.items():
        check_scalar(name, value)
    _check_image_mask("fine_tokens", fine_tokens, image_mask)
    check_same_device("fine_tokens", fine_tokens, whole_image_features=whole_image_features)
    check_same_device("part_features", part_features, whole_text_features=whole_text_features)
    if not streams:
        check_same_device("fine_tokens", fine_tokens, part_features=part_features)
    images = Rows(
        {
            "fine_tokens": fine_tokens,
            "image_mask": image_mask,
            "whole_image_features": whole_image_features,
        },
        _COPIES_OF_TOKENS,
    )
    texts = Rows(
        {"part_features": part_features, "whole_text_features": whole_text_features},
        _COPIES_OF_FEATURES,
    )
    corpus = _Corpus(pool, images, texts, alpha, logits, backend)
    return corpus, scoring_device(device, fine_tokens, part_features)

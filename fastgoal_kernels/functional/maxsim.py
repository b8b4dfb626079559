"""MaxSim (late interaction): scores, alignment, retrieval, and the contrastive loss on top.

Inputs come in one of three layouts, chosen for images and for texts separately:

    padded   (batch, tokens, dim)
    masked   the same with a bool mask (batch, tokens), True = a real token, anywhere in the row
    ragged   (total, dim) with offsets (batch + 1,): item b is rows offsets[b] to offsets[b + 1]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend
from ..checks import (
    check_choice,
    check_mask,
    check_offsets,
    check_same_device,
    check_same_dim,
    check_scalar,
    check_tensor,
    shape_of,
    values_are_checked,
)
from ..ops.maxsim import maxsim
from ..ops.normalize import l2_normalize
from ..ops.score_loss import score_loss
from ..ops.token_rows import token_rows
from ..ops.topk import streaming_topk
from .precision import as_scalar, of_one_dtype, without_autocast
from .token_blocks import block_pairs, scoring_device, side_of

DIRECTIONS = ("text_to_image", "image_to_text", "both")


def _check_side(
    side: str, tokens: object, mask: object, offsets: object, max_tokens: object
) -> None:
    name = f"{side}_tokens"
    if offsets is None:
        check_tensor(name, tokens, 3, f"({side}s, tokens, dim), or (total, dim) with offsets")
        assert isinstance(tokens, Tensor)
        if mask is not None:
            check_mask(f"{side}_mask", mask, name, tuple(tokens.shape[:2]))
        if max_tokens is not None:
            raise ValueError(
                f"max_{side}_tokens goes with {side}_offsets; the length of padded {name} "
                f"{shape_of(tokens)} is known"
            )
    else:
        check_tensor(name, tokens, 2, "(total, dim) beside offsets")
        assert isinstance(tokens, Tensor)
        if mask is not None:
            raise ValueError(f"give {side}_mask or {side}_offsets, not both")
        check_offsets(f"{side}_offsets", offsets, name, tokens.shape[0])
        assert isinstance(offsets, Tensor)
        if max_tokens is not None:
            if not isinstance(max_tokens, int) or max_tokens < 0:
                raise ValueError(f"max_{side}_tokens must be a Python int >= 0; got {max_tokens!r}")
            if values_are_checked(offsets) and len(offsets) > 1:
                longest = int(offsets.diff().max())
                if longest > max_tokens:
                    raise ValueError(
                        f"max_{side}_tokens is {max_tokens}, but {side}_offsets hold an item of "
                        f"{longest} tokens"
                    )
    if tokens.shape[-1] == 0:
        raise ValueError(f"{name} {shape_of(tokens)} must have at least one channel")


def _check_inputs(
    image_tokens: object,
    text_tokens: object,
    image_mask: object,
    text_mask: object,
    image_offsets: object,
    text_offsets: object,
    max_image_tokens: object,
    max_text_tokens: object,
) -> None:
    _check_side("image", image_tokens, image_mask, image_offsets, max_image_tokens)
    _check_side("text", text_tokens, text_mask, text_offsets, max_text_tokens)
    assert isinstance(image_tokens, Tensor) and isinstance(text_tokens, Tensor)
    check_same_dim("image_tokens", image_tokens, "text_tokens", text_tokens)
    check_same_device(
        "image_tokens",
        image_tokens,
        text_tokens=text_tokens,
        image_mask=image_mask if isinstance(image_mask, Tensor) else None,
        text_mask=text_mask if isinstance(text_mask, Tensor) else None,
        image_offsets=image_offsets if isinstance(image_offsets, Tensor) else None,
        text_offsets=text_offsets if isinstance(text_offsets, Tensor) else None,
    )


def _num_items(tokens: Tensor, offsets: Tensor | None) -> int:
    return tokens.shape[0] if offsets is None else offsets.shape[0] - 1


def _scores(
    chosen: str,
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_offsets: Tensor | None,
    text_offsets: Tensor | None,
    max_image_tokens: int | None,
    max_text_tokens: int | None,
    direction: str,
    reduction: str,
    normalize: bool,
    save_winners: bool,
    skip_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's four outputs, from inputs of one dtype."""
    if normalize:
        image_tokens, text_tokens = l2_normalize(image_tokens), l2_normalize(text_tokens)
    return maxsim(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        image_tokens.shape[0] if max_image_tokens is None else max_image_tokens,
        text_tokens.shape[0] if max_text_tokens is None else max_text_tokens,
        direction, reduction == "mean", save_winners, chosen, skip_zeros,
    )  # fmt: skip


def _keep_winners(image_tokens: Tensor, text_tokens: Tensor, recompute: bool) -> bool:
    """Winners are worth their memory only to a backward that will come."""
    wanted = image_tokens.requires_grad or text_tokens.requires_grad
    return torch.is_grad_enabled() and wanted and not recompute


@overload
def maxsim_scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    max_image_tokens: int | None = None,
    max_text_tokens: int | None = None,
    direction: Literal["text_to_image", "image_to_text"] = "text_to_image",
    reduction: str = "mean",
    normalize: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def maxsim_scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    max_image_tokens: int | None = None,
    max_text_tokens: int | None = None,
    direction: Literal["both"],
    reduction: str = "mean",
    normalize: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def maxsim_scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    max_image_tokens: int | None = None,
    max_text_tokens: int | None = None,
    direction: str = "text_to_image",
    reduction: str = "mean",
    normalize: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Late-interaction scores of every image with every text (FILIP, arXiv 2111.07783, eq. 3-5).

    With V_i the valid tokens of image i and T_j those of text j:

        text_to_image: S[i, j] = mean over q in T_j of max over r in V_i of <t_jq, v_ir>
        image_to_text: S[i, j] = mean over r in V_i of max over q in T_j of <t_jq, v_ir>

    "both" is the pair (text_to_image, image_to_text) from one pass over the similarities. The
    (images, texts, text tokens, image tokens) tensor never exists: beside the scores only the index
    of each winner is kept for the backward, in 1, 2 or 4 bytes.

    Equal maxima: the lowest index wins and takes the whole gradient. A text or an image without a
    valid token scores 0 with everything and gets zero gradients. NaN tokens give NaN scores.
    Differentiable once in both token tensors; the same inputs give the same bits.

    Args:
        image_tokens: (num_images, tokens, dim) floating point, or (total, dim) with image_offsets.
        text_tokens: (num_texts, tokens, dim), or (total, dim) with text_offsets; same device and
            dim. Mixed dtypes promote as torch does; under torch.autocast both are taken in its
            dtype. Sums are float32 (float64 for float64).
        image_mask, text_mask: bool (batch, tokens), True = a real token; any pattern.
        image_offsets, text_offsets: int64 or int32 (batch + 1,), non-decreasing from 0 to total;
            equal neighbours are an empty item.
        max_image_tokens, max_text_tokens: the longest ragged item, if you know it: it makes the
            saved winners compact (default: total).
        direction: "text_to_image", "image_to_text" or "both".
        reduction: "mean", or "sum" for the same without the division.
        normalize: divide each token by max(its length, 1e-12) first, differentiably.
        recompute: keep no winners for the backward. It finds them again, a few items at a time:
            one more forward for each modality that wants a gradient, and never more than a few MB.
            Of ragged tokens a CUDA device synchronises for it.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (num_images, num_texts) float32 (float64 for float64 tokens), or a pair of them for "both".

    Raises:
        ValueError: shapes, dims or devices that do not fit, a mask beside offsets, offsets that
            fall or do not run from 0 to total (values are looked at on the CPU, or everywhere with
            FASTGOAL_CHECKS=1), an unknown direction, reduction or backend.
        TypeError: tokens that are not floating point, a mask that is not bool.
        BackendError: a backend that was asked for can not serve these inputs.
    """
    _check_inputs(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        max_image_tokens, max_text_tokens,
    )  # fmt: skip
    check_choice("direction", direction, DIRECTIONS)
    check_choice("reduction", reduction, ("mean", "sum"))
    image_tokens, text_tokens = of_one_dtype(image_tokens, text_tokens)
    chosen = choose_backend("maxsim_scores", backend, image_tokens, text_tokens)
    with without_autocast(image_tokens):
        if chosen == "reference":
            return reference.maxsim_scores(
                image_tokens, text_tokens, image_mask=image_mask, text_mask=text_mask,
                image_offsets=image_offsets, text_offsets=text_offsets,
                direction=direction, reduction=reduction, normalize=normalize,
            )  # fmt: skip
        t2i, i2t, _, _ = _scores(
            chosen, image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
            max_image_tokens, max_text_tokens, direction, reduction, normalize,
            _keep_winners(image_tokens, text_tokens, recompute),
        )  # fmt: skip
    if direction == "both":
        return t2i, i2t
    return t2i if direction == "text_to_image" else i2t


def maxsim_alignment(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    max_image_tokens: int | None = None,
    max_text_tokens: int | None = None,
    direction: str = "text_to_image",
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Which token won: the index behind each maximum of `maxsim_scores`, for pictures.

    Args: as of `maxsim_scores`. Not differentiable.

    Returns:
        text_to_image: (num_images, num_texts, longest text) int64, entry [i, j, q] the token of
        image i that word q of text j is most similar to, -1 where q is padding or image i is empty.
        image_to_text: (num_images, num_texts, longest image), likewise. "both": the pair. The
        longest ragged item is read off the offsets, which makes a CUDA device synchronise.

    Raises: as `maxsim_scores`.
    """
    _check_inputs(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        max_image_tokens, max_text_tokens,
    )  # fmt: skip
    check_choice("direction", direction, DIRECTIONS)
    image_tokens, text_tokens = of_one_dtype(image_tokens.detach(), text_tokens.detach())
    chosen = choose_backend("maxsim_alignment", backend, image_tokens, text_tokens)
    with torch.no_grad(), without_autocast(image_tokens):
        if chosen == "reference":
            return reference.maxsim_alignment(
                image_tokens, text_tokens, image_mask=image_mask, text_mask=text_mask,
                image_offsets=image_offsets, text_offsets=text_offsets,
                direction=direction, normalize=normalize,
            )  # fmt: skip
        _, _, t2i, i2t = _scores(
            chosen, image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
            max_image_tokens, max_text_tokens, direction, "sum", normalize, True,
        )  # fmt: skip
    image = image_tokens, image_mask, image_offsets
    text = text_tokens, text_mask, text_offsets
    if direction == "text_to_image":
        return _per_item(t2i, text, image)
    by_text = _per_item(i2t, image, text).transpose(0, 1)
    return by_text if direction == "image_to_text" else (_per_item(t2i, text, image), by_text)


def _per_item(
    winners: Tensor,
    query: tuple[Tensor, Tensor | None, Tensor | None],
    key: tuple[Tensor, Tensor | None, Tensor | None],
) -> Tensor:
    """(keys, query rows) winners as (keys, queries, longest query) int64, -1 where none won."""
    queries = token_rows(*query, longest=query[0].shape[0], mean=False)
    keys = token_rows(*key, longest=key[0].shape[0], mean=False)
    longest = queries.longest
    if query[2] is not None:
        longest = int(queries.lengths.max()) if queries.items else 0
    position = torch.arange(longest, device=winners.device)
    row = queries.starts[:, None] + position
    inside = position < queries.lengths[:, None]
    row = torch.where(inside, row, 0)
    if queries.total == 0:
        return winners.new_full((keys.items, *row.shape), -1, dtype=torch.int64)
    live = inside & (queries.row_weight[row] != 0)
    live = live & (keys.lengths > 0)[:, None, None]
    return torch.where(live, winners.long()[:, row], -1)


def maxsim_topk(
    image_tokens: Tensor,
    text_tokens: Tensor,
    k: int,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    max_image_tokens: int | None = None,
    max_text_tokens: int | None = None,
    direction: str = "text_to_image",
    reduction: str = "mean",
    normalize: bool = False,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The k best texts of each image and the k best images of each text, both ways at once.

    For a corpus of any size: blocks of images meet blocks of texts, and of their scores only the
    best are kept. The tokens of one side or both may live on the CPU, pinned or memory-mapped too,
    while a GPU scores: it holds a few blocks of 256 MB and the results. Not differentiable.

    Where the blocks fall decides nothing, except the last bit of a score now and then.

    Args:
        image_tokens, text_tokens: as of `maxsim_scores`, but each side on a device of its own, its
            mask or offsets beside it.
        k: at least 1; what the other side does not hold is left out.
        max_image_tokens, max_text_tokens: checked, and not needed: offsets are read anyway, which
            makes a CUDA device that holds them synchronise once.
        direction: "text_to_image" or "image_to_text".
        device: where to score, and where the results are. Default: where the tokens are; if only
            one side is on the CPU, where the other one is.
        Others: as of `maxsim_scores`.

    Returns:
        ((values, indices) of shape (num_images, min(k, num_texts)),
         (values, indices) of shape (num_texts, min(k, num_images))); best first, of equal scores
        the lower index first, NaN before all. Values float32 (float64 for float64 tokens), indices
        int64.

    Raises:
        ValueError: k below 1, direction "both", a device that is not there, tokens on two devices
            other than the CPU and no `device`, and all that `maxsim_scores` refuses.
        TypeError, BackendError: as `maxsim_scores`.

    Example:
        >>> captions = torch.from_numpy(numpy.load("captions.npy", mmap_mode="c"))
        >>> (scores, texts), _ = maxsim_topk(image_tokens, captions, 10, device="cuda")
    """
    # The offsets cut the blocks, so the host reads them; their values are then checked at no cost.
    image_bounds = image_offsets.cpu() if isinstance(image_offsets, Tensor) else image_offsets
    text_bounds = text_offsets.cpu() if isinstance(text_offsets, Tensor) else text_offsets
    _check_side("image", image_tokens, image_mask, image_bounds, max_image_tokens)
    _check_side("text", text_tokens, text_mask, text_bounds, max_text_tokens)
    check_same_dim("image_tokens", image_tokens, "text_tokens", text_tokens)
    check_same_device(
        "image_tokens", image_tokens, image_mask=image_mask, image_offsets=image_offsets
    )
    check_same_device("text_tokens", text_tokens, text_mask=text_mask, text_offsets=text_offsets)
    check_choice("direction", direction, DIRECTIONS[:2])
    check_choice("reduction", reduction, ("mean", "sum"))
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an int of at least 1; got {k!r}")
    images = side_of("image", image_tokens, image_mask, image_bounds)
    texts = side_of("text", text_tokens, text_mask, text_bounds)
    device = scoring_device(device, image_tokens, text_tokens)

    def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
        for some_images, some_texts, tokens in block_pairs(images, texts, device):
            scores = maxsim_scores(  # type: ignore[call-overload]  (direction is not "both")
                **tokens, direction=direction, reduction=reduction, normalize=normalize,
                backend=backend,
            )  # fmt: skip
            yield some_images, some_texts, scores

    dtype = torch.promote_types(image_tokens.dtype, text_tokens.dtype)
    like = torch.empty(0, dtype=reference.score_dtype(dtype), device=device)
    with torch.no_grad():
        per_image, image_index, per_text, text_index = streaming_topk(
            (images.items, texts.items), k, tiles(), like
        )
    return (per_image, image_index), (per_text, text_index)


def maxsim_contrastive_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    max_image_tokens: int | None = None,
    max_text_tokens: int | None = None,
    captions_per_image: int = 1,
    pair_mask: Tensor | None = None,
    objective: str = "softmax",
    direction: str = "both",
    normalize: bool = False,
    recompute: bool = False,
    grad_filter_eps: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The contrastive loss of MaxSim scores, from tokens to a scalar (FILIP, arXiv 2111.07783).

    With z = logit_scale * S + logit_bias and S of `maxsim_scores`:

        softmax, "both":   half of [cross-entropy over the rows of the image_to_text logits
                           + over the columns of the text_to_image logits], targets on the diagonal
        softmax, one way:  half the sum of row and column cross-entropy of that one matrix
        sigmoid:           -sum log sigmoid(y z) / num_texts, y = +1 where
                           floor(j / captions_per_image) = i, else -1; "both": the two averaged

    Differentiable once in tokens, logit_scale and logit_bias.

    Args:
        image_tokens, text_tokens, masks, offsets, max_*_tokens, normalize, recompute: as of
            `maxsim_scores`.
        logit_scale: the multiplier itself (CLIP's exp already taken): a float, or a tensor of one
            element on any device.
        logit_bias: added to every logit; likewise. None = 0.
        captions_per_image: K of the sigmoid objective; text j belongs to image floor(j / K).
        pair_mask: (num_images, num_texts) bool, False = this pair takes no part (a duplicate, a
            known false negative). Positives always do.
        objective: "softmax" or "sigmoid".
        direction: "both", "text_to_image" or "image_to_text".
        grad_filter_eps: treat a pair as having no gradient for its tokens when
            num_texts * |dL/dz| falls below this (the upstream gradient divided out, so neither
            batch size nor loss scaling matters); its part of the backward is not computed. None =
            keep all. Scale and bias see every pair. What an image's tokens lose is, as a Frobenius
            norm, below 2 * grad_filter_eps * logit_scale * (the longest text token) times the
            upstream gradient; likewise for texts, times num_images / num_texts. 1e-5 is a good
            value: until the loss falls below about 0.02 what is skipped stays under what rounding
            the gradients to bfloat16 costs anyway, and a trained model has few pairs above it.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        The loss, 0-dim float32 (float64 for float64 tokens). Of an empty batch the softmax loss is
        NaN, like PyTorch's cross-entropy, and the sigmoid loss 0.

    Raises:
        ValueError: softmax with num_images != num_texts or captions_per_image != 1, a negative
            grad_filter_eps, and all that `maxsim_scores` refuses.
        TypeError: a logit_scale that is no number or tensor; a mask that is not bool.
        BackendError: a backend that was asked for can not serve these inputs.
    """
    _check_inputs(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        max_image_tokens, max_text_tokens,
    )  # fmt: skip
    check_choice("direction", direction, DIRECTIONS)
    check_choice("objective", objective, ("softmax", "sigmoid"))
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias, allow_none=True)
    num_images = _num_items(image_tokens, image_offsets)
    num_texts = _num_items(text_tokens, text_offsets)
    if objective == "softmax" and (num_images != num_texts or captions_per_image != 1):
        raise ValueError(
            f"objective='softmax' needs one text per image (targets on the diagonal); got "
            f"{num_images} images, {num_texts} texts, captions_per_image={captions_per_image}. "
            "Fix: objective='sigmoid'"
        )
    if not isinstance(captions_per_image, int) or captions_per_image < 1:
        raise ValueError(f"captions_per_image must be an int >= 1; got {captions_per_image!r}")
    if grad_filter_eps is not None and not grad_filter_eps >= 0:
        raise ValueError(f"grad_filter_eps must be None or at least 0; got {grad_filter_eps}")
    if pair_mask is not None:
        check_mask("pair_mask", pair_mask, "(num_images, num_texts)", (num_images, num_texts))
        check_same_device("image_tokens", image_tokens, pair_mask=pair_mask)

    image_tokens, text_tokens = of_one_dtype(image_tokens, text_tokens)
    chosen = choose_backend("maxsim_contrastive_loss", backend, image_tokens, text_tokens)
    scale = as_scalar(logit_scale, image_tokens)
    bias = as_scalar(0.0 if logit_bias is None else logit_bias, image_tokens)
    with without_autocast(image_tokens):
        if chosen == "reference":
            if grad_filter_eps:
                raise ValueError("backend='reference' keeps every gradient: no grad_filter_eps")
            return reference.maxsim_contrastive_loss(
                image_tokens, text_tokens, scale, bias, image_mask=image_mask,
                text_mask=text_mask, image_offsets=image_offsets, text_offsets=text_offsets,
                captions_per_image=captions_per_image, pair_mask=pair_mask, objective=objective,
                direction=direction, normalize=normalize,
            )  # fmt: skip
        t2i, i2t, _, _ = _scores(
            chosen, image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
            max_image_tokens, max_text_tokens, direction, "mean", normalize,
            _keep_winners(image_tokens, text_tokens, recompute), skip_zeros=bool(grad_filter_eps),
        )  # fmt: skip
        rows = t2i if direction == "text_to_image" else i2t
        loss, _, _ = score_loss(
            rows, t2i if direction == "both" else None, scale, bias, pair_mask,
            objective, captions_per_image, float(grad_filter_eps or 0.0), chosen,
        )  # fmt: skip
    return loss


def pack_tokens(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Drop the padding: padded tokens as the ragged ones that every op here takes.

    Reads how many tokens are real, so a CUDA device synchronises: once a batch, not once an op.

    Args:
        tokens: (batch, tokens, dim), differentiable.
        mask: (batch, tokens) bool, True = a real token; any pattern, order is kept.

    Returns:
        packed (total, dim), offsets (batch + 1,) int64 from 0 to total, the longest length.

    Raises:
        ValueError, TypeError: a mask of another shape, dtype or device than tokens asks for.

    Example:
        >>> packed, offsets, longest = pack_tokens(text_tokens, text_mask)
        >>> maxsim_scores(image_tokens, packed, text_offsets=offsets, max_text_tokens=longest)
    """
    check_tensor("tokens", tokens, 3, "(batch, tokens, dim)")
    check_mask("mask", mask, "tokens", tuple(tokens.shape[:2]))
    check_same_device("tokens", tokens, mask=mask)
    return reference.pack_tokens(tokens, mask)

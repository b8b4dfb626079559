"""Means of patch and word tokens, FAST-GOAL's token similarity loss, sampling and soft clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backends import choose_backend
from ..checks import (
    check_choice,
    check_integer,
    check_mask,
    check_range,
    check_same_device,
    check_tensor,
    shape_of,
    values_are_checked,
)
from ..ops.cluster_pool import cluster_pool
from ..ops.farthest_points import farthest_points
from ..ops.token_means import token_means
from ..ops.token_similarity import token_similarity
from ..reference import l2_normalize, score_dtype
from .precision import in_autocast_dtype, of_one_dtype, without_autocast


def _check_owner(
    name: str, owner: object, count: int, rows: str, of_name: str, tokens: Tensor
) -> None:
    """The item that each box or span belongs to; None: one each in order."""
    if owner is None:
        if count != tokens.shape[0]:
            raise ValueError(
                f"{rows} holds {count} rows for {tokens.shape[0]} items of {of_name}; without "
                f"{name} there is one row an item, in order. Fix: pass {name} ({count},)"
            )
        return
    check_integer(name, owner, (count,), f"({count},), one index for each row of {rows}")
    assert isinstance(owner, Tensor)
    check_same_device(of_name, tokens, **{name: owner})
    check_range(name, owner, 0, tokens.shape[0], f"an index into {of_name}")


def _check_numbers(name: str, tensor: object, columns: int, layout: str) -> None:
    """A real (integer or floating) tensor (rows, columns)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, not {type(tensor).__name__}")
    if tensor.ndim != 2 or tensor.shape[1] != columns:
        raise ValueError(f"{name} must have shape {layout}; got {shape_of(tensor)}")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers; got {tensor.dtype}")


def _check_box_values(boxes: Tensor, image_sizes: Tensor) -> None:
    if values_are_checked(image_sizes):
        wrong = ~(image_sizes > 0).all(dim=1)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"image_sizes must be positive (width, height); row {at} is "
                f"{image_sizes[at].tolist()}"
            )
    if values_are_checked(boxes):
        finite = boxes.double().isfinite().all(dim=1)
        ordered = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
        if not bool((finite & ordered).all()):
            at = int((~(finite & ordered)).nonzero()[0])
            problem = "is reversed" if bool(finite[at]) else "is not finite"
            raise ValueError(
                f"boxes are x1 y1 x2 y2 with x1 <= x2 and y1 <= y2; row {at} {problem}: "
                f"{boxes[at].tolist()}. Fix for x y width height: x2 = x + width, y2 = y + height"
            )


def region_mean(
    tokens: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    grid_size: tuple[int, int],
    model_size: int,
    *,
    box_image: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean of the patch tokens that each box touches (FAST-GOAL, arXiv 2605.26615, TSL).

    The image is taken to be squashed to model_size x model_size. In float64, x * S / width and
    y * S / height are rounded half to even; x1, y1 are clamped to [0, S - 1] and x2, y2 to [0, S];
    the box then covers the columns floor(x1 * w / S) to ceil(x2 * w / S) - 1, and rows likewise.
    A box that covers no patch takes the one under its scaled, clamped centre.

    Differentiable in `tokens`. Sums are float32 (float64 for float64 tokens), in a fixed order.

    Args:
        tokens: (N, h * w, D) floating point, row-major patches without the CLS token.
        boxes: (M, 4) real numbers: x1 y1 x2 y2 in pixels of the original image.
        image_sizes: (N, 2) real numbers: width, height of the original images in pixels.
        grid_size: (h, w) patches.
        model_size: S, the side of the square model input in pixels.
        box_image: (M,) integers, the image of each box; default: box m lies on image m.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (M, D) means in the dtype of `tokens`.

    Raises:
        ValueError: shapes or devices that do not fit, and (values on the CPU) a box that is
            reversed or not finite, an image size that is not positive, a box_image out of range.
        TypeError: tokens that are not floating point, boxes that are not numbers.
    """
    check_tensor("tokens", tokens, 3, "(num_images, height * width, dim)")
    _check_numbers("boxes", boxes, 4, "(num_boxes, 4): x1 y1 x2 y2")
    _check_numbers("image_sizes", image_sizes, 2, "(num_images, 2): width height")
    check_same_device("tokens", tokens, boxes=boxes, image_sizes=image_sizes)
    height, width = grid_size
    if min(height, width, model_size) < 1:
        raise ValueError(
            f"grid_size and model_size must be positive; got {grid_size} and {model_size}"
        )
    if tokens.shape[1] != height * width:
        raise ValueError(
            f"tokens {shape_of(tokens)} must hold height * width = {height} * {width} = "
            f"{height * width} patches an image. Fix: drop the CLS token, tokens[:, 1:]"
        )
    if image_sizes.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"image_sizes {shape_of(image_sizes)} must have one row for each image of tokens "
            f"{shape_of(tokens)}"
        )
    _check_owner("box_image", box_image, boxes.shape[0], "boxes", "tokens", tokens)
    _check_box_values(boxes, image_sizes)
    tokens = in_autocast_dtype(tokens)
    with without_autocast(tokens):
        chosen = choose_backend("region_mean", backend, tokens)
        if chosen == "reference":
            return reference.region_mean(
                tokens, boxes, image_sizes, grid_size, model_size, box_image=box_image
            )
        grid = (height, width, model_size)
        return token_means(tokens, box_image, boxes, image_sizes, grid, chosen)[0]


def span_mean(
    tokens: Tensor,
    spans: Tensor,
    *,
    span_text: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean of the word tokens in each half-open span (FAST-GOAL, arXiv 2605.26615, TSL).

    A span past the context is clipped to it; one that is then empty takes the last token of its
    text, at `lengths` - 1. Differentiable in `tokens`; sums are float32 (float64 for float64
    tokens), in a fixed order.

    Args:
        tokens: (N, T, D) floating point.
        spans: (M, 2) integers: first token and the one after the last.
        span_text: (M,) integers, the text of each span; default: span m lies in text m.
        lengths: (N,) integers, the tokens of each text; default: T.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (M, D) means in the dtype of `tokens`.

    Raises:
        ValueError: shapes or devices that do not fit, a context of no tokens, and (values on the
            CPU) a span that starts below 0 or ends before it starts, a span_text or length out of
            range.
        TypeError: tokens that are not floating point, spans that are not integers.
    """
    check_tensor("tokens", tokens, 3, "(num_texts, context, dim)")
    check_integer("spans", spans, (None, 2), "(num_spans, 2): start end")
    check_same_device("tokens", tokens, spans=spans, lengths=lengths)
    num_texts, context, _ = tokens.shape
    _check_owner("span_text", span_text, spans.shape[0], "spans", "tokens", tokens)
    if context == 0 and spans.shape[0] > 0:
        raise ValueError(f"tokens {shape_of(tokens)} has no token to take a mean of")
    if lengths is not None:
        check_integer("lengths", lengths, (num_texts,), f"({num_texts},), one for each text")
        check_range("lengths", lengths, 0, context + 1, "at most the context of tokens")
    if values_are_checked(spans):
        wrong = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0])
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"spans are half-open [start, end) with 0 <= start <= end; row {at} is "
                f"{spans[at].tolist()}"
            )
    tokens = in_autocast_dtype(tokens)
    with without_autocast(tokens):
        chosen = choose_backend("span_mean", backend, tokens)
        if chosen == "reference":
            return reference.span_mean(tokens, spans, span_text=span_text, lengths=lengths)
        return token_means(tokens, span_text, spans, lengths, (), chosen)[0]


def token_similarity_loss(
    pooled: Tensor, local: Tensor, *, mode: str = "diagonal", backend: str | None = None
) -> Tensor:
    """FAST-GOAL's token similarity loss, TSL (arXiv 2605.26615).

    "diagonal": mean over b of (cos(pooled_b, local_b) - 1)^2, what the published code trains with.
    "matrix": the paper's equation 14 read literally, the mean over all N * N pairs of
    (cos(pooled_b, local_c) - [b = c])^2. Neither side is detached: gradients reach both. A zero
    vector has cosine 0 with everything and gets no gradient.

    Args:
        pooled: (N, D) floating point: means of the region's patches (or of the sentence's words),
            after the tower's own norm and projection.
        local: (N, D): the features of the crop (or the sentence) itself.
        mode: "diagonal" or "matrix"; the second is the definition's plain PyTorch on any backend.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        The loss, 0-dim float32 (float64 for float64 input). Of an empty batch it is NaN, like
        `torch.nn.functional.mse_loss`.

    Raises:
        ValueError: shapes or devices that differ, an unknown mode.
        TypeError: input that is not floating point.
    """
    check_tensor("pooled", pooled, 2, "(batch, dim)")
    check_tensor("local", local, 2, "(batch, dim)")
    if pooled.shape != local.shape:
        raise ValueError(
            f"pooled {shape_of(pooled)} and local {shape_of(local)} must have the same shape: "
            "row b of one belongs to row b of the other"
        )
    check_same_device("pooled", pooled, local=local)
    check_choice("mode", mode, ("diagonal", "matrix"))
    pooled, local = of_one_dtype(pooled, local)
    chosen = choose_backend("token_similarity_loss", backend, pooled, local)
    with without_autocast(pooled):
        if chosen == "triton" and mode == "diagonal":
            return token_similarity(pooled, local)[0]
        if chosen == "torch" and mode == "diagonal":  # without the (N, N) cosines nobody reads
            dtype = score_dtype(pooled.dtype)
            cosine = (l2_normalize(pooled.to(dtype)) * l2_normalize(local.to(dtype))).sum(dim=1)
            return (cosine - 1).square().mean()
        return reference.token_similarity_loss(pooled, local, mode=mode)


def farthest_point_sampling(
    points: Tensor,
    num_samples: int,
    *,
    start: int = 0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Greedy farthest points of every set in the batch (CAFT, arXiv 2602.02977, graph pooling).

    The first index is `start`; each next one is the point with the largest squared Euclidean
    distance to those chosen so far, the lowest index on ties. Distances are direct differences in
    float32 (float64 for float64 points): a Gram matrix loses near-duplicates. Masked points are
    never chosen while others remain; when none remain, `start` repeats. Of distances that are NaN
    the first counts as the largest, as `argmax` has it. Not differentiable.

    Args:
        points: (N, L, D) floating point.
        num_samples: how many to choose, at least 1; may exceed L.
        start: the index of the first, in [0, L), masked or not.
        mask: (N, L) bool, True = a real point.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (N, num_samples) int64 indices.

    Raises:
        ValueError: shapes or devices that do not fit, num_samples below 1, start out of range.
        TypeError: points that are not floating point, a mask that is not bool.
    """
    check_tensor("points", points, 3, "(batch, points, dim)")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if not 0 <= start < points.shape[1]:
        raise ValueError(
            f"start must be an index of one of the {points.shape[1]} points of points "
            f"{shape_of(points)}; got {start}"
        )
    if mask is not None:
        check_mask("mask", mask, "points (batch, points)", tuple(points.shape[:2]))
        check_same_device("points", points, mask=mask)
    points = points.detach()
    chosen = choose_backend("farthest_point_sampling", backend, points)
    if chosen == "reference":
        return reference.farthest_point_sampling(points, num_samples, start=start, mask=mask)
    return farthest_points(points, num_samples, start, mask, chosen)


def soft_cluster_pool(
    tokens: Tensor, assign_logits: Tensor, *, backend: str | None = None
) -> Tensor:
    """Tokens averaged into clusters they belong to softly (CAFT, arXiv 2602.02977, graph pooling).

    a = softmax over the clusters of assign_logits; out[m] = sum_l a_lm x_l / sum_l a_lm.
    Differentiable in both. The softmax and the sums are float32, or float64 where either input is.
    Other logits wider than the tokens do not widen the means: they only weigh.

    Args:
        tokens: (N, L, D) floating point.
        assign_logits: (N, L, M) floating point.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (N, M, D) in the dtype of `tokens`, or float64.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: input that is not floating point.
    """
    check_tensor("tokens", tokens, 3, "(batch, tokens, dim)")
    check_tensor("assign_logits", assign_logits, 3, "(batch, tokens, clusters)")
    if tokens.shape[:2] != assign_logits.shape[:2]:
        raise ValueError(
            f"tokens {shape_of(tokens)} and assign_logits {shape_of(assign_logits)} must agree in "
            "batch and tokens, their first two axes"
        )
    check_same_device("tokens", tokens, assign_logits=assign_logits)
    tokens = in_autocast_dtype(tokens)
    if assign_logits.dtype == torch.float64:
        tokens = tokens.double()
    # The definition is already vectorised and holds nothing large: it serves as the torch backend.
    chosen = choose_backend("soft_cluster_pool", backend, tokens, assign_logits)
    with without_autocast(tokens):
        if chosen == "triton":
            return cluster_pool(tokens, assign_logits)[0]
        return reference.soft_cluster_pool(tokens, assign_logits)

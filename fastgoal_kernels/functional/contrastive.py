"""Contrastive losses of one feature a picture and one a caption: CLIP's and SigLIP's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import choose_backend
from ..checks import (
    check_choice,
    check_mask,
    check_same_device,
    check_same_dim,
    check_scalar,
    check_tensor,
    shape_of,
)
from ..ops import feature_loss
from ..ops.autograd_rules import wants_gradient
from .precision import as_scalar, of_one_dtype, without_autocast


def check_features(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    pair_mask: Tensor | None = None,
    *,
    bias_is_optional: bool = True,
) -> None:
    """Shapes, dtypes and devices of what both losses take."""
    check_tensor("image_features", image_features, 2, "(num_images, dim)")
    check_tensor("text_features", text_features, 2, "(num_texts, dim)")
    check_same_dim("image_features", image_features, "text_features", text_features)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias, allow_none=bias_is_optional)
    if pair_mask is not None:
        pairs = (image_features.shape[0], text_features.shape[0])
        check_mask("pair_mask", pair_mask, "(num_images, num_texts)", pairs)
    check_same_device(
        "image_features", image_features, text_features=text_features, pair_mask=pair_mask
    )


def clip_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    pair_mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """CLIP's loss (arXiv 2103.00020, figure 3) without ever holding the batch x batch logits.

    With z = logit_scale * image_features @ text_features.T + logit_bias, half of [the mean
    cross-entropy of z's rows + the mean cross-entropy of its columns], the targets on the diagonal:
    caption i belongs to image i. On one process it equals open_clip's `ClipLoss`.

    Differentiable in the features, `logit_scale` and `logit_bias` (whose gradient is exactly zero,
    since a softmax does not see a shift). A tower that wants no gradient costs no gradient work.
    The torch backend holds a tile of a few MB at a time and computes it again in the backward.
    Equal inputs on one device give equal bits.

    Args:
        image_features: (N, D) floating point, usually of unit length.
        text_features: (N, D), on the same device. Mixed dtypes promote as torch does; under
            `torch.autocast` both are taken in its dtype. Sums and the softmax are float32, or
            float64 for float64 features.
        logit_scale: the multiplier itself (CLIP's `exp` already taken): a float, or a tensor of one
            element on any device.
        logit_bias: added to every logit; likewise.
        pair_mask: (N, N) bool; False = this pair takes no part (a duplicate, a known false
            negative). The diagonal always takes part.
        label_smoothing: in [0, 1); this share of each row's (column's) target is spread evenly over
            the pairs of it that take part.
        normalize: divide every feature by its length first (by 1e-12 at least), differentiably.
        backend: "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        The loss, 0-dim float32 (float64 for float64 features). Of an empty batch it is NaN, like
        PyTorch's cross-entropy.

    Raises:
        ValueError: shapes, devices or dimensions that do not fit, unequal numbers of images and
            texts, a label_smoothing outside [0, 1), an unknown backend.
        TypeError: features that are not floating point, a mask that is not bool.
        BackendError: a backend that was asked for and has no such kernel.
    """
    check_features(image_features, text_features, logit_scale, logit_bias, pair_mask)
    if image_features.shape[0] != text_features.shape[0]:
        raise ValueError(
            "clip_contrastive_loss needs one text per image (the targets are the diagonal); got "
            f"image_features {shape_of(image_features)}, text_features {shape_of(text_features)}. "
            "Fix: for several captions an image use sigmoid_contrastive_loss"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
    image_features, text_features = of_one_dtype(image_features, text_features)
    scale = as_scalar(logit_scale, image_features)
    bias = None if logit_bias is None else as_scalar(logit_bias, image_features)
    chosen = choose_backend("clip_contrastive_loss", backend, image_features, text_features)
    if chosen == "reference":
        with without_autocast(image_features):
            return reference.clip_contrastive_loss(
                image_features, text_features, scale, bias,
                pair_mask=pair_mask, label_smoothing=label_smoothing, normalize=normalize,
            )  # fmt: skip
    loss, _, _ = feature_loss.softmax_loss(
        image_features, text_features, scale, pair_mask, label_smoothing, True, 0, normalize, chosen
    )
    return _without_gradient(loss, bias)


def _without_gradient(loss: Tensor, bias: Tensor | None) -> Tensor:
    """A softmax does not see a shift of all its logits: the bias's gradient is 0, not missing."""
    return loss if bias is None else loss + 0 * bias


def row_cross_entropy(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    first_target: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Mean cross-entropy of the rows of logit_scale * rows @ columns.T + logit_bias: half of CLIP.

    What one process of several computes of its own rows (`fastgoal_kernels.distributed`). The
    target of row i, of (M, D) `rows`, is column i + first_target of the (N, D) `columns`; the rest
    is as in `clip_contrastive_loss`.
    """
    rows, columns = of_one_dtype(rows, columns)
    scale = as_scalar(logit_scale, rows)
    bias = None if logit_bias is None else as_scalar(logit_bias, rows)
    chosen = choose_backend("clip_contrastive_loss", backend, rows, columns)
    if chosen == "reference":
        with without_autocast(rows):
            logits = scale * reference.feature_scores(rows, columns, normalize=False)
            targets = torch.arange(first_target, first_target + len(rows), device=rows.device)
            return F.cross_entropy(logits if bias is None else logits + bias, targets)
    loss, _, _ = feature_loss.softmax_loss(
        rows, columns, scale, None, 0.0, False, first_target, False, chosen
    )
    return _without_gradient(loss, bias)


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int = 1,
    negative_only: bool = False,
    pair_mask: Tensor | None = None,
    normalize: bool = False,
    average_over: str = "texts",
    backend: str | None = None,
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, equation 3), also with several captions an image.

    -sum over all pairs of log sigmoid(y z), with z = logit_scale * <image, text> + logit_bias and
    y = +1 where floor(text / captions_per_image) = image, else -1; divided by the number of texts
    (FLAIR, arXiv 2412.03561; CAFT, arXiv 2602.02977) or of images (SigLIP, open_clip).

    Differentiable in the features, `logit_scale` and `logit_bias`. The torch backend holds a tile
    of a few MB at a time; where gradients are wanted it finds them in the same pass (three matrix
    products instead of four) and keeps them, in float32, until the backward multiplies them.
    Equal inputs on one device give equal bits.

    Args:
        image_features: (I, D) floating point, usually of unit length.
        text_features: (J, D), on the same device; J need not be I * captions_per_image. Dtypes as
            in `clip_contrastive_loss`.
        logit_scale: the multiplier itself: a float, or a tensor of one element on any device.
        logit_bias: added to every logit; likewise. SigLIP starts at -10.
        captions_per_image: K; text j belongs to image floor(j / K).
        negative_only: every pair is a negative (texts of another rank).
        pair_mask: (I, J) bool; False = this pair takes no part. Positives always do.
        normalize: divide every feature by its length first (by 1e-12 at least), differentiably.
        average_over: "texts" or "images".
        backend: "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        The loss, 0-dim float32 (float64 for float64 features); 0 without pairs.

    Raises:
        ValueError: shapes, devices or dimensions that do not fit, captions_per_image below 1, an
            unknown average_over or backend.
        TypeError: features that are not floating point, a mask that is not bool, a
            captions_per_image that is not an int.
        BackendError: a backend that was asked for and has no such kernel.
    """
    check_features(
        image_features, text_features, logit_scale, logit_bias, pair_mask, bias_is_optional=False
    )
    check_choice("average_over", average_over, ("texts", "images"))
    if not isinstance(captions_per_image, int):
        raise TypeError(f"captions_per_image must be an int; got {captions_per_image!r}")
    if captions_per_image < 1:
        raise ValueError(f"captions_per_image must be at least 1; got {captions_per_image}")
    image_features, text_features = of_one_dtype(image_features, text_features)
    scale, bias = as_scalar(logit_scale, image_features), as_scalar(logit_bias, image_features)
    chosen = choose_backend("sigmoid_contrastive_loss", backend, image_features, text_features)
    if chosen == "reference":
        with without_autocast(image_features):
            return reference.sigmoid_contrastive_loss(
                image_features, text_features, scale, bias, captions_per_image=captions_per_image,
                negative_only=negative_only, pair_mask=pair_mask, normalize=normalize,
                average_over=average_over,
            )  # fmt: skip
    inputs = (image_features, text_features, scale, bias)
    wanted = [wants_gradient(x) for x in inputs]
    total, *_ = feature_loss.sigmoid_loss(
        *inputs, pair_mask, 0 if negative_only else captions_per_image, normalize, chosen, *wanted
    )
    count = text_features.shape[0] if average_over == "texts" else image_features.shape[0]
    return total / max(count, 1)

"""Text-conditioned attention pooling (FLAIR, arXiv 2412.03561; CAFT, arXiv 2602.02977).

Every caption pools every image's tokens with its own attention weights, and is compared with what
it pooled. The functions that take a module (`TextConditionedPool`, or the published block of the
same layout) read its tensors and call the ones that take `PoolWeights`; of a `TextConditionedPool`
they call its methods, so that hooks which FSDP2 has around those run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..backends import choose_backend
from ..checks import (
    check_choice,
    check_integer,
    check_mask,
    check_range,
    check_same_device,
    check_same_dim,
    check_scalar,
    check_tensor,
    shape_of,
)
from ..ops import text_conditioned as ops
from ..ops.autograd_rules import wants_gradient
from ..ops.text_conditioned_loss import text_conditioned_loss
from ..reference import PoolWeights, l2_normalize, score_dtype
from .precision import as_scalar, of_one_dtype, without_autocast


def pool_weights(pool: nn.Module) -> PoolWeights:
    """The tensors of a pool: a TextConditionedPool, or a published block of the same layout.

    Read them where they are whole: under FSDP2, inside the forward of the module that gathers them.

    Args:
        pool: has `attn` (an `nn.MultiheadAttention` with biases), `ln_q`, `ln_k` and `ln_v`.

    Raises:
        TypeError: it has not.
        ValueError: a setting that its tensors do not show, and with which it pools otherwise.
    """
    try:
        attn: Any = pool.attn
        norms: dict[str, Any] = {"ln_q": pool.ln_q, "ln_k": pool.ln_k, "ln_v": pool.ln_v}
        weights = (attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)
        affine = [x for norm in norms.values() for x in (norm.weight, norm.bias)]
        eps = {name: norm.eps for name, norm in norms.items()}
    except AttributeError as error:
        raise TypeError(
            f"pool must be a TextConditionedPool or have its attn, ln_q, ln_k and ln_v; {error}"
        ) from error
    if not (isinstance(attn, nn.MultiheadAttention) and isinstance(attn.out_proj, nn.Linear)):
        raise TypeError(
            "pool.attn must be an nn.MultiheadAttention with an nn.Linear as out_proj, not a "
            f"{type(attn).__name__} with a {type(attn.out_proj).__name__}, whose weights need not "
            "be all there is to it. Fix: merge the adapter, or call "
            "text_conditioned_loss_from_weights with merged PoolWeights"
        )
    if attn.bias_k is not None or attn.bias_v is not None:
        raise ValueError(
            "pool.attn has add_bias_kv=True, one more key and value that are not served. "
            "Fix: build the nn.MultiheadAttention with add_bias_kv=False"
        )
    if attn.dropout > 0 and attn.training:
        raise ValueError(
            f"pool.attn.dropout is {attn.dropout} in training, but attention weights are never "
            "dropped here. Fix: pool.attn.dropout = 0.0"
        )
    for name, value in eps.items():
        if value != 1e-5:
            raise ValueError(
                f"pool.{name}.eps is {value}; only 1e-5 is served. Fix: pool.{name}.eps = 1e-5"
            )
    return PoolWeights(*weights, *affine)


def _of_module(pool: nn.Module) -> dict[str, Any]:
    """What the functions that take tensors want of a pool, by the names of their arguments."""
    weights = pool_weights(pool)
    attn: Any = pool.attn
    return {
        "weights": weights, "num_heads": attn.num_heads, "add_zero_attn": attn.add_zero_attn
    }  # fmt: skip


def _is_our_pool(pool: nn.Module) -> bool:
    from ..modules import TextConditionedPool  # which is made of the functions of this file

    return isinstance(pool, TextConditionedPool)


def _check(
    image_tokens: object,
    text_features: object,
    weights: PoolWeights,
    num_heads: int,
    image_mask: object,
) -> None:
    check_tensor("image_tokens", image_tokens, 3, "(num_images, tokens, dim)")
    check_tensor("text_features", text_features, 2, "(num_texts, dim)")
    assert isinstance(image_tokens, Tensor) and isinstance(text_features, Tensor)
    check_same_dim("image_tokens", image_tokens, "text_features", text_features)
    dim = image_tokens.shape[2]
    wanted = {"in_proj_weight": (3 * dim, dim), "in_proj_bias": (3 * dim,)}
    wanted |= {"out_proj_weight": (dim, dim)}
    for name, tensor in zip(PoolWeights._fields, weights, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"weights.{name} must be a tensor, not {type(tensor).__name__}. Fix: build the "
                "nn.MultiheadAttention with bias=True and kdim = vdim = embed_dim"
            )
        if hasattr(tensor, "full_tensor"):  # without importing DTensor, which some torch lack
            raise ValueError(
                f"weights.{name} is sharded (a DTensor). Fix: shard the pool with the module in "
                "whose forward it is called; or shard a TextConditionedPool on its own and then "
                'call register_fsdp_forward_method(pool, "sigmoid_loss") for the losses and '
                'register_fsdp_forward_method(pool, "scores") for scores and retrieval'
            )
        shape = wanted.get(name, (dim,))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"weights.{name} {shape_of(tensor)} must have shape {shape} for image_tokens "
                f"{shape_of(image_tokens)}"
            )
        check_same_device("image_tokens", image_tokens, **{f"weights.{name}": tensor})
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the dimension {dim}; got {num_heads}")
    if image_mask is not None:
        check_mask(
            "image_mask", image_mask, "image_tokens (num_images, tokens)", image_tokens.shape[:2]
        )
        assert isinstance(image_mask, Tensor)
    check_same_device(
        "image_tokens", image_tokens, text_features=text_features, image_mask=image_mask
    )


def _check_captions(captions_per_image: object) -> None:
    if not isinstance(captions_per_image, int):
        raise TypeError(f"captions_per_image must be an int; got {captions_per_image!r}")
    if captions_per_image < 1:
        raise ValueError(f"captions_per_image must be at least 1; got {captions_per_image}")


def draw_offsets(
    image_tokens: Tensor, captions_per_image: int, generator: torch.Generator | None
) -> Tensor:
    """(N, N - 1): which caption of each other image is sampled as a negative."""
    _check_captions(captions_per_image)
    if generator is not None and torch.compiler.is_compiling():
        raise RuntimeError(
            "generator can not be drawn from in torch.compile. Fix: draw outside and pass "
            "negative_offsets=torch.randint(K, (N, N - 1), generator=generator, "
            "device=generator.device)"
        )
    num_images = image_tokens.shape[0]
    return torch.randint(
        captions_per_image, (num_images, max(num_images - 1, 0)), generator=generator,
        device=image_tokens.device,
    )  # fmt: skip


def _choose(
    op: str, backend: str | None, image_tokens: Tensor, text_features: Tensor, num_heads: int
) -> str:
    head_dim = text_features.shape[1] // num_heads
    lacks = f"the Triton kernels take heads of up to 128 channels; got {head_dim}"
    return choose_backend(
        op, backend, image_tokens, text_features, triton_lacks=lacks if head_dim > 128 else None
    )


def _runs_in(text_features: Tensor, backend: str) -> torch.dtype:
    """The dtype of the products.

    The input's on CUDA and in Triton, accumulating in float32; elsewhere half precision is widened
    first, where it is slower and less exact.
    """
    if backend == "triton" or text_features.device.type == "cuda":
        return text_features.dtype
    return score_dtype(text_features.dtype)


def _projected(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    image_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, unit texts and the output projection: what the operators of the scores take.

    Norms are always float32 or wider.
    """
    wide = score_dtype(text_features.dtype)
    dtype = _runs_in(text_features, backend)
    dim = text_features.shape[1]
    w_q, w_k, w_v = weights.in_proj_weight.chunk(3)
    b_q, b_k, b_v = weights.in_proj_bias.chunk(3)

    def project(x: Tensor, gain: Tensor, shift: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = F.layer_norm(x, (dim,), gain.to(wide), shift.to(wide), eps=1e-5)
        return F.linear(x.to(dtype), w.to(dtype), b.to(dtype))

    tokens, texts = image_tokens.to(wide), text_features.to(wide)
    if image_mask is not None:
        tokens = tokens.masked_fill(~image_mask[..., None], 0)
    return (
        project(texts, weights.ln_q_weight, weights.ln_q_bias, w_q, b_q),
        project(tokens, weights.ln_k_weight, weights.ln_k_bias, w_k, b_k),
        project(tokens, weights.ln_v_weight, weights.ln_v_bias, w_v, b_v),
        l2_normalize(texts),
        weights.out_proj_weight,
        weights.out_proj_bias,
    )


def _folded(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    image_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """What the operator of the loss takes before the logits' scale and bias."""
    wide = score_dtype(text_features.dtype)
    weights = PoolWeights(*(x.to(wide) for x in weights))
    dim = text_features.shape[1]
    w_q, w_k, w_v = weights.in_proj_weight.chunk(3)
    b_q, b_k, b_v = weights.in_proj_bias.chunk(3)
    tokens, texts = image_tokens.to(wide), text_features.to(wide)
    if image_mask is not None:
        tokens = tokens.masked_fill(~image_mask[..., None], 0)
    queries = F.layer_norm(texts, (dim,), weights.ln_q_weight, weights.ln_q_bias, eps=1e-5)
    return (
        F.linear(queries, w_q, b_q),
        tokens,
        w_k * weights.ln_k_weight,
        w_k @ weights.ln_k_bias + b_k,
        w_v * weights.ln_v_weight,
        w_v @ weights.ln_v_bias + b_v,
        l2_normalize(texts),
        weights.out_proj_weight,
        weights.out_proj_bias,
    )


def text_conditioned_scores(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    num_heads: int,
    *,
    add_zero_attn: bool = True,
    image_mask: Tensor | None = None,
    text_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cosine of every caption with what it pooled from every image.

    o_ij = multi-head attention of the query LN_q(t_j) over the keys and values LN_k, LN_v(image i),
    with in and out projections, softmax scale 1 / sqrt(head_dim) and, under `add_zero_attn`, one
    more key and value of zeros; score_ij = cos(o_ij, t_j) (FLAIR, arXiv 2412.03561, equations 2
    to 4, and CAFT). An image without a valid token scores 0 and gets no gradient.

    Differentiable in the tokens, the features and all weights. Keys and values are made once an
    image and queries once a caption; the rest is done block by block, forward and backward, so that
    nothing of size images x captions x dim exists.

    Args:
        image_tokens: (I, L, D) floating point.
        text_features: (J, D), as the text encoder gives them. Mixed dtypes promote as torch does;
            under `torch.autocast` both are taken in its dtype, and so are the weights. Layer norms,
            softmax and cosines are float32 (float64 for float64 input).
        weights: the pool's tensors, D = `num_heads` * head_dim.
        num_heads: attention heads.
        add_zero_attn: as in `torch.nn.MultiheadAttention`.
        image_mask: (I, L) bool, True = a real token.
        text_index: (I, P) integers: the captions to score with each image; default: all.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        (I, J), or (I, P) with `text_index`: float32, or float64 for float64 input.

    Raises:
        ValueError: shapes, devices or dimensions that do not fit, and (values on the CPU) a
            text_index out of range.
        TypeError: tokens or features that are not floating point, a mask that is not bool.
    """
    _check(image_tokens, text_features, weights, num_heads, image_mask)
    if text_index is not None:
        num_images, num_texts = image_tokens.shape[0], text_features.shape[0]
        check_integer("text_index", text_index, (num_images, None), "(num_images, captions)")
        check_same_device("image_tokens", image_tokens, text_index=text_index)
        check_range("text_index", text_index, 0, num_texts, "an index into text_features")
        text_index = text_index.long()
    image_tokens, text_features = of_one_dtype(image_tokens, text_features)
    chosen = _choose("text_conditioned_scores", backend, image_tokens, text_features, num_heads)
    with without_autocast(image_tokens):
        if chosen == "reference":
            return reference.text_conditioned_scores(
                image_tokens, text_features, weights, num_heads, add_zero_attn=add_zero_attn,
                image_mask=image_mask, text_index=text_index,
            )  # fmt: skip
        projected = _projected(image_tokens, text_features, weights, image_mask, chosen)
        scores, _ = ops.text_conditioned_scores(
            *projected, image_mask, text_index, num_heads, add_zero_attn, chosen
        )
        return scores


def pool_scores(
    pool: nn.Module, image_tokens: Tensor, text_features: Tensor, **options: Any
) -> Tensor:
    """`text_conditioned_scores` of a module instead of its tensors."""
    if _is_our_pool(pool):
        scores: Any = pool.scores
        return scores(image_tokens, text_features, **options)
    return text_conditioned_scores(image_tokens, text_features, **_of_module(pool), **options)


def text_conditioned_loss_from_weights(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    num_heads: int,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int,
    negatives: str = "all",
    negative_offsets: Tensor | None = None,
    negative_only: bool = False,
    image_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    add_zero_attn: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`text_conditioned_sigmoid_loss` (FLAIR, arXiv 2412.03561, equation 5) on the pool's tensors.

    For weights that live elsewhere than in a module's attributes: gathered from shards, merged with
    an adapter, produced by another network. Differentiable in all of them.

    Args:
        image_tokens: (N, L, D) floating point; L tokens an image.
        text_features: (N * K, D); captions i * K to i * K + K - 1 are image i's.
        weights: the pool's tensors: in_proj_weight (3D, D), in_proj_bias (3D,), out_proj_weight
            (D, D) and the others (D,); any floating dtype. `pool.weights()` has a module's.
        num_heads: attention heads; must divide D.
        logit_scale: the multiplier itself: a float, or a tensor of one element on any device.
        logit_bias: added to every logit; likewise.
        captions_per_image: K.
        negatives: "all" or "sample".
        negative_offsets: (N, N - 1) integers in [0, K), for "sample"; default: drawn uniformly.
        negative_only: the same columns, all negative.
        image_mask: (N, L) bool, True = a real token.
        generator: draws the offsets; on the device of the tokens, and not in `torch.compile`.
        add_zero_attn: one more key and value of zeros, as in `torch.nn.MultiheadAttention`.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        The loss, 0-dim float32 (float64 for float64 input); 0 for an empty batch.

    Raises:
        ValueError, TypeError: as `text_conditioned_sigmoid_loss`; weights of other shapes, on
            another device or sharded.
        RuntimeError: a generator in `torch.compile`.

    Example:
        >>> weights = pool.weights()
        >>> weights = weights._replace(out_proj_weight=weights.out_proj_weight + up @ down)
        >>> loss = text_conditioned_loss_from_weights(
        ...     image_tokens, text_features, weights, 8, 14.3, -10.0, captions_per_image=8
        ... )
    """
    _check(image_tokens, text_features, weights, num_heads, image_mask)
    check_scalar("logit_scale", logit_scale)
    check_scalar("logit_bias", logit_bias)
    check_choice("negatives", negatives, ("all", "sample"))
    num_images, num_texts = image_tokens.shape[0], text_features.shape[0]
    _check_captions(captions_per_image)
    if num_texts != num_images * captions_per_image:
        raise ValueError(
            f"text_features {shape_of(text_features)} must hold captions_per_image = "
            f"{captions_per_image} captions for each of the {num_images} images of image_tokens "
            f"{shape_of(image_tokens)}: {num_images * captions_per_image} rows"
        )
    if negatives == "all" and negative_offsets is not None:
        raise ValueError('negative_offsets is for negatives="sample"; got negatives="all"')
    if negatives == "sample":
        shape = (num_images, max(num_images - 1, 0))
        if negative_offsets is None:
            negative_offsets = draw_offsets(image_tokens, captions_per_image, generator)
        check_integer("negative_offsets", negative_offsets, shape, "(num_images, num_images - 1)")
        check_same_device("image_tokens", image_tokens, negative_offsets=negative_offsets)
        check_range(
            "negative_offsets", negative_offsets, 0, captions_per_image, "captions of an image"
        )

    image_tokens, text_features = of_one_dtype(image_tokens, text_features)
    scale, bias = as_scalar(logit_scale, image_tokens), as_scalar(logit_bias, image_tokens)
    chosen = _choose(
        "text_conditioned_sigmoid_loss", backend, image_tokens, text_features, num_heads
    )
    with without_autocast(image_tokens):
        if chosen == "reference":
            return reference.text_conditioned_sigmoid_loss(
                image_tokens, text_features, weights, num_heads, scale, bias,
                captions_per_image=captions_per_image, negative_offsets=negative_offsets,
                negative_only=negative_only, image_mask=image_mask, add_zero_attn=add_zero_attn,
            )  # fmt: skip
        text_index = None
        if negative_offsets is not None:
            text_index = reference.text_conditioned_columns(
                num_images, captions_per_image, negative_offsets.clamp(0, captions_per_image - 1)
            )
        columns = num_texts if text_index is None else text_index.shape[1]
        if chosen == "torch" and _runs_in(text_features, chosen) == scale.dtype:
            inputs = *_folded(image_tokens, text_features, weights, image_mask), scale, bias
            total, *_ = text_conditioned_loss(
                *inputs, image_mask, text_index, num_heads, add_zero_attn,
                0 if negative_only else captions_per_image,
                [wants_gradient(x) for x in inputs],
            )  # fmt: skip
        else:  # in Triton, and in half precision on a GPU
            scores, _ = ops.text_conditioned_scores(
                *_projected(image_tokens, text_features, weights, image_mask, chosen),
                image_mask, text_index, num_heads, add_zero_attn, chosen,
            )  # fmt: skip
            image = torch.arange(num_images, device=scores.device)[:, None]
            if text_index is None:
                text_index = torch.arange(num_texts, device=scores.device)
            positive = (text_index // captions_per_image == image) & (not negative_only)
            total = reference.sigmoid_loss(scale * scores + bias, positive, None)
        return total / max(columns, 1)


def text_conditioned_sigmoid_loss(
    pool: nn.Module,
    image_tokens: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int,
    negatives: str = "all",
    negative_offsets: Tensor | None = None,
    negative_only: bool = False,
    image_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """FLAIR's text-conditioned sigmoid loss (arXiv 2412.03561, equation 5), as CAFT trains with it.

    -sum over the pairs of log sigmoid(y z), divided by the number of columns, with
    z = logit_scale * cos(o_ij, t_j) + logit_bias (see `text_conditioned_scores`). The columns of
    image i are its own K captions, y = +1, and as negatives, y = -1,

    - "sample", the published loss: of each other image j one caption j * K + offset;
    - "all", ours: every caption of every other image. No published trainer can afford it. It has
      N * K columns where the sampled loss has N + K - 1, so a positive weighs (N K) / (N + K - 1)
      times less: when changing over, expect another balance of positives and negatives.

    Differentiable in the tokens, the features, the pool's parameters, `logit_scale` and
    `logit_bias`. Nothing of size images x captions x dim exists, forward or backward.

    Args:
        pool: a TextConditionedPool, or a published block of the same layout. One that FSDP2 shards
            on its own is gathered after `register_fsdp_forward_method(pool, "sigmoid_loss")`.
        image_tokens: (N, L, D) floating point.
        text_features: (N * K, D); captions i * K to i * K + K - 1 are image i's. Dtypes as in
            `text_conditioned_scores`.
        logit_scale: the multiplier itself: a float, or a tensor of one element on any device.
        logit_bias: added to every logit; likewise.
        captions_per_image: K.
        negatives: "all" or "sample".
        negative_offsets: (N, N - 1) integers in [0, K), for "sample": the caption drawn from each
            other image, those in ascending order; default: drawn uniformly.
        negative_only: the same columns, all negative: the captions are another rank's. Image i
            then meets the columns that rank drew for its own image i, as the published ring does.
        image_mask: (N, L) bool, True = a real token.
        generator: draws the offsets; on the device of the tokens. `torch.compile` can not draw from
            one: with fullgraph=True it is refused, else that part is not compiled.
        backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

    Returns:
        The loss, 0-dim float32 (float64 for float64 input); 0 for an empty batch.

    Raises:
        ValueError: shapes, devices or dimensions that do not fit, N * K captions that are not
            there, an unknown `negatives`, offsets with "all" or (values on the CPU) out of range; a
            pool with `add_bias_kv`, with dropout in training, with layer norms of another eps, or
            with sharded weights.
        TypeError: tokens or features that are not floating point, a `pool` of another layout.
        RuntimeError: a generator in `torch.compile`.
    """
    options: dict[str, Any] = {
        "captions_per_image": captions_per_image, "negatives": negatives,
        "negative_offsets": negative_offsets, "negative_only": negative_only,
        "image_mask": image_mask, "generator": generator, "backend": backend,
    }  # fmt: skip
    if _is_our_pool(pool):
        sigmoid_loss: Any = pool.sigmoid_loss
        return sigmoid_loss(image_tokens, text_features, logit_scale, logit_bias, **options)
    return text_conditioned_loss_from_weights(
        image_tokens, text_features, logit_scale=logit_scale, logit_bias=logit_bias,
        **_of_module(pool), **options,
    )  # fmt: skip

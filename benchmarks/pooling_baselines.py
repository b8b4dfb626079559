"""The text-conditioned loss in plain PyTorch: as one would write it, as published, and exact.

All take image tokens (images, tokens, dim), text features (images * K, dim), of which row j belongs
to image j // K, and a pool of the published layout. Negatives are every other image's captions, or,
given offsets (images, images - 1), one of each other image: caption j * K + offset, those images in
ascending order. The loss is the sum of -log sigmoid(±logit), divided by the number of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_kernels import TextConditionedPool, reference

# (pool, image tokens, text features, logit scale, logit bias, K, offsets or None) -> loss
PoolingLoss = Callable[
    [TextConditionedPool, Tensor, Tensor, Tensor, Tensor, int, Tensor | None], Tensor
]


def eager_loss(
    pool: TextConditionedPool,
    image_tokens: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    captions_per_image: int,
    offsets: Tensor | None,
) -> Tensor:
    """The good way without a kernel: a query once a caption, keys and values once an image.

    What each pair pooled is held for all of them, before and after the output projection.
    """
    attn, images = pool.attn, len(image_tokens)
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q = F.linear(pool.ln_q(text_features), weights[0], biases[0])
    k = F.linear(pool.ln_k(image_tokens), weights[1], biases[1])
    v = F.linear(pool.ln_v(image_tokens), weights[2], biases[2])
    texts = F.normalize(text_features, dim=-1)
    if offsets is None:
        q, texts = q.expand(images, -1, -1), texts[None]
    else:
        index = reference.text_conditioned_columns(images, captions_per_image, offsets)
        q, texts = q[index], texts[index]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)

    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))  # the key and the value of zeros
    pooled = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
    pooled = attn.out_proj(pooled.transpose(1, 2).flatten(2))
    scores = (F.normalize(pooled, dim=-1) * texts).sum(dim=-1)
    logits = logit_scale * scores + logit_bias
    if offsets is None:
        own = logits.unflatten(1, (images, captions_per_image)).diagonal()
    else:
        own = logits[:, :captions_per_image]
    # log sigmoid(-z) and log sigmoid(z) differ by z.
    return (F.softplus(logits).sum() - own.sum()) / logits.shape[1]


def published_loss(
    pool: TextConditionedPool,
    image_tokens: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    captions_per_image: int,
    offsets: Tensor | None,
) -> Tensor:
    """The form in which FLAIR and CAFT train, restated: a query for each pair.

    The attention block projects the same caption anew for each image it meets. Sampled columns are
    put together and sorted in Python, and the matrix of labels is filled row by row. With all
    negatives every image meets every caption so, as in those projects' evaluation.
    """
    images, own = len(image_tokens), captions_per_image
    if offsets is None:
        chosen = text_features.expand(images, -1, -1)
        first = [image * own for image in range(images)]
    else:
        rows = []
        for image, drawn in enumerate(offsets.tolist()):
            others = [other for other in range(images) if other != image]
            negatives = [j * own + offset for j, offset in zip(others, drawn, strict=True)]
            rows.append(sorted([*range(image * own, (image + 1) * own), *negatives]))
        chosen = text_features[torch.tensor(rows, device=text_features.device)]
        first = list(range(images))  # sorted: one column for each image before it
    labels = -torch.ones(chosen.shape[:2], device=chosen.device)
    for image, at in enumerate(first):
        labels[image, at : at + own] = 1
    pooled = pool(chosen, image_tokens, image_tokens)
    scores = (F.normalize(pooled, dim=-1) * F.normalize(chosen, dim=-1)).sum(dim=-1)
    logits = logit_scale * scores + logit_bias
    return -F.logsigmoid(labels * logits).sum() / logits.shape[1]


# ---------------------------------------------------------------------------------------------
# The yardstick for parity
# ---------------------------------------------------------------------------------------------

# Pairs that are held at once. Each takes about 60 kB at 64 tokens, dim 512.
_PAIRS = {"cpu": 1 << 12, "cuda": 1 << 17}


@dataclass(frozen=True)
class Exact:
    """A loss and its gradients, computed in float64 and kept in float32."""

    loss: Tensor
    images: Tensor
    texts: Tensor
    parameters: list[Tensor]  # of the scale, of the bias, of each of the pool's


def exact_loss(
    pool: TextConditionedPool,
    image_tokens: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    captions_per_image: int,
    offsets: Tensor | None,
) -> Exact:
    """The definition of the scores, in float64, for some images at a time."""
    images, captions = len(image_tokens), len(text_features)
    index = torch.arange(captions, device=text_features.device).expand(images, -1)
    if offsets is not None:
        index = reference.text_conditioned_columns(images, captions_per_image, offsets)
    columns = index.shape[1]

    def leaf(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    names = [name for name, _ in pool.named_parameters()]
    parameters = [leaf(parameter) for parameter in pool.parameters()]
    wide = _pool_of(pool, dict(zip(names, parameters, strict=True)))
    texts, scale, bias = leaf(text_features), leaf(logit_scale), leaf(logit_bias)
    shared = [texts, scale, bias, *parameters]
    sums = [torch.zeros_like(x) for x in shared]
    loss, by_images = torch.zeros_like(scale), []
    step = max(1, _PAIRS[image_tokens.device.type] // captions)
    for at in range(0, images, step):
        part = slice(at, min(at + step, images))
        tokens = leaf(image_tokens[part])
        scores = reference.text_conditioned_scores(
            tokens, texts, wide, pool.attn.num_heads, text_index=index[part]
        )
        image = torch.arange(part.start, part.stop, device=index.device)[:, None]
        sign = torch.where(index[part] // captions_per_image == image, 1.0, -1.0)
        total = -F.logsigmoid(sign * (scale * scores + bias)).sum() / columns
        by_tokens, *gradients = torch.autograd.grad(total, [tokens, *shared])
        by_images.append(by_tokens.float())
        loss += total.detach()
        for one, gradient in zip(sums, gradients, strict=True):
            one += gradient
    by_texts, *by_parameters = (one.float() for one in sums)
    return Exact(loss.float(), torch.cat(by_images), by_texts, by_parameters)


def _pool_of(pool: TextConditionedPool, parameters: dict[str, Tensor]) -> Any:
    """`pool.weights()` with other tensors in the places of its own."""
    order = {id(parameter): name for name, parameter in pool.named_parameters()}
    weights = pool.weights()
    return type(weights)(*(parameters[order[id(weight)]] for weight in weights))

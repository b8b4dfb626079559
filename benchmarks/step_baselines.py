"""CAFT's training step as published, restated in plain PyTorch on the same model.

What a trainer pays for beside the products: farthest points by a loop in float64, cluster pooling
by einsum, attention with its weights in memory, a query for each pair of image and caption, and
label matrices filled row by row. The towers, their parameters and the losses' values are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgoal_kernels import reference
from fastgoal_models.caft import graph_pool

from .pooling_baselines import published_loss


def published_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    captions_per_image: int,
) -> Tensor:
    """The multi-positive sigmoid loss with the whole logit and label matrices."""
    images, texts = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    logits = logit_scale * images @ texts.T + logit_bias
    labels = -torch.ones(logits.shape, device=logits.device)
    for image in range(len(labels)):
        labels[image, image * captions_per_image : (image + 1) * captions_per_image] = 1
    return -F.logsigmoid(labels * logits).sum() / logits.shape[1]


def published_hierarchical_loss(
    *,
    pool: Any,
    fine_tokens: Tensor,
    fine_features: Tensor,
    part_features: Tensor,
    whole_image_features: Tensor,
    whole_text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    whole_logit_scale: Tensor,
    whole_logit_bias: Tensor,
    offsets: Tensor | None,
) -> Tensor:
    """The hierarchical alignment loss of what `Caft.forward` returns."""
    captions = len(part_features) // len(fine_tokens)
    fine = (logit_scale, logit_bias, captions)
    return (
        published_loss(pool, fine_tokens, part_features, *fine, offsets)
        + published_sigmoid_loss(fine_features, part_features, *fine)
        + published_sigmoid_loss(
            whole_image_features, whole_text_features, whole_logit_scale, whole_logit_bias, 1
        )
    )


def _farthest_points(points: Tensor, num_samples: int, **options: Any) -> Tensor:
    return reference.farthest_point_sampling(points.double(), num_samples, **options)


@contextmanager
def published_ops(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's token ops and its attention are the plain ones."""
    plain = {
        "farthest_point_sampling": _farthest_points,
        "soft_cluster_pool": reference.soft_cluster_pool,
    }
    with ExitStack() as stack:
        for name, op in plain.items():
            stack.enter_context(mock.patch.object(graph_pool, name, op))
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                stack.enter_context(mock.patch.object(module, "fused_attn", False))
        yield

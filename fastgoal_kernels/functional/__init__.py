"""The public functions: check the inputs, choose a backend, call the op."""

from ..reference import PoolWeights
from .contrastive import clip_contrastive_loss, sigmoid_contrastive_loss
from .maxsim import (
    maxsim_alignment,
    maxsim_contrastive_loss,
    maxsim_scores,
    maxsim_topk,
    pack_tokens,
)
from .text_conditioned import (
    text_conditioned_loss_from_weights,
    text_conditioned_scores,
    text_conditioned_sigmoid_loss,
)
from .text_conditioned_retrieval import (
    hierarchical_scores,
    hierarchical_topk,
    text_conditioned_topk,
)
from .token_ops import (
    farthest_point_sampling,
    region_mean,
    soft_cluster_pool,
    span_mean,
    token_similarity_loss,
)

OPS = (
    "maxsim_scores",
    "maxsim_alignment",
    "maxsim_topk",
    "maxsim_contrastive_loss",
    "clip_contrastive_loss",
    "sigmoid_contrastive_loss",
    "text_conditioned_scores",
    "text_conditioned_sigmoid_loss",
    "text_conditioned_topk",
    "hierarchical_scores",
    "hierarchical_topk",
    "region_mean",
    "span_mean",
    "token_similarity_loss",
    "farthest_point_sampling",
    "soft_cluster_pool",
)

__all__ = [
    "OPS",
    "PoolWeights",
    "clip_contrastive_loss",
    "farthest_point_sampling",
    "hierarchical_scores",
    "hierarchical_topk",
    "maxsim_alignment",
    "maxsim_contrastive_loss",
    "maxsim_scores",
    "maxsim_topk",
    "pack_tokens",
    "region_mean",
    "sigmoid_contrastive_loss",
    "soft_cluster_pool",
    "span_mean",
    "text_conditioned_loss_from_weights",
    "text_conditioned_scores",
    "text_conditioned_sigmoid_loss",
    "text_conditioned_topk",
    "token_similarity_loss",
]

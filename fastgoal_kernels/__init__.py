"""FastGOAL's kernels: the losses of long-caption CLIP training, fused, as autograd functions.

>>> from fastgoal_kernels import maxsim_contrastive_loss
>>> loss = maxsim_contrastive_loss(image_tokens, text_tokens, logit_scale)

What each op means is in `fastgoal_kernels.reference`, in a few lines of eager PyTorch each.
"""

from .backends import BackendError, available_backends, explain_backend, use_backend
from .functional import (
    PoolWeights,
    clip_contrastive_loss,
    farthest_point_sampling,
    hierarchical_scores,
    hierarchical_topk,
    maxsim_alignment,
    maxsim_contrastive_loss,
    maxsim_scores,
    maxsim_topk,
    pack_tokens,
    region_mean,
    sigmoid_contrastive_loss,
    soft_cluster_pool,
    span_mean,
    text_conditioned_loss_from_weights,
    text_conditioned_scores,
    text_conditioned_sigmoid_loss,
    text_conditioned_topk,
    token_similarity_loss,
)
from .gradient_cache import cached_backward
from .integrations import (
    patch_hf_clip,
    patch_open_clip,
    patch_sentence_transformers,
    unpatch_hf_clip,
    unpatch_open_clip,
    unpatch_sentence_transformers,
)
from .modules import (
    ClipLoss,
    FastGoalLoss,
    HierarchicalAlignmentLoss,
    MaxSimLoss,
    SigLipLoss,
    TextConditionedPool,
    TextConditionedSigmoidLoss,
    TokenSimilarityLoss,
)
from .warmup import warmup

__version__ = "0.1.0.dev0"

__all__ = [
    "BackendError",
    "ClipLoss",
    "FastGoalLoss",
    "HierarchicalAlignmentLoss",
    "MaxSimLoss",
    "PoolWeights",
    "SigLipLoss",
    "TextConditionedPool",
    "TextConditionedSigmoidLoss",
    "TokenSimilarityLoss",
    "available_backends",
    "cached_backward",
    "clip_contrastive_loss",
    "explain_backend",
    "farthest_point_sampling",
    "hierarchical_scores",
    "hierarchical_topk",
    "maxsim_alignment",
    "maxsim_contrastive_loss",
    "maxsim_scores",
    "maxsim_topk",
    "pack_tokens",
    "patch_hf_clip",
    "patch_open_clip",
    "patch_sentence_transformers",
    "region_mean",
    "sigmoid_contrastive_loss",
    "soft_cluster_pool",
    "span_mean",
    "text_conditioned_loss_from_weights",
    "text_conditioned_scores",
    "text_conditioned_sigmoid_loss",
    "text_conditioned_topk",
    "token_similarity_loss",
    "unpatch_hf_clip",
    "unpatch_open_clip",
    "unpatch_sentence_transformers",
    "use_backend",
    "warmup",
]

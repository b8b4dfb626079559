"""The losses and the pool as modules: drop-in replacements for those of published trainers.

A loss called with output_dict=True returns its named parts, each already weighted, so that their
sum is the loss (the convention of open_clip's trainer, which sums the values).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .checks import check_choice
from .functional.contrastive import clip_contrastive_loss, sigmoid_contrastive_loss
from .functional.maxsim import maxsim_contrastive_loss
from .functional.text_conditioned import (
    pool_weights,
    text_conditioned_loss_from_weights,
    text_conditioned_scores,
    text_conditioned_sigmoid_loss,
)
from .functional.token_ops import token_similarity_loss
from .reference import PoolWeights


def _total(parts: dict[str, Tensor], output_dict: bool) -> Tensor | dict[str, Tensor]:
    if output_dict:
        return parts
    first, *others = parts.values()
    for part in others:
        first = first + part
    return first


def _check_captions(captions_per_image: int) -> None:
    if not isinstance(captions_per_image, int) or captions_per_image < 1:
        raise ValueError(f"captions_per_image must be a positive int; got {captions_per_image!r}")


# ---------------------------------------------------------------------------------------------
# Late interaction
# ---------------------------------------------------------------------------------------------


class MaxSimLoss(nn.Module):
    """The contrastive loss of late-interaction scores (FILIP, arXiv 2111.07783, equations 3 to 5).

    Logits are logit_scale * S + logit_bias, where S[i, j] is the mean, over the words of text j, of
    the best similarity with a region of image i ("text_to_image"), or the other way round; see
    `maxsim_contrastive_loss`.

    Args:
        objective: "softmax" (half of [rows + columns], targets on the diagonal) or "sigmoid".
        direction: "both", "text_to_image" or "image_to_text".
        captions_per_image: K of the sigmoid objective: text j belongs to image floor(j / K).
        normalize: divide every token by its length first.
        recompute: keep no winners for the backward, but find them again there.
        grad_filter_eps: skip pairs whose gradient falls below it; None = keep all.
    """

    def __init__(
        self,
        objective: str = "softmax",
        direction: str = "both",
        captions_per_image: int = 1,
        normalize: bool = False,
        recompute: bool = False,
        grad_filter_eps: float | None = None,
    ):
        super().__init__()
        check_choice("objective", objective, ("softmax", "sigmoid"))
        check_choice("direction", direction, ("both", "text_to_image", "image_to_text"))
        _check_captions(captions_per_image)
        if objective == "softmax" and captions_per_image != 1:
            raise ValueError(
                "objective='softmax' has one caption an image; got captions_per_image="
                f"{captions_per_image}. Fix: objective='sigmoid'"
            )
        self.objective = objective
        self.direction = direction
        self.captions_per_image = captions_per_image
        self.normalize = normalize
        self.recompute = recompute
        self.grad_filter_eps = grad_filter_eps

    def forward(
        self,
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
        pair_mask: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Image tokens (I, R, D) and text tokens (J, Q, D) -> 0-dim loss, float32 or float64.

        With `output_dict`, {"maxsim_loss": loss}. Masks, ragged offsets, `pair_mask` and the errors
        are those of `maxsim_contrastive_loss`.
        """
        loss = maxsim_contrastive_loss(
            image_tokens, text_tokens, logit_scale, logit_bias,
            image_mask=image_mask, text_mask=text_mask,
            image_offsets=image_offsets, text_offsets=text_offsets,
            max_image_tokens=max_image_tokens, max_text_tokens=max_text_tokens,
            captions_per_image=self.captions_per_image, pair_mask=pair_mask,
            objective=self.objective, direction=self.direction, normalize=self.normalize,
            recompute=self.recompute, grad_filter_eps=self.grad_filter_eps,
        )  # fmt: skip
        return _total({"maxsim_loss": loss}, output_dict)


# ---------------------------------------------------------------------------------------------
# Text-conditioned pooling
# ---------------------------------------------------------------------------------------------


class TextConditionedPool(nn.Module):
    """The attention pool of FLAIR (arXiv 2412.03561) and CAFT (arXiv 2602.02977).

    Multi-head attention of LN_q(query) over LN_k(key) and LN_v(value), with biased in and out
    projections and, after the in-projection, one more key and value of zeros, so that the weights
    of the real tokens sum to less than one. Parameter names and initial values are those of the
    published block, so that its checkpoints load: `attn.in_proj_weight`, `attn.in_proj_bias`,
    `attn.out_proj.weight`, `attn.out_proj.bias`, and `weight` and `bias` of `ln_q`, `ln_k`, `ln_v`.

    `scores` and `sigmoid_loss` read the parameters and do not call `attn`, `ln_q`, `ln_k`, `ln_v`
    or `forward`, so that forward hooks on those do not run. A subclass that changes the parameters
    first (with an adapter, for instance) overrides `weights`.

    Under FSDP2, shard the pool with the module in whose forward it is called. A pool that is
    sharded on its own is gathered for its `forward`, and for the other two after

        register_fsdp_forward_method(pool, "sigmoid_loss")  # the losses that take a pool
        register_fsdp_forward_method(pool, "scores")  # retrieval, hierarchical_scores

    of `torch.distributed.fsdp`.

    Args:
        embed_dim: D, of queries, keys, values and output.
        num_heads: attention heads; must divide D.
        add_zero_attn: the extra key and value of zeros.
    """

    def __init__(self, embed_dim: int, num_heads: int = 8, add_zero_attn: bool = True):
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim; got {num_heads} heads for {embed_dim}"
            )
        self.attn = nn.MultiheadAttention(
            embed_dim, num_heads, batch_first=True, add_zero_attn=add_zero_attn
        )
        self.ln_q = nn.LayerNorm(embed_dim)
        self.ln_k = nn.LayerNorm(embed_dim)
        self.ln_v = nn.LayerNorm(embed_dim)

    def weights(self) -> PoolWeights:
        """The parameters themselves, for the functions that take tensors.

        Raises:
            ValueError: a setting with which the module pools otherwise than its parameters say:
                `add_bias_kv`, dropout in training, layer norms of another eps than 1e-5.
        """
        return pool_weights(self)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The published block: query (B, Q, D), key and value (B, L, D) -> (B, Q, D).

        Shapes and errors are those of `torch.nn.MultiheadAttention` with `batch_first=True`.
        """
        pooled, _ = self.attn(
            self.ln_q(query), self.ln_k(key), self.ln_v(value), need_weights=False
        )
        return pooled

    def scores(
        self,
        image_tokens: Tensor,
        text_features: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_index: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Cosine of every caption with what it pools from every image.

        Args:
            image_tokens: (I, L, D) floating point.
            text_features: (J, D).
            image_mask: (I, L) bool, True = a real token.
            text_index: (I, P) integers, the captions to score with each image; default: all.
            backend: "triton", "torch" or "reference"; default: the best that serves the inputs.

        Returns:
            (I, J), or (I, P) with `text_index`: float32, or float64 for float64 input. See
            `fastgoal_kernels.text_conditioned_scores`.

        Raises:
            ValueError, TypeError: as that function, and as `weights`.
        """
        return text_conditioned_scores(
            image_tokens, text_features, self.weights(), self.attn.num_heads,
            add_zero_attn=self.attn.add_zero_attn, image_mask=image_mask, text_index=text_index,
            backend=backend,
        )  # fmt: skip

    def sigmoid_loss(
        self,
        image_tokens: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        **options: Any,
    ) -> Tensor:
        """`text_conditioned_sigmoid_loss` of this pool, which calls it: what FSDP2 can hook.

        Args:
            image_tokens: (N, L, D) floating point.
            text_features: (N * K, D).
            logit_scale, logit_bias: of the logits.
            options: `captions_per_image` and the other keywords of that function.

        Raises:
            ValueError, TypeError, RuntimeError: as that function.
        """
        return text_conditioned_loss_from_weights(
            image_tokens, text_features, self.weights(), self.attn.num_heads, logit_scale,
            logit_bias, add_zero_attn=self.attn.add_zero_attn, **options,
        )  # fmt: skip


class TextConditionedSigmoidLoss(nn.Module):
    """FLAIR's text-conditioned sigmoid loss (arXiv 2412.03561, equation 5), as CAFT uses it.

    -sum log sigmoid(y z) / columns, z = logit_scale * cos(o_ij, t_j) + logit_bias, where o_ij is
    what caption j pools from image i; see `text_conditioned_sigmoid_loss`.

    Args:
        captions_per_image: K; captions i * K to i * K + K - 1 belong to image i.
        negatives: "all" captions of other images, or "sample" one of each other image, as
            published. With "all" a positive weighs (N K) / (N + K - 1) times less.
    """

    def __init__(self, captions_per_image: int, negatives: str = "all"):
        super().__init__()
        _check_captions(captions_per_image)
        check_choice("negatives", negatives, ("all", "sample"))
        self.captions_per_image = captions_per_image
        self.negatives = negatives

    def forward(
        self,
        pool: nn.Module,
        image_tokens: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        *,
        negative_offsets: Tensor | None = None,
        negative_only: bool = False,
        image_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Image tokens (N, L, D) and text features (N * K, D) -> 0-dim loss, float32 or float64.

        With `output_dict`, {"text_conditioned_loss": loss}. The other arguments, and the errors,
        are those of `text_conditioned_sigmoid_loss`.
        """
        loss = text_conditioned_sigmoid_loss(
            pool, image_tokens, text_features, logit_scale, logit_bias,
            captions_per_image=self.captions_per_image, negatives=self.negatives,
            negative_offsets=negative_offsets, negative_only=negative_only,
            image_mask=image_mask, generator=generator,
        )  # fmt: skip
        return _total({"text_conditioned_loss": loss}, output_dict)


class HierarchicalAlignmentLoss(nn.Module):
    """CAFT's hierarchical alignment loss (arXiv 2602.02977), in its default, unweighted form.

    text-conditioned sigmoid loss of the fine tokens and all K captions of every image
    + multi-positive sigmoid loss of the fine global features and all K captions
    + sigmoid loss of the whole-image and the whole-caption features.

    The last two compare unit vectors (they normalise); fine and whole have their own scale and
    bias; nothing is detached. FLAIR takes half the sum of the first two.

    Args:
        captions_per_image: K, the part captions of an image.
        negatives: of the text-conditioned term: "all" or "sample"; see
            `TextConditionedSigmoidLoss`. CAFT trained with "sample".
    """

    def __init__(self, captions_per_image: int, negatives: str = "all"):
        super().__init__()
        self.text_conditioned = TextConditionedSigmoidLoss(captions_per_image, negatives)
        self.captions_per_image = captions_per_image
        self.negatives = negatives

    def forward(
        self,
        pool: nn.Module,
        fine_tokens: Tensor,
        fine_features: Tensor,
        part_features: Tensor,
        whole_image_features: Tensor,
        whole_text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        whole_logit_scale: Tensor | float,
        whole_logit_bias: Tensor | float,
        output_dict: bool = False,
        *,
        negative_offsets: Tensor | None = None,
        image_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim float32 (float64 for float64 input), or its three parts by name.

        Args:
            pool: a TextConditionedPool, or a published block of the same layout.
            fine_tokens: (N, L, D) floating point, e.g. the 64 tokens of CAFT's second stage.
            fine_features: (N, D), the global feature of that stage.
            part_features: (N * K, D), as the part encoder gives them, image by image.
            whole_image_features: (N, D).
            whole_text_features: (N, D).
            logit_scale: multiplier (already exponentiated) of the two fine terms.
            logit_bias: bias of the two fine terms; CAFT starts at -10.
            whole_logit_scale: multiplier of the whole term.
            whole_logit_bias: bias of the whole term.
            output_dict: {"text_conditioned_loss", "fine_loss", "whole_loss"} instead of their sum.
            negative_offsets: (N, N - 1) integers in [0, K): the sampled negatives, not drawn.
            image_mask: (N, L) bool, True = a real fine token.
            generator: draws the sampled negatives.

        Raises:
            ValueError, TypeError, RuntimeError: as `text_conditioned_sigmoid_loss` and
                `sigmoid_contrastive_loss`.
        """
        text_conditioned = self.text_conditioned(
            pool, fine_tokens, part_features, logit_scale, logit_bias,
            negative_offsets=negative_offsets, image_mask=image_mask, generator=generator,
        )  # fmt: skip
        fine = sigmoid_contrastive_loss(
            fine_features, part_features, logit_scale, logit_bias,
            captions_per_image=self.captions_per_image, normalize=True,
        )  # fmt: skip
        whole = sigmoid_contrastive_loss(
            whole_image_features, whole_text_features, whole_logit_scale, whole_logit_bias,
            normalize=True,
        )  # fmt: skip
        parts = {"text_conditioned_loss": text_conditioned, "fine_loss": fine, "whole_loss": whole}
        return _total(parts, output_dict)


# ---------------------------------------------------------------------------------------------
# FAST-GOAL
# ---------------------------------------------------------------------------------------------


class TokenSimilarityLoss(nn.Module):
    """FAST-GOAL's token similarity loss, TSL (arXiv 2605.26615, equation 14).

    mean over b of (cos(pooled_b, local_b) - 1)^2, or, for mode "matrix", the mean over all pairs of
    (cos(pooled_b, local_c) - [b = c])^2, which is the equation as printed.

    Args:
        mode: "diagonal" (what the published code trains with) or "matrix".
    """

    def __init__(self, mode: str = "diagonal"):
        super().__init__()
        check_choice("mode", mode, ("diagonal", "matrix"))
        self.mode = mode

    def forward(
        self, pooled: Tensor, local: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """pooled and local (N, D) -> 0-dim loss, or {"token_similarity_loss": loss}.

        Raises:
            ValueError, TypeError: as `token_similarity_loss`.
        """
        loss = token_similarity_loss(pooled, local, mode=self.mode)
        return _total({"token_similarity_loss": loss}, output_dict)


class FastGoalLoss(nn.Module):
    """FAST-GOAL's training loss (arXiv 2605.26615; predecessor GOAL, arXiv 2503.17782).

    global_weight * CLIP(image, caption) + local_weight * CLIP(region, sentence)
    + tsl_weight * [TSL(region patches, region embedding) + TSL(sentence words, sentence embedding)]

    with CLIP = `clip_contrastive_loss` and TSL = `token_similarity_loss` in its diagonal mode.

    Args:
        global_weight: of the image and caption term.
        local_weight: of the region and sentence term.
        tsl_weight: of the two token similarity terms.
    """

    def __init__(
        self, global_weight: float = 1.0, local_weight: float = 0.5, tsl_weight: float = 1.0
    ):
        super().__init__()
        self.global_weight = global_weight
        self.local_weight = local_weight
        self.tsl_weight = tsl_weight

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        local_image_features: Tensor,
        local_text_features: Tensor,
        region_features: Tensor,
        span_features: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim float32 (float64 for float64 input), or its four parts by name.

        Args:
            image_features: (N, D) of unit length: the images.
            text_features: (N, D) of unit length: their captions.
            local_image_features: (N, D) of unit length: the matched regions, encoded as crops.
            local_text_features: (N, D) of unit length: their sentences, encoded alone.
            region_features: (N, D), any length: mean of the image's patch tokens in the region
                (`region_mean`), through the tower's final norm and projection.
            span_features: (N, D), any length: mean of the caption's word tokens in the sentence
                (`span_mean`), likewise.
            logit_scale: the multiplier itself, of both contrastive terms.
            output_dict: {"global_loss", "local_loss", "region_tsl_loss", "span_tsl_loss"} instead
                of their sum, each with its weight in it.

        Raises:
            ValueError, TypeError: as `clip_contrastive_loss` and `token_similarity_loss`.
        """
        whole = clip_contrastive_loss(image_features, text_features, logit_scale)
        local = clip_contrastive_loss(local_image_features, local_text_features, logit_scale)
        region_tsl = token_similarity_loss(region_features, local_image_features)
        span_tsl = token_similarity_loss(span_features, local_text_features)
        parts = {
            "global_loss": self.global_weight * whole,
            "local_loss": self.local_weight * local,
            "region_tsl_loss": self.tsl_weight * region_tsl,
            "span_tsl_loss": self.tsl_weight * span_tsl,
        }
        return _total(parts, output_dict)


# ---------------------------------------------------------------------------------------------
# open_clip's losses
# ---------------------------------------------------------------------------------------------

_NO_HOROVOD = (
    "ClipLoss(use_horovod=True) is not served: the features travel over torch.distributed. "
    "Fix: launch with torchrun and use_horovod=False, or keep open_clip's own ClipLoss"
)


class ClipLoss(nn.Module):
    """open_clip's `ClipLoss`, constructor and forward, without the logits in memory.

    CLIP's loss (arXiv 2103.00020) by `clip_contrastive_loss`; over `world_size` processes as
    `distributed.clip_contrastive_loss` describes.

    Args:
        local_loss: each process computes its own rows of the logits only.
        gather_with_grad: differentiate through the gathering of the processes' features.
        cache_labels: accepted and without effect: no labels are ever built.
        rank: this process's rank.
        world_size: number of processes; above 1 they must form torch.distributed's default group.
        use_horovod: not served.

    Raises:
        NotImplementedError: use_horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise NotImplementedError(_NO_HOROVOD)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) features, 0-dim; with output_dict, {"contrastive_loss": loss}.

        Raises:
            RuntimeError: world_size > 1 without a process group.
            ValueError: rank and world_size are not the group's; shapes that do not fit.
        """
        # This function also serves open_clip's own instances, once patched: it may use no more
        # than the attributes they have, of which use_horovod can be set.
        if self.use_horovod:
            raise NotImplementedError(_NO_HOROVOD)
        if self.world_size > 1:
            distributed.check_group("ClipLoss", self.rank, self.world_size)
            loss = distributed.clip_contrastive_loss(
                image_features, text_features, logit_scale, logit_bias,
                local_loss=self.local_loss, gather_with_grad=self.gather_with_grad,
            )  # fmt: skip
        else:
            loss = clip_contrastive_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's `SigLipLoss`, constructor and forward, without the logits in memory.

    SigLIP's loss (arXiv 2303.15343), averaged over images, by `sigmoid_contrastive_loss`; over
    `world_size` processes as `distributed.sigmoid_contrastive_loss` describes.

    Args:
        cache_labels: accepted and without effect: no labels are ever built.
        rank: this process's rank.
        world_size: number of processes; above 1 they must form torch.distributed's default group.
        dist_impl: how texts travel: "bidir" (default), "shift", "reduce" or "gather".

    Raises:
        ValueError: an unknown dist_impl.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        check_choice("dist_impl", self.dist_impl, distributed.EXCHANGES)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of (N, D) features, 0-dim; with output_dict, {"contrastive_loss": loss}.

        Raises:
            RuntimeError: world_size > 1 without a process group.
            ValueError: rank and world_size are not the group's; shapes that do not fit.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size > 1:
            distributed.check_group("SigLipLoss", self.rank, self.world_size)
            loss = distributed.sigmoid_contrastive_loss(
                image_features, text_features, logit_scale, bias, exchange=self.dist_impl
            )
        else:
            loss = sigmoid_contrastive_loss(
                image_features, text_features, logit_scale, bias, average_over="images"
            )
        return {"contrastive_loss": loss} if output_dict else loss

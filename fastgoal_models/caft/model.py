"""CAFT (arXiv 2602.02977): images from fine to coarse, captions by part and whole, one alignment.

The fine tokens of an image meet every part of a caption through text-conditioned pooling, its fine
feature meets them directly, and the whole image meets the whole caption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip import SimpleTokenizer
from open_clip.transformer import Transformer
from torch import Tensor, nn

from fastgoal_kernels import TextConditionedPool

from .checkpoint import load_caft_weights
from .config import CaftConfig
from .text import ParagraphEncoder, causal_mask
from .vision import CaftVisual, Hierarchy

_FIRST_SCALE, _FIRST_BIAS = math.log(1 / 0.07), -10.0
_LARGEST_LOG_SCALE, _LARGEST_WHOLE_LOG_SCALE = math.log(100), 4.0


class CaftImage(NamedTuple):
    """What `Caft.encode_image` finds; nothing is normalised."""

    fine_tokens: Tensor
    """(N, K, E): the second stage's tokens"""
    fine_features: Tensor
    """(N, E): its CLS"""
    whole_features: Tensor
    """(N, E): the last CLS"""
    hierarchy: Hierarchy | None
    """who belongs to whom, where it was asked for"""


class CaftText(NamedTuple):
    """What `Caft.encode_text` finds; nothing is normalised."""

    part_features: Tensor
    """(N, K, E)"""
    whole_features: Tensor
    """(N, E)"""


class _Projection(nn.Module):
    """(..., D) -> (..., E), without bias."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


class Caft(nn.Module):
    """A CAFT model, ready for `fastgoal_kernels.HierarchicalAlignmentLoss`.

    Parameter names and shapes are those of a published checkpoint. Attributes: `config`;
    `tokenizer`, CLIP's BPE with this context.

    Args:
        config: sizes.
        superpixels: "sfcn" (CAFT's network, which is frozen and wants its published weights),
            "slic" or "grid".
        published: keep the published habits: see `CaftVisual`.
    """

    def __init__(self, config: CaftConfig, superpixels: str = "sfcn", published: bool = False):
        super().__init__()
        self.config = config
        text, width, dim = config.text, config.text.width, config.embed_dim
        self.visual = CaftVisual(config.vision, superpixels, published)
        self.visual_proj = TextConditionedPool(dim, config.pool_heads)
        self.token_embedding = nn.Embedding(text.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(text.context_length, width))
        self.transformer = Transformer(width, text.layers, text.heads)
        self.ln_final = nn.LayerNorm(width)
        self.register_buffer("attn_mask", causal_mask(text.context_length), persistent=False)
        self.paragraph_encoder = ParagraphEncoder(text)
        self.image_post = _Projection(config.vision.width, dim)
        self.image_post_coarse = _Projection(config.vision.width, dim)
        self.text_post = _Projection(width, dim)
        self.text_post_coarse = _Projection(width, dim)
        self.logit_scale = nn.Parameter(torch.tensor(_FIRST_SCALE))
        self.logit_bias = nn.Parameter(torch.tensor(_FIRST_BIAS))
        self.logit_scale_coarse = nn.Parameter(torch.tensor(_FIRST_SCALE))
        self.logit_bias_coarse = nn.Parameter(torch.tensor(_FIRST_BIAS))
        self._initialise()

    @classmethod
    def create(
        cls,
        config: str | Path | Mapping[str, Any] | CaftConfig = "caft-b",
        *,
        superpixels: str = "sfcn",
        published: bool = False,
    ) -> Caft:
        """With random weights, from a configuration's name, JSON file or contents.

        Raises ConfigError for a configuration that can not be built, ValueError for unknown
        superpixels.
        """
        return cls(CaftConfig.load(config), superpixels, published)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: str | Path | Mapping[str, Any] | CaftConfig = "caft-b",
        *,
        superpixels: str = "sfcn",
        published: bool = True,
    ) -> Caft:
        """With the weights of a state dict or of a file of one, also wrapped in a checkpoint.

        Every name and shape must agree. For superpixels other than "sfcn" the weights of the
        network are left out. `published` is on: released weights were trained with those habits.

        Raises:
            CheckpointError: names that are missing or too many, or shapes that differ, all listed;
                a file that can not be read without running code.
        """
        model = cls.create(config, superpixels=superpixels, published=published)
        load_caft_weights(model, Path(source) if isinstance(source, str) else source)
        return model

    def _initialise(self) -> None:
        """As open_clip starts a text transformer."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for tower in (self.transformer, self.paragraph_encoder.transformer):
            depth_std = tower.width**-0.5 * (2 * tower.layers) ** -0.5
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=tower.width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=depth_std)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * tower.width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=depth_std)

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """CLIP's byte-pair encoding, with the model's context."""
        return _tokenizer(self.config.text.context_length)

    def encode_image(self, images: Tensor, *, with_hierarchy: bool = False) -> CaftImage:
        """Images (N, 3, H, W), CLIP-normalised, H and W divisible by 16 -> CaftImage.

        Raises ValueError for another shape.
        """
        fine, whole, hierarchy = self.visual(images)
        fine = self.image_post(fine)
        return CaftImage(
            fine[:, 1:], fine[:, 0], self.image_post_coarse(whole),
            hierarchy if with_hierarchy else None,
        )  # fmt: skip

    def encode_parts(self, texts: Tensor) -> Tensor:
        """Texts (M, L) int64 -> part features (M, E); the end token is the highest of a row.

        Raises ValueError for texts longer than the context.
        """
        return self.text_post(self._ends(texts))

    def encode_text(self, texts: Tensor) -> CaftText:
        """Texts (N, K, L) int64 -> CaftText; the first `config.text.parts` of K make the whole.

        Raises ValueError for another shape, or fewer captions than parts.
        """
        parts = self.config.text.parts
        if texts.ndim != 3 or texts.shape[1] < parts:
            raise ValueError(
                f"texts must have shape (N, K, L) with at least {parts} captions an image; got "
                f"{tuple(texts.shape)}"
            )
        ends = self._ends(texts.flatten(0, 1)).unflatten(0, texts.shape[:2])
        whole = self.paragraph_encoder(ends[:, :parts])
        return CaftText(self.text_post(ends), self.text_post_coarse(whole))

    def _ends(self, texts: Tensor) -> Tensor:
        """(M, L) -> (M, D): the end token's output, through `ln_final`."""
        context = self.config.text.context_length
        if texts.ndim != 2 or texts.shape[1] > context:
            raise ValueError(
                f"texts must have shape (M, at most {context}); got {tuple(texts.shape)}"
            )
        length = texts.shape[1]
        x = self.token_embedding(texts) + self.positional_embedding[:length]
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        return self.ln_final(x[torch.arange(len(x), device=x.device), texts.argmax(dim=1)])

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Any]:
        """The arguments of `HierarchicalAlignmentLoss.forward`, by name; each tower runs once.

        Args:
            images: (N, 3, H, W), CLIP-normalised.
            texts: (N, K, L) int64, K captions an image.
        """
        image, text = self.encode_image(images), self.encode_text(texts)
        return {
            "pool": self.visual_proj,
            "fine_tokens": image.fine_tokens,
            "fine_features": image.fine_features,
            "part_features": text.part_features.flatten(0, 1),
            "whole_image_features": image.whole_features,
            "whole_text_features": text.whole_features,
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
            "whole_logit_scale": self.logit_scale_coarse.exp(),
            "whole_logit_bias": self.logit_bias_coarse,
        }

    @torch.no_grad()
    def clamp_scales_(self) -> None:
        """Keep the log-scales in [0, ln 100], the whole one in [0, 4], as CAFT trains."""
        self.logit_scale.clamp_(0, _LARGEST_LOG_SCALE)
        self.logit_scale_coarse.clamp_(0, _LARGEST_WHOLE_LOG_SCALE)


@cache
def _tokenizer(context_length: int) -> SimpleTokenizer:
    # Reading the merges takes longer than building a small model.
    return SimpleTokenizer(context_length=context_length)

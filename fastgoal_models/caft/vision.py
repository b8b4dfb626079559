"""CAFT's image encoder: superpixels, then ever fewer tokens, from fine to coarse."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .config import CaftVisionConfig
from .graph_pool import GraphPool
from .sfcn import Sfcn
from .superpixels import (
    CELL,
    STRIDE,
    Superpixels,
    grid_labels,
    sfcn_labels,
    slic_labels,
    superpixels,
)

SUPERPIXELS = ("sfcn", "slic", "grid")

# Of the stages' blocks the second's output is "fine".
_FINE_STAGE = 1

_norm: Any = partial(nn.LayerNorm, eps=1e-6)


class Hierarchy(NamedTuple):
    """Who belongs to whom in some images."""

    superpixels: Tensor
    """(N, H/8, W/8) int64: the superpixel of each cell of the encoder's grid"""
    assignments: tuple[Tensor, ...]
    """shares of each pool, (N, L, K) with rows that sum to 1: of L tokens in the K above them"""


class ConvStem(nn.Module):
    """Images (N, 3, H, W) -> grid (N, D, H/8, W/8): 3 x 3 convolutions, then one of 1 x 1."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs, stride in ((width // 8, 2), (width // 4, 2), (width // 2, 2), (width, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class CaftVisual(nn.Module):
    """The fine-to-coarse encoder; parameter names are those of a CAFT checkpoint.

    Args:
        config: sizes.
        kind: where superpixels come from: "sfcn", "slic" or "grid". The network's weights are part
            of the model only for "sfcn".
        published: two habits of the published code: the network's input is un-normalised with
            ImageNet's mean and deviation, and its BatchNorms follow the model's mode, so that they
            use, and drift with, each batch's statistics while the model trains.
    """

    def __init__(self, config: CaftVisionConfig, kind: str = "sfcn", published: bool = False):
        super().__init__()
        if kind not in SUPERPIXELS:
            raise ValueError(f"superpixels must be one of {SUPERPIXELS}; got {kind!r}")
        self.kind, self.published = kind, published
        width = config.width
        self.patch_embed = ConvStem(width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pe_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        side = config.image_size // STRIDE
        self.grid_size = (side, side)
        self.pos_embed = nn.Parameter(
            build_sincos2d_pos_embed([side, side], width, interleave_sin_cos=False)[None],
            requires_grad=False,
        )
        self.blocks = nn.ModuleList(
            Block(width, config.heads, qkv_bias=True, norm_layer=_norm)
            for _ in range(sum(config.layers))
        )
        self.layers = config.layers
        self.pools = nn.ModuleList(GraphPool(width, config.heads, n) for n in config.tokens)
        self.norm = _norm(width)
        self.norm_fine = _norm(width)
        if kind == "sfcn":
            self.superpixel_generator = Sfcn().requires_grad_(False)
        self.apply(_initialise)

    def train(self, mode: bool = True) -> CaftVisual:
        """As of every module; the superpixel network is frozen, its statistics, too."""
        super().train(mode)
        if self.kind == "sfcn" and not self.published:
            self.superpixel_generator.eval()
        return self

    def superpixels(self, images: Tensor) -> Superpixels:
        """The superpixels of images (N, 3, H, W), CLIP-normalised."""
        if self.kind == "grid":
            labels = grid_labels(images)
        elif self.kind == "slic":
            labels = slic_labels(images)
        else:
            labels = sfcn_labels(self.superpixel_generator, images, published=self.published)
        return superpixels(labels)

    def positions(self, grid: Tensor) -> Tensor:
        """(1, D, h, w): the fixed positions of a grid (N, D, h, w), bicubic for another size."""
        down, across = self.grid_size
        positions = self.pos_embed.unflatten(1, (down, across)).permute(0, 3, 1, 2)
        size = (grid.shape[2], grid.shape[3])
        if size == self.grid_size:
            return positions
        return F.interpolate(positions, size=size, mode="bicubic", align_corners=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Hierarchy]:
        """Images (N, 3, H, W) -> fine (N, 1 + K, D), CLS first; whole (N, D); who belongs to whom.

        Fine: the second stage's output through `norm_fine`. Whole: the last CLS through `norm`.
        H and W are divisible by 16.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % CELL or (
            images.shape[3] % CELL
        ):  # fmt: skip
            raise ValueError(
                f"images must have shape (N, 3, H, W) with H and W divisible by {CELL}; got "
                f"{tuple(images.shape)}"
            )
        segments = self.superpixels(images)
        grid = self.patch_embed(images)
        tokens = segments.means(grid + self.positions(grid))
        cls = (self.cls_token + self.pe_token).expand(len(images), -1, -1).to(tokens.dtype)
        live: Tensor | None = segments.live
        fine, first, assignments = tokens, 0, []
        for stage, depth in enumerate(self.layers):
            x = torch.cat([cls, tokens], dim=1)
            for block in self.blocks[first : first + depth]:
                x = block(x)
            first += depth
            cls, tokens = x[:, :1], x[:, 1:]
            if stage == _FINE_STAGE:
                fine = self.norm_fine(x)
            if stage < len(self.pools):
                cls, tokens, shares = self.pools[stage](cls, tokens, live)
                assignments.append(shares)
                live = None  # no token of a pool is padding
        return fine, self.norm(cls[:, 0]), Hierarchy(segments.labels, tuple(assignments))


def _initialise(module: nn.Module) -> None:
    """As timm's vision transformers start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

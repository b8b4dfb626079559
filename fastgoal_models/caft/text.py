"""CAFT's text side: an encoder of parts, and one of the whole caption above its parts."""

from __future__ import annotations

from collections import OrderedDict

import torch
from open_clip.transformer import LayerScale, Transformer
from torch import Tensor, nn

from .config import CaftTextConfig


def causal_mask(length: int) -> Tensor:
    """(length, length): 0 where a token may look, -inf after it."""
    return torch.full((length, length), -torch.inf).triu(1)


class _Adapter(nn.Module):
    """x + scale * MLP(x), the learned scale of each channel small at first."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        layers: dict[str, nn.Module] = {
            "c_fc": nn.Linear(width, hidden),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(hidden, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls = LayerScale(width, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ls(self.mlp(x))


class ParagraphEncoder(nn.Module):
    """Part features (N, parts, D) -> the feature of the whole caption (N, D).

    An adapter, a CLS appended last, learned positions, causal layers, LayerNorm of the last token.
    Names are those of a CAFT checkpoint.
    """

    def __init__(self, config: CaftTextConfig):
        super().__init__()
        width = config.width
        self.parts = config.parts
        self.adapter = _Adapter(width, config.adapter_width)
        self.cls_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, config.parts + 1, width))
        self.transformer = Transformer(width, config.whole_layers, config.heads)
        self.ln_final = nn.LayerNorm(width)
        self.register_buffer("attn_mask", causal_mask(config.parts + 1), persistent=False)

    def forward(self, parts: Tensor) -> Tensor:
        x = self.adapter(parts)
        x = torch.cat([x, self.cls_embed.expand(len(x), -1, -1).to(x.dtype)], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        return self.ln_final(self.transformer(x, attn_mask=self.attn_mask)[:, -1])

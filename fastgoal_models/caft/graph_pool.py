"""CAFT's pool between two stages: from L tokens to K, each a soft cluster around a sampled one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from fastgoal_kernels import farthest_point_sampling, soft_cluster_pool

_EXPANSION = 4
_DROPOUT = 0.1
_SHARPNESS = 5.0


class _NodeFeatures(nn.Module):
    """Tokens (N, L, D) that have seen each other, about their mean: what they are compared by."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        nodes = tokens + self.attn(self.norm(tokens))
        return nodes - nodes.mean(dim=1, keepdim=True) + self.bias


class _PoolBlock(nn.Module):
    def __init__(self, width: int, heads: int, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.centroid_fc = _NodeFeatures(width, heads)
        wide = _EXPANSION * width
        self.fc1 = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Dropout(_DROPOUT)
        )
        self.fc2 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, width))

    def forward(
        self, cls: Tensor, tokens: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sampled = sample_tokens(tokens, self.num_tokens, live)
        nodes = self.centroid_fc(tokens)
        centroids = _take(nodes, sampled)
        # Cosines in float32 or wider: under autocast, too, they are what decides who goes where.
        nodes, centroids = (F.normalize(_wide(x), dim=-1) for x in (nodes, centroids))
        with torch.autocast(tokens.device.type, enabled=False):
            logits = _SHARPNESS * nodes @ centroids.transpose(1, 2)
        pooled = soft_cluster_pool(self.fc1(tokens), logits)
        pooled = self.fc2(pooled) + _take(tokens, sampled)
        return self.fc2(self.fc1(cls)) + cls, pooled, logits.softmax(dim=-1)


class GraphPool(nn.Module):
    """L tokens to K: farthest points as centroids, tokens shared among them by cosine.

    Node features are x + Attn(LN x) less their mean, plus a bias; centroids are those of the K
    sampled tokens; a token's shares are the softmax of 5 cosines; a pooled token is the weighted
    mean of fc1(x) through fc2, plus the sampled token itself. CLS goes through fc1 and fc2 alone.
    Names are those of a CAFT checkpoint.

    Args:
        width: D.
        heads: of the attention among the tokens.
        num_tokens: K.
    """

    def __init__(self, width: int, heads: int, num_tokens: int):
        super().__init__()
        self.pool_block = _PoolBlock(width, heads, num_tokens)

    def forward(
        self, cls: Tensor, tokens: Tensor, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """cls (N, 1, D), tokens (N, L, D) -> cls, tokens (N, K, D), shares (N, L, K) summing to 1.

        `live` (N, L) bool, False = padding: the sampling alone looks at it.
        """
        return self.pool_block(cls, tokens, live)


@torch.no_grad()
def sample_tokens(tokens: Tensor, num_tokens: int, live: Tensor | None) -> Tensor:
    """(N, K) indices of the tokens farthest from each other and from their mean.

    Padding counts as the mean, so that it is not chosen while a token remains that is not like it.
    """
    tokens = _wide(tokens.detach())
    if live is None:
        mean = tokens.mean(dim=1, keepdim=True)
    else:
        weight = live.to(tokens.dtype)[..., None]
        mean = (tokens * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        tokens = torch.where(live[..., None], tokens, mean)
    chosen = farthest_point_sampling(torch.cat([mean, tokens], dim=1), num_tokens + 1)
    # The mean comes first and is dropped. It is chosen again where all tokens are alike.
    return (chosen[:, 1:] - 1).clamp_min(0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

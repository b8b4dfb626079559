"""Text-conditioned scores in plain PyTorch: exact on any device, a block of pairs at a time.

A block is a few images times a few captions. For each pair in it

    S = q k^T / sqrt(head_dim)   P = softmax([S, 0])   a = P v   o = W a + b   score = <o, t> / |o|

with the 0 and its zero value there only under add_zero_attn (as one more row of zeros in k and v).
Nothing of a block outlives it: the backward computes it again, which costs the forward once more
and no memory. A block's largest tensors hold about `_BLOCK_ELEMENTS` numbers each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import score_dtype
from .products import wide_product
from .text_conditioned_pool import Need, Pool, add_rows

# Per block tensor. On a CPU a block should stay in cache; on a GPU it should fill the device and
# be small beside the inputs.
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}


class _Heads:
    """The inputs laid out for the blocks: heads before rows, the row of zeros in place."""

    def __init__(self, pool: Pool):
        self.num_images, length, self.dim = pool.k.shape
        self.num_texts = pool.q.shape[0]
        self.num_heads = pool.num_heads
        self.head_dim = self.dim // pool.num_heads
        self.length = length
        self.dtype = pool.q.dtype  # of the products
        self.wide = score_dtype(pool.q.dtype)  # of softmax, norms, cosines and sums over blocks
        self.scale = self.head_dim**-0.5
        self.q = pool.q
        self.k = self._split(pool.k, pool.add_zero_attn)
        self.v = self._split(pool.v, pool.add_zero_attn)
        self.text = pool.text.to(self.wide)
        self.weight = pool.out_weight.to(self.dtype)
        self.bias = pool.out_bias.to(self.wide)
        self.empty = self.dead = None
        if pool.image_mask is not None:
            self.empty = ~pool.image_mask.any(dim=1)
            # The scores of an image without tokens are replaced by 0: let its softmax be finite.
            dead = ~(pool.image_mask | self.empty[:, None])
            self.dead = F.pad(dead, (0, int(pool.add_zero_attn)))[:, None, None, :]

    def _split(self, x: Tensor, add_zero: bool) -> Tensor:
        """(I, L, D) -> (I, H, L or L + 1, head_dim), contiguous."""
        x = F.pad(x, (0, 0, 0, int(add_zero))).unflatten(2, (self.num_heads, self.head_dim))
        return x.transpose(1, 2).contiguous()

    def merge(self, x: Tensor) -> Tensor:
        """(I, H, L or L + 1, head_dim) -> (I, L, D), the row of zeros dropped."""
        return x[:, :, : self.length].transpose(1, 2).flatten(2)

    def blocks(self, columns: int) -> Iterator[tuple[slice, slice]]:
        """Images and columns of each block; few images, many captions, to read q and W often."""
        if 0 in (self.num_images, columns, self.length, self.num_texts):
            return  # no pair, or no token to pool: the scores are 0
        budget = _BLOCK_ELEMENTS.get(self.q.device.type, _BLOCK_ELEMENTS["cuda"])
        pairs = max(1, budget // max(self.dim, self.num_heads * self.k.shape[2]))
        step_columns = min(columns, pairs)
        step_images = max(1, pairs // step_columns)
        for image in range(0, self.num_images, step_images):
            for column in range(0, columns, step_columns):
                yield (
                    slice(image, min(image + step_images, self.num_images)),
                    slice(column, min(column + step_columns, columns)),
                )


class _Block:
    """One block, computed: q (B, H, C, head_dim), weights p (B, H, C, L), a and o (B, C, D)."""

    def __init__(self, x: _Heads, images: slice, columns: slice, index: Tensor | None):
        self.k, self.v = x.k[images], x.v[images]
        count = self.k.shape[0]
        if index is None:
            q, self.text = x.q[None, columns].expand(count, -1, -1), x.text[None, columns]
        else:
            chosen = index[images, columns]
            q, self.text = x.q[chosen], x.text[chosen]
        q = q.unflatten(2, (x.num_heads, x.head_dim)).transpose(1, 2)
        self.q = q.contiguous()
        logits = (self.q @ self.k.mT).to(x.wide).mul_(x.scale)
        if x.dead is not None:
            logits.masked_fill_(x.dead[images], -torch.inf)
        self.p = logits.softmax(dim=-1).to(x.dtype)
        self.a = (self.p @ self.v).transpose(1, 2).flatten(2)
        # Wide: rounding o to half precision would be the largest error of the score.
        o = wide_product(self.a.flatten(0, 1), x.weight.T, x.bias)
        self.o = o.view(self.a.shape)
        norm = torch.linalg.vector_norm(self.o, dim=-1)
        # x / max(|x|, 1e-12), whose gradient has no term through |x| below 1e-12, and is 0 at 0.
        self.inverse = torch.where(norm > 0, norm.clamp_min(1e-12).reciprocal(), 0.0)
        self.through_norm = norm >= 1e-12
        self.score = (self.o * self.text).sum(dim=-1) * self.inverse
        if x.empty is not None:
            self.score = self.score.masked_fill(x.empty[images, None], 0)


def _index(pool: Pool, text_index: Tensor | None) -> Tensor | None:
    """Clamped, so that a bad caption index gives a bad score and no read out of bounds."""
    return None if text_index is None else text_index.clamp(0, max(pool.q.shape[0] - 1, 0))


def forward(pool: Pool, text_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos(o_ij, t_j): (I, J), or (I, P) for the captions text_index names; and no norms."""
    x, index = _Heads(pool), _index(pool, text_index)
    columns = x.num_texts if index is None else index.shape[1]
    scores = torch.zeros(x.num_images, columns, dtype=x.wide, device=pool.q.device)
    for images, captions in x.blocks(columns):
        scores[images, captions] = _Block(x, images, captions, index).score
    return scores, scores.new_empty(0)


def backward(
    pool: Pool,
    text_index: Tensor | None,
    grad: Tensor,
    scores: Tensor,
    norms: Tensor,
    need: Need,
) -> tuple[Tensor, ...]:
    """Gradients in the order of `Need`; those not needed have no elements."""
    x, index = _Heads(pool), _index(pool, text_index)
    grad = grad.to(x.wide)
    if x.empty is not None:
        grad = grad.masked_fill(x.empty[:, None], 0)
    size = _size(grad) if x.dtype == torch.float16 else None
    if size is not None:
        grad = grad / size

    def zeros_if(wanted: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if wanted else 0, dtype=x.wide, device=grad.device)

    d_q = zeros_if(need.q, x.num_texts, x.dim)
    d_k, d_v = zeros_if(need.k, *x.k.shape), zeros_if(need.v, *x.v.shape)
    d_text = zeros_if(need.text, x.num_texts, x.dim)
    d_weight, d_bias = zeros_if(need.out_weight, x.dim, x.dim), zeros_if(need.out_bias, x.dim)
    need_attention = need.q or need.k

    for images, columns in x.blocks(grad.shape[1]):
        block = _Block(x, images, columns, index)
        captions = columns if index is None else index[images, columns]
        g = grad[images, columns] * block.inverse
        if need.text:
            add_rows(d_text, captions, block.o * g[..., None])
        # d<o, t>/|o|: t / |o| - score * o / |o|^2
        shrink = g * block.score * block.inverse * block.through_norm
        d_o = torch.addcmul(block.text * g[..., None], block.o, shrink[..., None], value=-1)
        d_o = d_o.to(x.dtype).flatten(0, 1)
        if need.out_bias:
            d_bias += d_o.sum(dim=0, dtype=x.wide)
        if need.out_weight:
            d_weight += wide_product(d_o.T, block.a.flatten(0, 1))
        if not (need_attention or need.v):
            continue
        d_a = (d_o @ x.weight).view(block.a.shape).unflatten(2, (x.num_heads, x.head_dim))
        d_a = d_a.transpose(1, 2).contiguous()
        if need.v:
            d_v[images] += block.p.mT @ d_a
        if not need_attention:
            continue
        # Softmax: dS = P (dP - sum P dP), the scale of S included.
        d_p = (d_a @ block.v.mT).to(x.wide)
        p = block.p.to(x.wide)
        d_p -= (d_p * p).sum(dim=-1, keepdim=True)
        d_s = (d_p * p).mul_(x.scale).to(x.dtype)
        if need.k:
            d_k[images] += d_s.mT @ block.q
        if need.q:
            d_queries = (d_s @ block.k).transpose(1, 2).flatten(2).to(x.wide)
            add_rows(d_q, captions, d_queries)

    d_k, d_v = (x.merge(d) if wanted else d for d, wanted in ((d_k, need.k), (d_v, need.v)))
    found = (d_q, d_k, d_v, d_text, d_weight, d_bias)
    if size is not None:
        found = tuple(gradient * size for gradient in found)
    given = (pool.q, pool.k, pool.v, pool.text, pool.out_weight, pool.out_bias)
    return tuple(gradient.to(of.dtype) for gradient, of in zip(found, given, strict=True))


def _size(grad: Tensor) -> Tensor:
    """The power of two below the largest of them, without a look from the host; 1 if there is none.

    Float16 has no room for the gradients of a large batch, but for what they are times the largest.
    A power of two changes no other bit.
    """
    largest = grad.abs().amax() if grad.numel() else grad.new_zeros(())
    _, exponent = torch.frexp(largest)
    size = torch.ldexp(grad.new_ones(()), exponent - 1)
    return torch.where((largest > 0) & largest.isfinite(), size, 1.0)

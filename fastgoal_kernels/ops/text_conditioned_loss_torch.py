"""The one-pass text-conditioned loss in plain PyTorch: image by image, some captions at a time.

Equal inputs give equal bits: images and blocks are visited in order, and no sum is left to atomics.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import sum_of_products, wide_product
from .text_conditioned_pool import add_rows

# Numbers in the largest tensor of a block: in cache on a CPU, enough to fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}

# Rows of tokens whose keys and values are made together, for a product worth its name.
_GROUP_ROWS = 512

# Of the gradient of G, (n + 1) / 2n is made in n blocks; more make the products too small.
_TRIANGLE_BLOCKS = 4

# Below this share of its terms' magnitudes |o|^2 has lost two digits, and o is made itself.
_CANCELS = 1e-2


class Inputs(NamedTuple):
    """What the operator is given."""

    q: Tensor
    tokens: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    text: Tensor
    out_weight: Tensor
    out_bias: Tensor
    scale: Tensor
    bias: Tensor
    image_mask: Tensor | None
    text_index: Tensor | None
    num_heads: int
    add_zero_attn: bool
    captions_per_image: int


class Need(NamedTuple):
    """Which gradients are wanted."""

    q: bool
    tokens: bool
    k_weight: bool
    k_bias: bool
    v_weight: bool
    v_bias: bool
    text: bool
    out_weight: bool
    out_bias: bool
    scale: bool
    bias: bool


class _Gradients:
    """Sums over pairs, zero at first; without elements where nobody wants them."""

    q: Tensor
    tokens: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    text: Tensor
    out_weight: Tensor
    out_bias: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, x: Inputs, need: Need):
        for name, wanted in need._asdict().items():
            shape = getattr(x, name).shape if wanted else 0
            setattr(self, name, x.scale.new_zeros(shape))

    def all(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in Need._fields)


class _Projection:
    """What scores are made of in place of o = W a + b, and the gradients of that."""

    def __init__(self, x: Inputs):
        self.weight, self.bias, self.text = x.out_weight, x.out_bias, x.text
        self.u, self.c = x.text @ x.out_weight, x.text @ x.out_bias
        self.gram, self.h = x.out_weight.T @ x.out_weight, x.out_bias @ x.out_weight
        self.e = x.out_bias @ x.out_bias
        self.d_u, self.d_c, self.d_gram, self.d_h, self.d_e = map(
            torch.zeros_like, (self.u, self.c, self.gram, self.h, self.e)
        )

    def scores_and_norms(
        self, a: Tensor, u: Tensor, captions: slice | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(<o, t>, |o|, y = W'o) of rows a."""
        y = wide_product(a.flatten(0, 1), self.gram, self.h).view(a.shape)
        along_t = torch.linalg.vecdot(a, u) + self.c[captions]
        whole_y, along_h = torch.linalg.vecdot(a, y), a @ self.h
        square = whole_y + along_h + self.e
        # Where the terms cancel, o is made after all.
        size = (whole_y - along_h).abs() + 2 * along_h.abs() + self.e
        pair = (square < _CANCELS * size).nonzero(as_tuple=True)
        if len(pair[0]):
            o = a[pair] @ self.weight.T + self.bias
            square[pair] = o.square().sum(dim=1)
            y[pair] = o @ self.weight
        return along_t, square.clamp_min(0).sqrt(), y

    def add(self, captions: slice | Tensor, a: Tensor, to_text: Tensor, to_y: Tensor) -> None:
        """dL/da = to_text u - to_y y, whose other side this is: of u, c, G, h and e."""
        if isinstance(captions, slice):
            for rows, factors in zip(a, to_text, strict=True):
                self.d_u[captions].addcmul_(rows, factors[:, None])
        else:
            add_rows(self.d_u, captions, a * to_text[..., None])
        add_rows(self.d_c, captions, to_text)
        a, to_y = a.flatten(0, 1), to_y.flatten()
        # G is symmetric, and so is its gradient: minus half of the sum of to_y a a'. Most of what
        # stands below the diagonal waits for `finish`. Blocks of columns, not of rows: the BLAS
        # needs half the time for them (MKL on an EPYC with AVX2).
        weighted = a * (-0.5 * to_y)[:, None]
        for columns in _slices(0, a.shape[1], -(-a.shape[1] // _TRIANGLE_BLOCKS)):
            above = slice(0, columns.stop)
            sum_of_products(self.d_gram[above, columns], weighted[:, above].T, a[:, columns])
        self.d_h -= to_y @ a
        self.d_e -= to_y.sum() / 2

    def finish(self, out: _Gradients, need: Need) -> None:
        """All pairs have been seen."""
        self.d_gram = self.d_gram.triu() + self.d_gram.triu(1).T
        if need.text:
            torch.addmm(self.d_c[:, None] * self.bias, self.d_u, self.weight.T, out=out.text)
        if need.out_weight:
            out.out_weight.addmm_(self.text.T, self.d_u).addmm_(self.weight, self.d_gram, alpha=2)
            out.out_weight.addr_(self.bias, self.d_h)
        if need.out_bias:
            torch.addmv(2 * self.d_e * self.bias, self.weight, self.d_h, out=out.out_bias)
            out.out_bias += self.d_c @ self.text


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., n, D) -> (..., heads, n, head_dim), contiguous."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2).contiguous()


def _merged(x: Tensor) -> Tensor:
    """(..., heads, n, head_dim) -> (..., n, D), contiguous."""
    return x.transpose(-3, -2).flatten(-2)


class _Images:
    """Some images' keys and values, and what the captions give to their gradients."""

    def __init__(self, x: Inputs, which: slice, alive: Tensor | None):
        self.x, self.which, self.tokens = x, which, x.tokens[which]
        self.count, self.length, dim = self.tokens.shape
        self.normal, self.mean, self.rstd = torch.native_layer_norm(
            self.tokens, (dim,), None, None, 1e-5
        )
        self.normal = self.normal.flatten(0, 1)
        self.k = self._made(x.k_weight, x.k_bias)
        self.v = self._made(x.v_weight, x.v_bias)
        self.alive = self.dead = None
        if x.image_mask is not None and alive is not None:
            self.alive = alive[which, None]
            # The scores of an image without tokens are replaced by 0: let its softmax be finite.
            dead = ~(x.image_mask[which] | ~self.alive)
            self.dead = F.pad(dead, (0, int(x.add_zero_attn)))[:, None, None, :]
        self.d_k, self.d_v = torch.zeros_like(self.k), torch.zeros_like(self.v)

    def _made(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(images, heads, tokens, head_dim), a token of zeros behind the others if asked for."""
        rows = wide_product(self.normal, weight.T, bias).view(self.tokens.shape)
        return F.pad(_heads(rows, self.x.num_heads), (0, 0, 0, int(self.x.add_zero_attn)))

    def finish(self, out: _Gradients, need: Need) -> None:
        """All captions have been seen."""
        d_k, d_v = (_merged(d[:, :, : self.length]).flatten(0, 1) for d in (self.d_k, self.d_v))
        if need.k_weight:
            out.k_weight.addmm_(d_k.T, self.normal)
        if need.v_weight:
            out.v_weight.addmm_(d_v.T, self.normal)
        if need.k_bias:
            out.k_bias += d_k.sum(dim=0)
        if need.v_bias:
            out.v_bias += d_v.sum(dim=0)
        if need.tokens:
            d_normal = (d_k @ self.x.k_weight).addmm_(d_v, self.x.v_weight).view_as(self.tokens)
            out.tokens[self.which] = torch.ops.aten.native_layer_norm_backward(
                d_normal, self.tokens, self.tokens.shape[2:], self.mean, self.rstd, None, None,
                [True, False, False],
            )[0]  # fmt: skip


class _Block:
    """The scores of some images with some captions, and the way back from them."""

    def __init__(
        self, images: _Images, part: slice, q: Tensor, captions: slice | Tensor,
        projection: _Projection,
    ):  # fmt: skip
        self.images, self.part, self.heads = images, part, len(q)
        self.queries = q[:, captions]
        if not isinstance(captions, slice):
            self.queries = self.queries.transpose(0, 1)
        logits = self.queries @ images.k[part].mT
        if images.dead is not None:
            logits.masked_fill_(images.dead[part], -torch.inf)
        self.weights = logits.softmax(dim=-1)
        self.a = _merged(self.weights @ images.v[part])
        self.u = projection.u[captions]
        along, self.norm, self.y = projection.scores_and_norms(self.a, self.u, captions)
        # x / max(|x|, 1e-12), and 0 at 0.
        self.inverse = torch.where(self.norm > 0, self.norm.clamp_min(1e-12).reciprocal(), 0.0)
        if images.alive is not None:
            self.inverse = self.inverse * images.alive[part]
        self.score = along * self.inverse

    def of_a(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        """dL/da = to_text u - to_y y: the two factors, of dL/dscore.

        d<o, t>/|o| is (u - score y / |o|) / |o|, without the second term where |o| < 1e-12.
        """
        to_text = slope * self.inverse
        return to_text, to_text * self.score * self.inverse * (self.norm >= 1e-12)

    def d_logits(self, to_text: Tensor, to_y: Tensor, need_kv: bool) -> Tensor:
        """dL/d(q k), in whose making y is lost; on its way what the keys and values are given."""
        d_a = self.y.mul_(-to_y[..., None]).addcmul_(self.u, to_text[..., None])
        d_a = _heads(d_a, self.heads)
        del self.a, self.y
        d_logits = torch.ops.aten._softmax_backward_data(
            d_a @ self.images.v[self.part].mT, self.weights, -1, d_a.dtype
        )
        if need_kv:
            _add_products(self.images.d_v[self.part], self.weights.mT, d_a)
            _add_products(self.images.d_k[self.part], d_logits.mT, self.queries.expand_as(d_a))
        return d_logits


def loss_and_gradients(x: Inputs, need: Need) -> tuple[Tensor, ...]:
    """The sum of softplus(-y z), then the gradients in the order of `Need`."""
    num_images, length, dim = x.tokens.shape
    num_texts, heads = len(x.q), x.num_heads
    columns = num_texts if x.text_index is None else x.text_index.shape[1]
    total, out = x.scale.new_zeros(()), _Gradients(x, need)
    if 0 in (num_images, columns, num_texts):
        return total, *out.all()
    budget = _BLOCK_ELEMENTS.get(x.q.device.type, _BLOCK_ELEMENTS["cuda"])
    pairs = max(budget // max(dim, heads * (length + 1)), 1)
    step = -(-columns // -(-columns // pairs))  # blocks of one size
    images_a_block = max(pairs // step, 1)

    q = _heads(x.q * (dim // heads) ** -0.5, heads)
    d_q = torch.zeros_like(q) if need.q and x.text_index is None else None
    alive = None if x.image_mask is None else x.image_mask.any(dim=1)
    need_kv = need.tokens or need.k_weight or need.k_bias or need.v_weight or need.v_bias
    need_projection = need.text or need.out_weight or need.out_bias
    projection = _Projection(x)
    every_text = torch.arange(num_texts, device=x.q.device)
    groups = _slices(0, num_images, max(_GROUP_ROWS // max(length, 1), images_a_block))
    for group in groups:
        images = _Images(x, group, alive) if length else None
        blocks = product(
            _slices(group.start, group.stop, images_a_block), _slices(0, columns, step)
        )
        for which, place in blocks:
            numbers = torch.arange(which.start, which.stop, device=x.q.device)[:, None]
            part = slice(which.start - group.start, which.stop - group.start)
            if x.text_index is None:
                captions, own = place, every_text[place]
            else:
                captions = own = x.text_index[which, place].clamp(0, num_texts - 1)
            positive = own // max(x.captions_per_image, 1) == numbers
            # y = 1 for an image's own captions, else -1.
            minus_y = 1.0 - 2.0 * (positive & (x.captions_per_image > 0)).to(x.scale.dtype)

            block, score = None, torch.zeros_like(minus_y)
            if images is not None:  # else there is no token to pool, and every score is 0
                block = _Block(images, part, q, captions, projection)
                score = block.score
            minus_yz = (x.scale * score + x.bias) * minus_y
            # Above 40 the logarithm adds less than half a bit of float64.
            total += F.softplus(minus_yz, threshold=40).sum()
            if not any(need):
                continue
            slope = minus_yz.sigmoid_() * minus_y
            if need.scale:
                out.scale += (slope * score).sum()
            if need.bias:
                out.bias += slope.sum()
            if block is None or not (need.q or need_kv or need_projection):
                continue
            to_text, to_y = block.of_a(slope * x.scale)
            if need_projection:
                projection.add(captions, block.a, to_text, to_y)
            if not (need.q or need_kv):
                continue
            d_logits, keys = block.d_logits(to_text, to_y, need_kv), block.images.k[part]
            if d_q is not None:
                for of_logits, of_image in zip(d_logits, keys, strict=True):
                    d_q[:, place].baddbmm_(of_logits, of_image)
            elif need.q:
                add_rows(out.q, captions, _merged(d_logits @ keys))
        if images is not None and need_kv:
            images.finish(out, need)
    if d_q is not None:
        out.q = _merged(d_q)
    if need.q:
        out.q = out.q.mul_((dim // heads) ** -0.5)
    if need_projection:
        projection.finish(out, need)
    return total, *out.all()


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, all (images, heads, ., .)."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))

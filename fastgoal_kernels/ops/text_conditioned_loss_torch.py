"""The one-pass text-conditioned loss in plain PyTorch: image by image, some captions at a time.

Equal inputs give equal bits: images and blocks are visited in order, and no sum is left to atomics.
"""

from __future__ import annotations

from math import prod
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


class _Workspace:
    """Room for the large tensors of a block, reused by the next.

    Fresh memory costs a CPU a page fault every 4 KB, several times what a pass over it does.
    """

    def __init__(self, like: Tensor):
        self._like = like
        self._room: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape with anything in it, until the next call of that name."""
        room, size = self._room.get(name), prod(shape)
        if room is None or len(room) < size:
            room = self._room[name] = self._like.new_empty(size)
        return room[:size].view(shape)


class _Projection:
    """What scores are made of in place of o = W a + b, and the gradients of that."""

    def __init__(self, x: Inputs, workspace: _Workspace):
        self.workspace = workspace
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
        product = self.workspace("logits", *a.shape)
        along_t = torch.mul(a, u, out=product).sum(dim=-1) + self.c[captions]
        if not _may_ask(a.device):
            o = wide_product(a.flatten(0, 1), self.weight.T, self.bias)
            norm = torch.linalg.vector_norm(o, dim=-1).view(along_t.shape)
            return along_t, norm, (o @ self.weight).view(a.shape)
        y = wide_product(a.flatten(0, 1), self.gram, self.h).view(a.shape)
        whole_y, along_h = torch.mul(a, y, out=product).sum(dim=-1), a @ self.h
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
        product = self.workspace("logits", *a.shape)
        if isinstance(captions, slice):
            for rows, factors in zip(a, to_text, strict=True):
                self.d_u[captions].addcmul_(rows, factors[:, None])
        else:
            add_rows(self.d_u, captions, torch.mul(a, to_text[..., None], out=product))
        add_rows(self.d_c, captions, to_text)
        a, to_y, product = a.flatten(0, 1), to_y.flatten(), product.flatten(0, 1)
        # G is symmetric, and so is its gradient: minus half of the sum of to_y a a'. Most of what
        # stands below the diagonal waits for `finish`. Blocks of columns, not of rows: the BLAS
        # needs half the time for them (MKL on an EPYC with AVX2).
        weighted = torch.mul(a, (-0.5 * to_y)[:, None], out=product)
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


def _may_ask(device: torch.device) -> bool:
    """Which pairs cancel, a GPU would have to tell, and the host to wait: there all make their o.

    That is D² more a pair, and lets a step be captured as a CUDA graph.
    """
    return device.type == "cpu"


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """(..., n, D) -> (..., heads, n, head_dim), the same memory."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def _merged(x: Tensor) -> Tensor:
    """(..., heads, n, head_dim) -> (..., n, D), contiguous."""
    return x.transpose(-3, -2).flatten(-2)


def _attention_weights(logits: Tensor, add_zero_attn: bool, out: Tensor) -> Tensor:
    """Softmax over the last dimension; of tokens and one more of logit 0, whose weight is left out.

    That token's key and value are zeros and its weight is wanted nowhere, so it takes no place in
    any product: 65 tokens need a quarter more time than 64 (MKL on an EPYC with AVX-512).
    """
    torch.ops.aten._softmax.out(logits, -1, False, out=out)
    if add_zero_attn:
        # All tokens together against a zero: the log of their sum, sigmoid. The largest weight is
        # exp(largest logit) / sum.
        largest, weight = (x.amax(dim=-1, keepdim=True) for x in (logits, out))
        out *= (largest - weight.log_()).sigmoid_()
    return out


class _Images:
    """Some images' keys and values, and what the captions give to their gradients."""

    def __init__(self, x: Inputs, which: slice, alive: Tensor | None):
        self.x, self.which, self.tokens = x, which, x.tokens[which]
        _, self.length, self.dim = self.tokens.shape
        self.normal, self.mean, self.rstd = torch.native_layer_norm(
            self.tokens, (self.dim,), None, None, 1e-5
        )
        self.normal = self.normal.flatten(0, 1)
        self.k = self._made(x.k_weight, x.k_bias)
        self.v = self._made(x.v_weight, x.v_bias)
        self.alive = self.dead = None
        if x.image_mask is not None and alive is not None:
            self.alive = alive[which, None]
            # The scores of an image without tokens are replaced by 0: let its softmax be finite.
            self.dead = ~(x.image_mask[which] | ~self.alive)[:, None, None, :]
        self.d_k, self.d_v = torch.zeros_like(self.k), torch.zeros_like(self.v)

    def _made(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(images, heads, tokens, head_dim)."""
        rows = wide_product(self.normal, weight.T, bias).view(self.tokens.shape)
        return _by_head(rows, self.x.num_heads).contiguous()

    def finish(self, out: _Gradients, need: Need) -> None:
        """All captions have been seen."""
        d_k, d_v = (_merged(d).flatten(0, 1) for d in (self.d_k, self.d_v))
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
        self, images: _Images, part: slice, queries: Tensor, captions: slice | Tensor,
        projection: _Projection, workspace: _Workspace,
    ):  # fmt: skip
        self.k, self.v = images.k[part], images.v[part]
        self.d_k, self.d_v = images.d_k[part], images.d_v[part]
        self.queries, self.workspace = queries, workspace
        count, self.heads, columns, head_dim = queries.shape
        self.softmax_scale = head_dim**-0.5

        logits = workspace("logits", count, self.heads, columns, images.length)
        for of_image, q, k in zip(logits, queries, self.k, strict=True):
            torch.baddbmm(of_image, q, k.mT, beta=0, alpha=self.softmax_scale, out=of_image)
        if images.dead is not None:
            logits.masked_fill_(images.dead[part], -torch.inf)
        self.weights = workspace("weights", *logits.shape)
        _attention_weights(logits, images.x.add_zero_attn, out=self.weights)
        by_head = workspace("by_head", *queries.shape)
        torch.bmm(self.weights.flatten(0, 1), self.v.flatten(0, 1), out=by_head.flatten(0, 1))
        self.a = workspace("a", count, columns, images.dim)
        _by_head(self.a, self.heads).copy_(by_head)

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
        """dL/d(q k), (images, heads, captions, tokens); on its way what keys and values are given.

        The workspace's weighted values and logits have served, and make room.
        """
        y, u = _by_head(self.y, self.heads), _by_head(self.u, self.heads)
        d_a = self.workspace("by_head", *y.shape)
        torch.mul(y, -to_y[:, None, :, None], out=d_a).addcmul_(u, to_text[:, None, :, None])
        d_weights = self.workspace("logits", *self.weights.shape)
        torch.bmm(d_a.flatten(0, 1), self.v.mT.flatten(0, 1), out=d_weights.flatten(0, 1))
        d_logits = self.workspace("a", *d_weights.shape)
        torch.ops.aten._softmax_backward_data.out(
            d_weights, self.weights, -1, d_weights.dtype, grad_input=d_logits
        )
        if need_kv:
            self.d_v.flatten(0, 1).baddbmm_(self.weights.mT.flatten(0, 1), d_a.flatten(0, 1))
            for total, of_logits, q in zip(self.d_k, d_logits, self.queries, strict=True):
                total.baddbmm_(of_logits.mT, q, alpha=self.softmax_scale)
        return d_logits


class _Sums:
    """The loss, and the gradients of all inputs, over the pairs seen so far."""

    def __init__(self, x: Inputs, need: Need):
        self.x, self.need = x, need
        self.q, self.d_q = _by_head(x.q, x.num_heads), None
        if need.q and x.text_index is None:  # all images add to the same queries, head by head
            self.d_q = torch.zeros_like(self.q, memory_format=torch.contiguous_format)
        self.total = x.scale.new_zeros(())
        self.out = _Gradients(x, need._replace(q=need.q and self.d_q is None))
        self.need_kv = (
            need.tokens or need.k_weight or need.k_bias or need.v_weight or need.v_bias
        )  # fmt: skip
        self.need_projection = need.text or need.out_weight or need.out_bias
        self.workspace = _Workspace(x.q)
        self.projection = _Projection(x, self.workspace)
        self.every_text = torch.arange(len(x.q), device=x.q.device)
        self.alive = None if x.image_mask is None else x.image_mask.any(dim=1)

    def add_images(self, group: slice, images_a_block: int, captions: list[slice]) -> None:
        """Some images, and all captions that they meet."""
        images = _Images(self.x, group, self.alive) if self.x.tokens.shape[1] else None
        for which in _slices(group.start, group.stop, images_a_block):
            for place in captions:
                self.add(images, group.start, which, place)
        if images is not None and self.need_kv:
            images.finish(self.out, self.need)

    def add(self, images: _Images | None, start: int, which: slice, place: slice) -> None:
        """A block: some of the images, which begin with number `start`, and some captions."""
        x, need, out = self.x, self.need, self.out
        numbers = torch.arange(which.start, which.stop, device=x.q.device)[:, None]
        if x.text_index is None:
            captions, own = place, self.every_text[place]
            queries = self.q[:, place].expand(len(numbers), -1, -1, -1)
        else:
            captions = own = x.text_index[which, place].clamp(0, len(x.q) - 1)
            queries = self.q[:, captions].transpose(0, 1)
        positive = own // max(x.captions_per_image, 1) == numbers
        # y = 1 for an image's own captions, else -1.
        minus_y = 1.0 - 2.0 * (positive & (x.captions_per_image > 0)).to(x.scale.dtype)

        block, score = None, torch.zeros_like(minus_y)
        if images is not None:  # else there is no token to pool, and every score is 0
            part = slice(which.start - start, which.stop - start)
            block = _Block(images, part, queries, captions, self.projection, self.workspace)
            score = block.score
        minus_yz = (x.scale * score + x.bias) * minus_y
        # Above 40 the logarithm adds less than half a bit of float64.
        self.total += F.softplus(minus_yz, threshold=40).sum()
        if not any(need):
            return
        slope = minus_yz.sigmoid_() * minus_y
        if need.scale:
            out.scale += (slope * score).sum()
        if need.bias:
            out.bias += slope.sum()
        if block is None or not (need.q or self.need_kv or self.need_projection):
            return
        to_text, to_y = block.of_a(slope * x.scale)
        if self.need_projection:
            self.projection.add(captions, block.a, to_text, to_y)
        if not (need.q or self.need_kv):
            return
        d_logits = block.d_logits(to_text, to_y, self.need_kv)
        if self.d_q is None:
            if need.q:
                add_rows(out.q, captions, _merged(d_logits @ block.k))
        else:
            for of_logits, of_image in zip(d_logits, block.k, strict=True):
                self.d_q[:, place].baddbmm_(of_logits, of_image)

    def finish(self) -> tuple[Tensor, ...]:
        """All pairs have been seen: the loss and the gradients in the order of `Need`."""
        if self.need.q:
            if self.d_q is not None:
                self.out.q = _merged(self.d_q)
            self.out.q *= self.q.shape[-1] ** -0.5
        if self.need_projection:
            self.projection.finish(self.out, self.need)
        return self.total, *self.out.all()


def loss_and_gradients(x: Inputs, need: Need) -> tuple[Tensor, ...]:
    """The sum of softplus(-y z), then the gradients in the order of `Need`."""
    num_images, length, dim = x.tokens.shape
    columns = len(x.q) if x.text_index is None else x.text_index.shape[1]
    if 0 in (num_images, columns, len(x.q)):
        return x.scale.new_zeros(()), *_Gradients(x, need).all()
    sums = _Sums(x, need)
    budget = _BLOCK_ELEMENTS.get(x.q.device.type, _BLOCK_ELEMENTS["cuda"])
    pairs = max(budget // max(dim, x.num_heads * length), 1)
    step = -(-columns // -(-columns // pairs))  # blocks of one size
    images_a_block = min(max(pairs // step, 1), num_images)
    images_a_group = max(_GROUP_ROWS // max(length, 1), images_a_block)
    for group in _slices(0, num_images, images_a_group):
        sums.add_images(group, images_a_block, _slices(0, columns, step))
    return sums.finish()


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]

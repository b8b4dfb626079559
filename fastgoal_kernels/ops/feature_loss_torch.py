"""The feature losses in plain PyTorch, a tile of the logits at a time, on any device.

A tile stays in cache on a CPU, and is small beside the features on a GPU. Rows of tiles are visited
one after the other and their tiles from left to right, so equal inputs give equal bits. The sums
that become the images' gradients wait for one row of tiles, the texts' for all of them.

Softmax logits are kept in units of log 2 (z log2 e), and so are their log-sum-exps: exp2 is a
third of exp's time on a CPU, and the Triton engine's unit too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Features, slices, smoothing_shares
from .products import sum_of_products, wide_product

# Elements of one float32 tile. 1 MB stays in a CPU's L2 while its row and column sums are taken (of
# 0.5 to 4 MB it was the fastest at batch 4,096, dim 512); a GPU wants products that fill it.
_TILE_ELEMENTS = {"cpu": 1 << 18}
_TILE_ELEMENTS_ON_GPU = 1 << 24
_LOG2_E = math.log2(math.e)


class _Tiles:
    """The logits unit * scale * <image i, text j>, by tiles."""

    def __init__(
        self, images: Features, texts: Features, scale: Tensor, pair_mask: Tensor | None,
        unit: float = 1.0,
    ):  # fmt: skip
        self.images, self.text = images, texts.all()
        self.scale, self.multiplier, self.pair_mask = scale, scale * unit, pair_mask
        area = _TILE_ELEMENTS.get(self.text.device.type, _TILE_ELEMENTS_ON_GPU)
        # As square as it gets: a product then reads the least for its work.
        column_step = max(min(len(texts), math.isqrt(area)), 1)
        self.row_step = max(min(len(images), area // column_step), 1)
        self.column_step = max(min(len(texts), area // self.row_step), 1)

    def row_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the logits, and their images."""
        for rows in slices(len(self.images), self.row_step):
            yield rows, self.images.part(rows)

    def column_slices(self) -> Iterator[slice]:
        return slices(len(self.text), self.column_step)

    def similarities(self, image: Tensor, columns: slice) -> Tensor:
        return wide_product(image, self.text[columns].T)

    def logits(self, similarities: Tensor, in_place: bool = True) -> Tensor:
        return similarities.mul_(self.multiplier) if in_place else similarities * self.multiplier

    def blocked(self, rows: slice, columns: slice) -> Tensor | None:
        """True for pairs that take no part; positives are put back by the caller."""
        return None if self.pair_mask is None else ~self.pair_mask[rows, columns]


class _Gradients:
    """Sums of dL/dlogit tiles times features, and what becomes of them at the end.

    The tiles hold dL/dlogit without its factor (upstream gradient, 1/batch), which is applied to
    the sums: a tile of 1/batch-sized numbers would lose its small ones in float16.
    """

    def __init__(
        self, tiles: _Tiles, images: Features, texts: Features, dtype: torch.dtype | None,
        need_image: bool, need_text: bool, need_scale: bool,
    ):  # fmt: skip
        """dtype: of the gradients; None = each side's own."""
        self.tiles, self.images, self.texts, self.dtype = tiles, images, texts, dtype
        new_zeros = tiles.scale.new_zeros
        self.image = images.new_gradient(dtype) if need_image else None
        self.row_sums: Tensor | None = None
        self.text_sums = new_zeros(tiles.text.shape) if need_text else None
        # d loss / d scale = sum of dlogit * similarity: a product of any tower's sums with its
        # features. With both towers frozen there is no such sum, and the tiles are added up.
        self.need_scale = need_scale
        self.scale_from_text = need_scale and need_text
        self.scale_from_image = need_scale and need_image and not need_text
        self.scale_from_tiles = need_scale and not need_image and not need_text
        self.scale = new_zeros(())

    def add(self, image: Tensor, columns: slice, dlogits: Tensor, similarities: Tensor) -> None:
        """`similarities` are still those if `scale_from_tiles`; else they are not looked at."""
        tiles = self.tiles
        if self.image is not None:
            # dlogits lie in [-2, 2] by construction: neither half dtype overflows.
            self.row_sums = sum_of_products(self.row_sums, dlogits, tiles.text[columns])
        if self.text_sums is not None:
            sum_of_products(self.text_sums[columns], dlogits.T, image)
        if self.scale_from_tiles:
            self.scale += (dlogits * similarities).sum()

    def finish_rows(self, rows: slice, image: Tensor, factor: Tensor | float) -> None:
        """All tiles of these rows have been added."""
        if self.image is None:
            return
        if self.row_sums is None:  # no texts
            self.image[rows] = 0
            return
        if self.scale_from_image:
            self.scale += (self.row_sums * image).sum()
        self.images.finish(self.row_sums, factor * self.tiles.scale, rows, self.image)
        self.row_sums = None

    def finish(self, factor: Tensor | float) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (images, texts, scale); None for one that is not needed."""
        text, sums = None, self.text_sums
        if sums is not None:
            if self.scale_from_text:
                # Some rows at a time: their products would be one more float32 copy of a tower.
                for rows in slices(len(sums), self.tiles.row_step):
                    self.scale += (sums[rows] * self.tiles.text[rows]).sum()
            same = sums.dtype == (self.dtype or self.texts.given.dtype)
            text = sums if same else self.texts.new_gradient(self.dtype)
            self.texts.finish(sums, factor * self.tiles.scale, slice(0, len(sums)), text)
        return self.image, text, self.scale * factor if self.need_scale else None


# ---------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------


class _RunningLogSumExp:
    """log2 of the sum of 2^z along one axis of a matrix that arrives in tiles."""

    def __init__(self, length: int, like: Tensor):
        # The most negative finite number, not -inf: a tile whose pairs are all masked must leave
        # exp(-inf - maximum) = 0 behind, not NaN.
        self.maximum = like.new_full((length,), torch.finfo(like.dtype).min)
        self.total = like.new_zeros(length)

    def add(self, where: slice, logits: Tensor, dim: int) -> None:
        before = self.maximum[where]
        now = torch.maximum(before, logits.amax(dim=dim))
        here = (logits - now.unsqueeze(dim)).exp2_().sum(dim=dim)
        self.total[where] = self.total[where] * (before - now).exp2() + here
        self.maximum[where] = now

    def result(self) -> Tensor:
        return self.maximum + self.total.log2()


def _targets(tile: Tensor, rows: slice, columns: slice, target_offset: int) -> tuple[slice, Tensor]:
    """Which rows have their target in the tile, and the view of those targets."""
    diagonal = rows.start + target_offset - columns.start
    view = tile.diagonal(diagonal)
    first = rows.start + max(0, -diagonal)
    return slice(first, first + len(view)), view


def _mask_(logits: Tensor, blocked: Tensor | None, targets: Tensor, value: float) -> None:
    if blocked is not None:
        kept = targets.clone()
        logits.masked_fill_(blocked, value)
        targets.copy_(kept)


def softmax_forward(
    images: Features,
    texts: Features,
    scale: Tensor,
    pair_mask: Tensor | None,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row log-sum-exp, column log-sum-exp), the latter two in units of log 2."""
    tiles = _Tiles(images, texts, scale, pair_mask, _LOG2_E)
    row_lse = _RunningLogSumExp(len(images), scale)
    column_lse = _RunningLogSumExp(len(texts) if both_ways else 0, scale)
    target_logits = scale.new_empty(len(images))
    row_sum, column_sum = scale.new_zeros(len(images)), scale.new_zeros(len(texts))
    for rows, image in tiles.row_slices():
        for columns in tiles.column_slices():
            logits = tiles.logits(tiles.similarities(image, columns))
            own_rows, targets = _targets(logits, rows, columns, target_offset)
            target_logits[own_rows] = targets
            blocked = tiles.blocked(rows, columns)
            if label_smoothing:
                _mask_(logits, blocked, targets, 0)
                row_sum[rows] += logits.sum(dim=1)
                column_sum[columns] += logits.sum(dim=0)
            _mask_(logits, blocked, targets, -torch.inf)
            row_lse.add(rows, logits, 1)
            if both_ways:
                column_lse.add(columns, logits, 0)
    row_result, column_result = row_lse.result(), column_lse.result()
    row_shares, column_shares = smoothing_shares(
        label_smoothing, pair_mask, len(images), len(texts), target_offset, scale
    )
    hard = (1 - label_smoothing) * target_logits
    loss = (row_result - hard - row_shares * row_sum).mean()
    if both_ways:
        loss = (loss + (column_result - hard - column_shares * column_sum).mean()) / 2
    return loss / _LOG2_E, row_result, column_result


def softmax_backward(
    upstream: Tensor,
    images: Features,
    texts: Features,
    scale: Tensor,
    pair_mask: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of images, texts and scale."""
    tiles = _Tiles(images, texts, scale, pair_mask, _LOG2_E)
    gradients = _Gradients(tiles, images, texts, None, need_image, need_text, need_scale)
    row_shares, column_shares = smoothing_shares(
        label_smoothing, pair_mask, len(images), len(texts), target_offset, scale
    )
    ways = 2 if both_ways else 1
    factor = upstream / max(ways * len(images), 1)
    for rows, image in tiles.row_slices():
        for columns in tiles.column_slices():
            similarities = tiles.similarities(image, columns)
            logits = tiles.logits(similarities, in_place=not gradients.scale_from_tiles)
            blocked = tiles.blocked(rows, columns)
            _, targets = _targets(logits, rows, columns, target_offset)
            _mask_(logits, blocked, targets, -torch.inf)
            dlogits = (logits - row_lse[rows, None]).exp2_()
            if label_smoothing:
                dlogits -= row_shares[rows, None]
            if both_ways:
                dlogits += logits.sub_(column_lse[columns]).exp2_()
                if label_smoothing:
                    dlogits -= column_shares[columns]
            _, targets = _targets(dlogits, rows, columns, target_offset)
            if label_smoothing:
                _mask_(dlogits, blocked, targets, 0)
            targets -= ways * (1 - label_smoothing)
            gradients.add(image, columns, dlogits, similarities)
        gradients.finish_rows(rows, image, factor)
    return gradients.finish(factor)


# ---------------------------------------------------------------------------------------------
# Sigmoid
# ---------------------------------------------------------------------------------------------


def _positives(
    rows: slice, columns: slice, captions_per_image: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(row, column) inside the tile of each pair with floor(text / K) = image; none for K = 0."""
    if captions_per_image == 0:
        return (torch.empty(0, dtype=torch.long, device=device),) * 2
    first = max(columns.start, rows.start * captions_per_image)
    end = max(first, min(columns.stop, rows.stop * captions_per_image))
    texts = torch.arange(first, end, device=device)
    return texts // captions_per_image - rows.start, texts - columns.start


def sigmoid(
    images: Features,
    texts: Features,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    captions_per_image: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(sum of softplus(-y z), its gradients by images, texts, scale and bias, in float32)."""
    tiles = _Tiles(images, texts, scale, pair_mask)
    gradients = _Gradients(tiles, images, texts, scale.dtype, need_image, need_text, need_scale)
    any_gradient = need_image or need_text or need_scale or need_bias
    terms, dbias = [scale.new_zeros(())], [scale.new_zeros(())]
    for rows, image in tiles.row_slices():
        for columns in tiles.column_slices():
            similarities = tiles.similarities(image, columns)
            minus_yz = tiles.logits(similarities, in_place=not gradients.scale_from_tiles)
            minus_yz += bias  # y = -1 but for the positives
            positives = _positives(rows, columns, captions_per_image, scale.device)
            kept = minus_yz[positives]
            blocked = tiles.blocked(rows, columns)
            if blocked is not None:
                minus_yz.masked_fill_(blocked, -torch.inf)  # softplus and sigmoid give 0
            minus_yz[positives] = -kept
            # Above 40 the logarithm adds less than half a bit of float64.
            terms.append(F.softplus(minus_yz, threshold=40).sum())
            if any_gradient:
                dlogits = minus_yz.sigmoid_()
                dlogits[positives] = -dlogits[positives]
                gradients.add(image, columns, dlogits, similarities)
                if need_bias:
                    dbias.append(dlogits.sum())
        gradients.finish_rows(rows, image, 1.0)
    bias_grad = torch.stack(dbias).sum() if need_bias else None
    return torch.stack(terms).sum(), *gradients.finish(1.0), bias_grad

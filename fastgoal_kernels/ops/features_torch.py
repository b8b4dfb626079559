"""Contrastive losses of plain features, a tile of the score matrix at a time, on any device.

    fastgoal::softmax_loss            features -> loss, log-sum-exp of every row and column
    fastgoal::softmax_loss_backward   recomputes each tile and turns it into gradients
    fastgoal::sigmoid_loss            features -> summed loss and, where wanted, the gradients
    fastgoal::sigmoid_loss_backward   scales those gradients

Nothing of size images x texts is ever held: a tile stays in cache on a CPU, and is small beside the
features on a GPU. The softmax needs whole rows and columns before its first gradient, so it goes
over the tiles twice: four matrix products, where an eager loss that keeps its logits needs three.
A sigmoid term knows its gradient at once: three products, in one pass.

The definitions are `reference.clip_contrastive_loss` and `reference.sigmoid_contrastive_loss`.
Every tile is visited in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import wide_product

# Elements of one float32 tile. 1 MB stays in a CPU's L2 while its row and column sums are taken (of
# 0.5 to 4 MB it was the fastest at batch 4,096, dim 512); a GPU wants products that fill it.
_TILE_ELEMENTS = {"cpu": 1 << 18}
_TILE_ELEMENTS_ON_GPU = 1 << 24


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


class _Tiles:
    """The logits scale * <image i, text j> + bias, by tiles."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        pair_mask: Tensor | None,
    ):
        self.image, self.text = image, text
        self.scale, self.bias, self.pair_mask = scale, bias, pair_mask
        area = _TILE_ELEMENTS.get(image.device.type, _TILE_ELEMENTS_ON_GPU)
        # As square as it gets: a product then reads the least for its work.
        self.column_step = max(min(len(text), math.isqrt(area)), 1)
        self.row_step = max(min(len(image), area // self.column_step), 1)
        self.column_step = max(min(len(text), area // self.row_step), 1)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for rows in _slices(len(self.image), self.row_step):
            for columns in _slices(len(self.text), self.column_step):
                yield rows, columns

    def similarities(self, rows: slice, columns: slice) -> Tensor:
        return wide_product(self.image[rows], self.text[columns].T)

    def logits(self, similarities: Tensor) -> Tensor:
        logits = similarities * self.scale
        return logits if self.bias is None else logits.add_(self.bias)

    def blocked(self, rows: slice, columns: slice) -> Tensor | None:
        """True for pairs that take no part; positives are put back by the caller."""
        return None if self.pair_mask is None else ~self.pair_mask[rows, columns]


class _Gradients:
    """Sums of dL/dlogit tiles times features, and what becomes of them at the end.

    The tiles hold dL/dlogit without its factor (upstream gradient, 1/batch), which is applied to
    the sums: a tile of 1/batch-sized numbers would lose its small ones in float16.
    """

    def __init__(self, tiles: _Tiles, need_image: bool, need_text: bool, need_scale: bool):
        self.tiles = tiles
        new_zeros = tiles.scale.new_zeros
        self.image = new_zeros(tiles.image.shape) if need_image else None
        self.text = new_zeros(tiles.text.shape) if need_text else None
        # d loss / d scale = sum of dlogit * similarity: a product of any tower's sums with its
        # features. With both towers frozen there is no such sum, and the tiles are added up.
        self.from_tiles = need_scale and not (need_image or need_text)
        self.need_scale = need_scale
        self.scale = new_zeros(())

    def add(self, rows: slice, columns: slice, dlogits: Tensor, similarities: Tensor) -> None:
        if self.image is not None:
            # dlogits lie in [-2, 2] by construction: neither half dtype overflows.
            self.image[rows] += wide_product(dlogits, self.tiles.text[columns])
        if self.text is not None:
            self.text[columns] += wide_product(dlogits.T, self.tiles.image[rows])
        if self.from_tiles:
            self.scale += (dlogits * similarities).sum()

    def finish(self, factor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of (image, text, scale), the towers' in float32; no elements if not needed."""
        tiles = self.tiles
        waits_for_scale = self.need_scale and not self.from_tiles
        for grad, features in ((self.image, tiles.image), (self.text, tiles.text)):
            if grad is None:
                continue
            if waits_for_scale:
                # Some rows at a time: their products would be one more float32 copy of a tower.
                for rows in _slices(len(grad), tiles.row_step):
                    self.scale += (grad[rows] * features[rows]).sum()
                waits_for_scale = False
            grad *= factor * tiles.scale
        empty = self.scale.new_empty
        return (
            empty(0) if self.image is None else self.image,
            empty(0) if self.text is None else self.text,
            self.scale * factor if self.need_scale else empty(0),
        )


# ---------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------


class _RunningLogSumExp:
    """Log-sum-exp along one axis of a matrix that arrives in tiles."""

    def __init__(self, length: int, like: Tensor):
        # The most negative finite number, not -inf: a tile whose pairs are all masked must leave
        # exp(-inf - maximum) = 0 behind, not NaN.
        self.maximum = like.new_full((length,), torch.finfo(like.dtype).min)
        self.total = like.new_zeros(length)

    def add(self, where: slice, logits: Tensor, dim: int) -> None:
        before = self.maximum[where]
        now = torch.maximum(before, logits.amax(dim=dim))
        here = (logits - now.unsqueeze(dim)).exp_().sum(dim=dim)
        self.total[where] = self.total[where] * (before - now).exp() + here
        self.maximum[where] = now

    def result(self) -> Tensor:
        return self.maximum + self.total.log()


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


def _pairs(
    pair_mask: Tensor | None, shape: tuple[int, int], target_offset: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """How many pairs take part in each row and in each column."""
    if pair_mask is None:
        return like.new_full((shape[0],), shape[1]), like.new_full((shape[1],), shape[0])
    masked_targets = (~pair_mask.diagonal(target_offset)).to(like.dtype)
    rows, columns = pair_mask.sum(1).to(like.dtype), pair_mask.sum(0).to(like.dtype)
    rows += masked_targets
    columns[target_offset : target_offset + shape[0]] += masked_targets
    return rows, columns


@torch.library.custom_op("fastgoal::softmax_loss", mutates_args=())
def softmax_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pair_mask: Tensor | None,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, row log-sum-exp, column log-sum-exp) of (M, D) images and (N, D) texts of one dtype.

    The target of row i is column i + target_offset. `both_ways`: half of [mean row cross-entropy +
    mean column cross-entropy], for M = N and no offset. Else the rows' alone, M <= N, and the
    column result has no elements: what one rank of several computes of its own rows.
    """
    with torch.autocast(image.device.type, enabled=False):
        tiles = _Tiles(image, text, scale, bias, pair_mask)
        row_lse = _RunningLogSumExp(len(image), scale)
        column_lse = _RunningLogSumExp(len(text) if both_ways else 0, scale)
        target_logits = scale.new_empty(len(image))
        row_sum, column_sum = scale.new_zeros(len(image)), scale.new_zeros(len(text))
        for rows, columns in tiles:
            logits = tiles.logits(tiles.similarities(rows, columns))
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
        row_pairs, column_pairs = _pairs(pair_mask, (len(image), len(text)), target_offset, scale)
        hard = (1 - label_smoothing) * target_logits
        loss = (row_result - hard - label_smoothing * row_sum / row_pairs).mean()
        if both_ways:
            columns_loss = column_result - hard - label_smoothing * column_sum / column_pairs
            loss = (loss + columns_loss.mean()) / 2
    return loss, row_result, column_result


@softmax_loss.register_fake
def _(
    image, text, scale, bias, pair_mask, label_smoothing, both_ways, target_offset
):  # fmt: skip
    return (
        scale.new_empty(()),
        scale.new_empty(image.shape[0]),
        scale.new_empty(text.shape[0] if both_ways else 0),
    )


@torch.library.custom_op("fastgoal::softmax_loss_backward", mutates_args=())
def softmax_loss_backward(
    upstream: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pair_mask: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    label_smoothing: float,
    both_ways: bool,
    target_offset: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (image, text, scale); one that is not needed has no elements.

    dL/dlogit is row softmax + column softmax - twice the target, over twice the batch.
    """
    with torch.autocast(image.device.type, enabled=False):
        tiles = _Tiles(image, text, scale, bias, pair_mask)
        gradients = _Gradients(tiles, need_image, need_text, need_scale)
        row_pairs, column_pairs = _pairs(pair_mask, (len(image), len(text)), target_offset, scale)
        row_share, column_share = label_smoothing / row_pairs, label_smoothing / column_pairs
        for rows, columns in tiles:
            similarities = tiles.similarities(rows, columns)
            logits = tiles.logits(similarities)
            blocked = tiles.blocked(rows, columns)
            _, targets = _targets(logits, rows, columns, target_offset)
            _mask_(logits, blocked, targets, -torch.inf)
            dlogits = (logits - row_lse[rows, None]).exp_()
            if label_smoothing:
                dlogits -= row_share[rows, None]
            if both_ways:
                dlogits += logits.sub_(column_lse[columns]).exp_()
                if label_smoothing:
                    dlogits -= column_share[columns]
            _, targets = _targets(dlogits, rows, columns, target_offset)
            if label_smoothing:
                _mask_(dlogits, blocked, targets, 0)
            targets -= (2 if both_ways else 1) * (1 - label_smoothing)
            gradients.add(rows, columns, dlogits, similarities)
        factor = upstream / max((2 if both_ways else 1) * len(image), 1)
        image_grad, text_grad, scale_grad = gradients.finish(factor)
    return image_grad.to(image.dtype), text_grad.to(text.dtype), scale_grad


@softmax_loss_backward.register_fake
def _(
    upstream, image, text, scale, bias, pair_mask, row_lse, column_lse, label_smoothing,
    both_ways, target_offset, need_image, need_text, need_scale,
):  # fmt: skip
    return (
        image.new_empty(image.shape if need_image else 0),
        text.new_empty(text.shape if need_text else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _softmax_setup_context(ctx, inputs, output):
    image, text, scale, bias, pair_mask, *ctx.options = inputs
    _, row_lse, column_lse = output
    ctx.mark_non_differentiable(row_lse, column_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, scale, bias, pair_mask, row_lse, column_lse)


def _softmax_backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 8
    need_image, need_text, need_scale, need_bias, *_ = ctx.needs_input_grad
    image_grad = text_grad = scale_grad = None
    if need_image or need_text or need_scale:
        image_grad, text_grad, scale_grad = softmax_loss_backward(
            upstream, *ctx.saved_tensors, *ctx.options, need_image, need_text, need_scale
        )
    # A softmax does not see a shift of all its logits: the bias has no gradient.
    bias_grad = torch.zeros_like(ctx.saved_tensors[3]) if need_bias else None
    return (
        image_grad if need_image else None,
        text_grad if need_text else None,
        scale_grad if need_scale else None,
        bias_grad,
        *[None] * 4,
    )


softmax_loss.register_autograd(_softmax_backward, setup_context=_softmax_setup_context)


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


@torch.library.custom_op("fastgoal::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    captions_per_image: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum of softplus(-y z), its gradients by image, text, scale and bias, in float32).

    Of (M, D) images and (N, D) texts of one dtype; text j belongs to image floor(j / K), to none
    for K = 0. A gradient that is not needed has no elements and costs nothing.
    """
    with torch.autocast(image.device.type, enabled=False):
        tiles = _Tiles(image, text, scale, bias, pair_mask)
        gradients = _Gradients(tiles, need_image, need_text, need_scale)
        any_gradient = need_image or need_text or need_scale or need_bias
        terms, dbias = [scale.new_zeros(())], [scale.new_zeros(())]
        for rows, columns in tiles:
            similarities = tiles.similarities(rows, columns)
            minus_yz = tiles.logits(similarities)  # y = -1 but for the positives
            positives = _positives(rows, columns, captions_per_image, image.device)
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
                gradients.add(rows, columns, dlogits, similarities)
                if need_bias:
                    dbias.append(dlogits.sum())
        grads = gradients.finish(1.0)
        bias_grad = torch.stack(dbias).sum() if need_bias else scale.new_empty(0)
        total = torch.stack(terms).sum()
    return total, *grads, bias_grad


@sigmoid_loss.register_fake
def _(
    image, text, scale, bias, pair_mask, captions_per_image, need_image, need_text,
    need_scale, need_bias,
):  # fmt: skip
    return (
        scale.new_empty(()),
        scale.new_empty(image.shape if need_image else 0),
        scale.new_empty(text.shape if need_text else 0),
        scale.new_empty(() if need_scale else 0),
        scale.new_empty(() if need_bias else 0),
    )


# An operator of its own for a few multiplications, because it has no autograd rule: a second
# derivative through it is an error, where plain PyTorch would take the gradients for constants.
@torch.library.custom_op("fastgoal::sigmoid_loss_backward", mutates_args=())
def sigmoid_loss_backward(
    upstream: Tensor,
    image_grad: Tensor,
    text_grad: Tensor,
    scale_grad: Tensor,
    bias_grad: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward found times the upstream gradient, the towers' in the features' dtype."""
    return (
        (upstream * image_grad).to(dtype),
        (upstream * text_grad).to(dtype),
        upstream * scale_grad,
        upstream * bias_grad,
    )


@sigmoid_loss_backward.register_fake
def _(upstream, image_grad, text_grad, scale_grad, bias_grad, dtype):
    return (
        torch.empty_like(image_grad, dtype=dtype),
        torch.empty_like(text_grad, dtype=dtype),
        torch.empty_like(scale_grad),
        torch.empty_like(bias_grad),
    )


def _sigmoid_setup_context(ctx, inputs, output):
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*gradients)


def _sigmoid_backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 10
    gradients = sigmoid_loss_backward(upstream, *ctx.saved_tensors, ctx.dtype)
    wanted = ctx.needs_input_grad[:4]
    return (
        *(grad if want else None for grad, want in zip(gradients, wanted, strict=True)),
        *[None] * 6,
    )


sigmoid_loss.register_autograd(_sigmoid_backward, setup_context=_sigmoid_setup_context)

"""The score losses in plain PyTorch, a slab of rows at a time.

A slab holds a few MB of logits, so the extra memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_SLAB_ELEMENTS = 1 << 20


def _slabs(scores: Tensor) -> Iterator[slice]:
    step = max(1, _SLAB_ELEMENTS // max(scores.shape[1], 1))
    for first in range(0, scores.shape[0], step):
        yield slice(first, min(first + step, scores.shape[0]))


def _logits(
    scores: Tensor, rows: slice, scale: Tensor, bias: Tensor, pair_mask: Tensor | None
) -> Tensor:
    """z of a slab; -inf where a pair takes no part. A positive, on the diagonal, always does."""
    z = torch.addcmul(bias, scores[rows], scale)
    if pair_mask is not None:
        out = ~pair_mask[rows]
        out.diagonal(rows.start).fill_(False)
        z.masked_fill_(out, -torch.inf)
    return z


def softmax_total(
    row_scores: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, scale: Tensor,
    bias: Tensor,
) -> Tensor:  # fmt: skip
    """Half of [mean over rows of (LSE - own logit) + the same over columns]."""
    own_row = torch.addcmul(bias, row_scores.diagonal(), scale)
    own_column = torch.addcmul(bias, columns.diagonal(), scale)
    total = (row_lse - own_row).sum() + (column_lse - own_column).sum()
    return total / (2 * row_scores.shape[0])


def forward(
    row_scores: Tensor,
    column_scores: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    objective: str,
    captions_per_image: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_images, num_texts = row_scores.shape
    if objective == "sigmoid":
        matrices = [row_scores] if column_scores is None else [row_scores, column_scores]
        total = row_scores.new_zeros(())
        for scores in matrices:
            for rows in _slabs(scores):
                yz, out, _ = _signed_logits(
                    scores, rows, scale, bias, pair_mask, captions_per_image
                )
                total += -F.logsigmoid(yz).masked_fill_(out, 0).sum()
        empty = row_scores.new_empty(0)
        return total / (len(matrices) * max(num_texts, 1)), empty, empty.clone()

    columns = row_scores if column_scores is None else column_scores
    row_lse = row_scores.new_empty(num_images)
    # A slab sees some rows of every column: fold its log-sum-exps into the running ones.
    column_lse = row_scores.new_full((num_texts,), -torch.inf)
    for rows in _slabs(row_scores):
        z = _logits(row_scores, rows, scale, bias, pair_mask)
        row_lse[rows] = z.logsumexp(dim=1)
        if column_scores is not None:
            z = _logits(column_scores, rows, scale, bias, pair_mask)
        column_lse = torch.logaddexp(column_lse, z.logsumexp(dim=0))
    loss = softmax_total(row_scores, columns, row_lse, column_lse, scale, bias)
    return loss, row_lse, column_lse


def _signed_logits(
    scores: Tensor,
    rows: slice,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    captions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y * z of a slab, the pairs that take no part, the positive ones)."""
    image = torch.arange(rows.start, rows.stop, device=scores.device)
    positive = image[:, None] == torch.arange(scores.shape[1], device=scores.device) // captions
    z = torch.addcmul(bias, scores[rows], scale)
    out = torch.zeros_like(positive) if pair_mask is None else ~(pair_mask[rows] | positive)
    return torch.where(positive, z, -z), out, positive


def backward(
    grad: Tensor,
    row_scores: Tensor,
    column_scores: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    pair_mask: Tensor | None,
    row_lse: Tensor,
    column_lse: Tensor,
    objective: str,
    captions_per_image: int,
    grad_filter_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_images, num_texts = row_scores.shape
    d_rows = torch.empty_like(row_scores, memory_format=torch.contiguous_format)
    d_columns = torch.empty_like(d_rows) if column_scores is not None else row_scores.new_empty(0)
    d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias)

    def finish(scores: Tensor, rows: slice, d_z: Tensor, out: Tensor) -> None:
        """From dL/dz, upstream gradient left out: sums for scale and bias, the filter, d scores."""
        d_scale.add_((d_z * scores[rows]).sum())
        d_bias.add_(d_z.sum())
        if grad_filter_eps > 0:
            d_z.masked_fill_(d_z.abs() * num_texts < grad_filter_eps, 0)
        torch.mul(d_z, scale * grad, out=out[rows])

    matrices = [(row_scores, d_rows)]
    if column_scores is not None:
        matrices.append((column_scores, d_columns))
    if objective == "sigmoid":
        for scores, d_scores in matrices:
            for rows in _slabs(scores):
                yz, out, positive = _signed_logits(
                    scores, rows, scale, bias, pair_mask, captions_per_image
                )
                d_z = torch.sigmoid(-yz).masked_fill_(out, 0) / (len(matrices) * max(num_texts, 1))
                finish(scores, rows, torch.where(positive, -d_z, d_z), d_scores)
        return d_rows, d_columns, d_scale * grad, d_bias * grad

    for rows in _slabs(row_scores):
        z = _logits(row_scores, rows, scale, bias, pair_mask)
        d_z = torch.exp(z - row_lse[rows, None])
        diagonal = d_z.diagonal(rows.start)
        if column_scores is None:
            d_z += torch.exp(z - column_lse)
            diagonal -= 2
        else:
            diagonal -= 1
        finish(row_scores, rows, d_z.div_(2 * num_images), d_rows)
        if column_scores is not None:
            z = _logits(column_scores, rows, scale, bias, pair_mask)
            d_z = torch.exp(z - column_lse)
            d_z.diagonal(rows.start).sub_(1)
            finish(column_scores, rows, d_z.div_(2 * num_images), d_columns)
    return d_rows, d_columns, d_scale * grad, d_bias * grad

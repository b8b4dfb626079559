"""What the text-conditioned operators are given, what is wanted of them, and how pairs add up."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pool(NamedTuple):
    """The operators' inputs, with the shapes of `ops/text_conditioned.py`."""

    q: Tensor
    k: Tensor
    v: Tensor
    text: Tensor
    out_weight: Tensor
    out_bias: Tensor
    image_mask: Tensor | None
    num_heads: int
    add_zero_attn: bool


class Need(NamedTuple):
    """Which gradients are wanted."""

    q: bool
    k: bool
    v: bool
    text: bool
    out_weight: bool
    out_bias: bool


def add_rows(total: Tensor, captions: slice | Tensor, rows: Tensor) -> None:
    """total[captions] += rows of some images, (images, captions, ...), in a fixed order.

    The captions are the same of every image, or those of an index (images, captions). On CUDA
    index_add_ uses atomics, but an accumulating index_put_ sorts; on a CPU it is the other way
    round.
    """
    if isinstance(captions, slice):
        total[captions] += rows.sum(dim=0)
    elif total.device.type == "cpu":
        total.index_add_(0, captions.flatten(), rows.flatten(0, 1))
    else:
        total.index_put_((captions,), rows, accumulate=True)

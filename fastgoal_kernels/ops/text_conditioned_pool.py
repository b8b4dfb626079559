"""What the text-conditioned operators are given, and what is wanted of their backward."""

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

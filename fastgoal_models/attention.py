"""Where a CLIP's class token looks: the attention of the image tower's last layer."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from .fast_goal import FastGoalModel


def has_class_attention(model: FastGoalModel) -> bool:
    """Whether the feature of a picture is its class token's, by an attention that tells weights.

    Not so where a tower averages its patches, and with open_clip's custom blocks (`qk_norm` ...).
    """
    visual: Any = model.clip.visual
    last = visual.transformer.resblocks[-1]
    return visual.pool_type == "tok" and isinstance(last, ResidualAttentionBlock)


@torch.no_grad()
def class_attention(model: FastGoalModel, images: Tensor) -> Tensor:
    """How the last layer's attention of the class token is shared among the patches.

    With x_0 ... x_P what enters the last block, x_0 the class token's, and for each head h

        q = W_q,h LN(x_0) + b_q,h        k_p = W_k,h LN(x_p) + b_k,h
        a_h,p = softmax over p = 0 ... P of <q, k_p> / sqrt(head dim)

    a map is the mean of a_h,p over the heads. a_0, what the class token keeps to itself, is left
    out, so that a map sums to 1 - a_0. It is this layer's attention alone: tokens that enter it
    have seen the whole picture already, so that a bright patch need not be what the picture shows
    there.

    Args:
        model: one that `has_class_attention`; put into evaluation mode meanwhile, and back.
        images: (N, 3, S, S), normalised, on the model's device.

    Returns (N, h, w), in the dtype of the tower's tokens, on the same device.
    """
    last: Any = model.clip.visual.transformer.resblocks[-1]
    entered: list[Tensor] = []

    def keep(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        entered.append(arguments[0])

    was_training = model.training
    model.eval()
    hook = last.register_forward_pre_hook(keep)
    try:
        model.image_tokens(images)
    finally:
        hook.remove()
        model.train(was_training)
    seen = last.ln_1(entered[0])
    _, weights = last.attn(seen[:, :1], seen, seen, need_weights=True)  # the mean over the heads
    return weights[:, 0, 1:].unflatten(1, model.grid_size)

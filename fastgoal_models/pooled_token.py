"""An open_clip transformer where one token of each row is all that is read of its last block.

A feature is one token of the last layer: the class token of a picture, the end token of a text.
There the last block's queries, its attention's output and its MLP are needed of that token alone;
keys and values are needed of all. That is most of a block less to compute: a twelfth of ViT-B's
twelve, a fifth of a small CLIP's four, with the same result.
"""

from __future__ import annotations

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor


def pooled_token(
    transformer: Transformer, x: Tensor, place: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """The tokens that leave the last block at `place`, without its others where that is possible.

    Args:
        x: (N, L, W), what enters the first block.
        place: (N,) int64, from 0 to L − 1.
        attn_mask: (L, L), added to the attention's logits.

    Returns (N, W), in the dtype in which the transformer gives its tokens.
    """
    rows = torch.arange(len(x), device=x.device)
    *blocks, last = transformer.resblocks
    if not (transformer.batch_first and _can_be_split(last)):
        return transformer(x, attn_mask=attn_mask)[rows, place]
    for block in blocks:
        x = block(x, attn_mask=attn_mask)
    seen = last.ln_1(x)
    query = seen[rows, place][:, None]
    # With one query a row, its line of the mask says which keys it may see.
    keys = None if attn_mask is None else attn_mask[place].to(x.dtype)
    attended, _ = last.attn(query, seen, seen, need_weights=False, key_padding_mask=keys)
    pooled = x[rows, place] + last.ls_1(attended[:, 0])
    return pooled + last.ls_2(last.mlp(last.ln_2(pooled)))


def _can_be_split(block: object) -> bool:
    # The block itself is not called, which hooks, wrappers and checkpointing rely on: only as it
    # was made, and not in training. FSDP gives it another class.
    return (
        type(block) is ResidualAttentionBlock
        and not torch.is_grad_enabled()
        and not (block._forward_hooks or block._forward_pre_hooks)
    )

"""What a CAFT finds in a picture: its levels of segments, and where each part of a caption looks.

A cell of the encoder's grid belongs to a superpixel, a superpixel by shares to the tokens of each
level above. What a level's tokens weigh is carried down to the cells by those shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Caft
from .vision import Hierarchy


class CaftMaps(NamedTuple):
    """Of one image: what there is to draw."""

    segments: list[Tensor]
    """(h, w) int64 for each level, finest first: the segment of each cell of the grid"""
    tokens: list[int]
    """tokens of each level"""
    attention: Tensor
    """(parts, h, w): attention of each part of the caption, summing to at most one"""


def cell_shares(hierarchy: Hierarchy) -> list[Tensor]:
    """(N, h, w, tokens) for each level, superpixels first: the share of each cell in each token."""
    first = hierarchy.assignments[0]
    shares = [F.one_hot(hierarchy.superpixels, first.shape[1]).to(first.dtype)]
    for assignment in hierarchy.assignments:
        shares.append(torch.einsum("nhwl,nlm->nhwm", shares[-1], assignment))
    return shares


@torch.no_grad()
def caft_maps(model: Caft, image: Tensor, texts: Tensor) -> CaftMaps:
    """The segments of an image and the text-conditioned attention of a caption's parts.

    Attention is the pool's, averaged over its heads; what falls on its zero token is left out, so
    that a part which finds nothing has a pale map.

    Args:
        model: put into evaluation mode meanwhile, and back afterwards.
        image: (3, H, W), CLIP-normalised.
        texts: (parts, L) int64.
    """
    was_training = model.training
    model.eval()
    encoded = model.encode_image(image[None], with_hierarchy=True)
    parts = F.normalize(model.encode_parts(texts), dim=-1)  # as when it scores
    model.train(was_training)
    assert encoded.hierarchy is not None
    pool, tokens = model.visual_proj, encoded.fine_tokens
    _, weights = pool.attn(
        pool.ln_q(parts)[None], pool.ln_k(tokens), pool.ln_v(tokens), need_weights=True
    )
    shares = cell_shares(encoded.hierarchy)
    # Each cell's part of what its token is given: a large token does not outshine a small one.
    of_cells = shares[1][0] / shares[1][0].sum(dim=(0, 1)).clamp_min(1e-6)
    attention = torch.einsum("pm,hwm->phw", weights[0, :, : tokens.shape[1]], of_cells)
    return CaftMaps(
        [share[0].argmax(dim=-1).cpu() for share in shares],
        [share.shape[-1] for share in shares],
        attention.cpu(),
    )

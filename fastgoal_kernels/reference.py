"""What every op means: eager PyTorch, one short function per op, no tricks.

These functions are the definition. Every backend and every gradient of this library is tested
against them in float64. They hold the big tensors that the other backends exist to avoid, so use
them to read, to test and to benchmark against, not to train.

Shape letters, here and everywhere: I images, J texts, R tokens (regions) of an image, Q tokens of
a text, D channels, K captions per image, M boxes, spans or clusters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores, losses and log-sum-exps are float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def l2_normalize(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last axis; a zero vector stays zero and gets no gradient."""
    wide = x.to(score_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.where(norm > 0, wide / norm.clamp_min(1e-12), 0.0).to(x.dtype)


def pad_tokens(tokens: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged (total, D) tokens as padded (batch, longest, D) ones and their mask."""
    items = [tokens[start:end] for start, end in pairwise(offsets.tolist())]
    if not items:
        return tokens[None, :0][:0], tokens.new_zeros(0, 0, dtype=torch.bool)
    lengths = torch.tensor([len(item) for item in items], device=tokens.device)
    padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=tokens.device) < lengths[:, None]


def pack_tokens(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Drop the padding: (packed (total, D), offsets (batch + 1,), longest length)."""
    lengths = mask.sum(dim=1)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return tokens[mask], offsets, int(lengths.max()) if len(lengths) else 0


# ---------------------------------------------------------------------------------------------
# MaxSim (late interaction; FILIP, arXiv 2111.07783, equations 3 to 5)
# ---------------------------------------------------------------------------------------------


def _with_mask(
    tokens: Tensor, mask: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Any layout as (batch, longest, D) tokens, zero where the mask is False, and the mask."""
    if offsets is not None:
        return pad_tokens(tokens, offsets)
    if mask is None:
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    return tokens.masked_fill(~mask[..., None], 0), mask


def _mean_of_max(
    sim: Tensor, query_mask: Tensor, key_mask: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """(I, J, queries, keys) similarities -> scores (I, J) and the winning key of each query.

    A query that has no valid key, or is not valid itself, adds nothing and has winner -1.
    """
    query_mask = query_mask.expand(sim.shape[:3])
    if 0 in sim.shape[2:]:
        return sim.sum(dim=(2, 3)), torch.full_like(query_mask, -1, dtype=torch.long)
    best, winner = sim.masked_fill(~key_mask, -torch.inf).max(dim=3)  # ties: the lowest index
    alive = query_mask & key_mask.any(dim=3)
    scores = torch.where(alive, best, 0.0).sum(dim=2)
    if reduction == "mean":
        scores = scores / query_mask.sum(dim=2).clamp_min(1)
    return scores, winner.masked_fill(~alive, -1)


def _maxsim(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_offsets: Tensor | None,
    text_offsets: Tensor | None,
    reduction: str,
    normalize: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    v, v_mask = _with_mask(image_tokens, image_mask, image_offsets)
    t, t_mask = _with_mask(text_tokens, text_mask, text_offsets)
    if normalize:
        v, t = l2_normalize(v), l2_normalize(t)
    dtype = score_dtype(torch.promote_types(v.dtype, t.dtype))
    sim = torch.einsum("ird,jqd->ijqr", v.to(dtype), t.to(dtype))
    v_mask, t_mask = v_mask[:, None], t_mask[None]  # (I, 1, R) and (1, J, Q)
    text_to_image = _mean_of_max(sim, t_mask, v_mask[:, :, None], reduction)
    image_to_text = _mean_of_max(sim.transpose(2, 3), v_mask, t_mask[:, :, None], reduction)
    return text_to_image, image_to_text


def maxsim_scores(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    direction: str = "text_to_image",
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """text_to_image: S[i,j] = mean over q in T_j of max over r in V_i of <t_jq, v_ir>.

    image_to_text: S[i,j] = mean over r in V_i of max over q in T_j of the same.
    """
    (t2i, _), (i2t, _) = _maxsim(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        reduction, normalize,
    )  # fmt: skip
    return {"text_to_image": t2i, "image_to_text": i2t, "both": (t2i, i2t)}[direction]


def maxsim_alignment(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    direction: str = "text_to_image",
    normalize: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The winning key of each query token, (I, J, queries) int64; -1 where nothing won."""
    (_, t2i), (_, i2t) = _maxsim(
        image_tokens, text_tokens, image_mask, text_mask, image_offsets, text_offsets,
        "mean", normalize,
    )  # fmt: skip
    return {"text_to_image": t2i, "image_to_text": i2t, "both": (t2i, i2t)}[direction]


def topk(scores: Tensor, k: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The k best texts of each image and the k best images of each text: (values, indices) twice.

    Best first; of equal scores the lower index comes first.
    """

    def best(rows: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = rows.sort(dim=1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]

    return best(scores), best(scores.T)


# ---------------------------------------------------------------------------------------------
# Contrastive losses from a score matrix (num_images, num_texts)
# ---------------------------------------------------------------------------------------------


def positive_pairs(num_images: int, num_texts: int, captions_per_image: int, device=None) -> Tensor:
    """(I, J) bool: text j belongs to image floor(j / K)."""
    owner = torch.arange(num_texts, device=device) // captions_per_image
    return torch.arange(num_images, device=device)[:, None] == owner


def cross_entropy(logits: Tensor, takes_part: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the rows, targets on the diagonal, over the pairs that take part.

    Smoothing spreads its share evenly over the pairs of the row that take part.
    """
    log_p = logits.masked_fill(~takes_part, -torch.inf).log_softmax(dim=1)
    smooth = log_p.masked_fill(~takes_part, 0).sum(dim=1) / takes_part.sum(dim=1).clamp_min(1)
    hard = log_p.diagonal()
    return -((1 - label_smoothing) * hard + label_smoothing * smooth).mean()


def softmax_loss(
    row_logits: Tensor, column_logits: Tensor, pair_mask: Tensor | None, label_smoothing: float = 0
) -> Tensor:
    """Half of [cross-entropy over rows of one matrix + over columns of the other]."""
    takes_part = torch.eye(len(row_logits), dtype=torch.bool, device=row_logits.device)
    takes_part = torch.ones_like(takes_part) if pair_mask is None else pair_mask | takes_part
    rows = cross_entropy(row_logits, takes_part, label_smoothing)
    columns = cross_entropy(column_logits.T, takes_part.T, label_smoothing)
    return (rows + columns) / 2


def sigmoid_loss(logits: Tensor, positive: Tensor, pair_mask: Tensor | None) -> Tensor:
    """-sum of log sigmoid(y * z); y = +1 for a positive pair, else -1. Not yet divided."""
    terms = -F.logsigmoid(torch.where(positive, logits, -logits))
    if pair_mask is not None:
        terms = terms.masked_fill(~(pair_mask | positive), 0)
    return terms.sum()


def maxsim_contrastive_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_offsets: Tensor | None = None,
    text_offsets: Tensor | None = None,
    captions_per_image: int = 1,
    pair_mask: Tensor | None = None,
    objective: str = "softmax",
    direction: str = "both",
    normalize: bool = False,
) -> Tensor:
    """softmax: FILIP's half of [row + column cross-entropy]; sigmoid: -sum log sigmoid(yz) / J.

    For "both" the rows are scored image_to_text and the columns text_to_image (softmax), or the
    two sigmoid losses averaged.
    """
    t2i, i2t = maxsim_scores(
        image_tokens, text_tokens, image_mask=image_mask, text_mask=text_mask,
        image_offsets=image_offsets, text_offsets=text_offsets, direction="both",
        normalize=normalize,
    )  # fmt: skip
    t2i = t2i if direction != "image_to_text" else i2t
    i2t = i2t if direction != "text_to_image" else t2i
    bias = 0.0 if logit_bias is None else logit_bias
    rows, columns = logit_scale * i2t + bias, logit_scale * t2i + bias
    if objective == "softmax":
        return softmax_loss(rows, columns, pair_mask)
    positive = positive_pairs(*t2i.shape, captions_per_image=captions_per_image, device=t2i.device)
    both = sigmoid_loss(rows, positive, pair_mask) + sigmoid_loss(columns, positive, pair_mask)
    return both / 2 / max(t2i.shape[1], 1)


def feature_scores(image_features: Tensor, text_features: Tensor, normalize: bool) -> Tensor:
    """(I, J) dot products, or cosines, of (I, D) and (J, D) features."""
    if normalize:
        image_features, text_features = l2_normalize(image_features), l2_normalize(text_features)
    dtype = score_dtype(torch.promote_types(image_features.dtype, text_features.dtype))
    return image_features.to(dtype) @ text_features.to(dtype).T


def clip_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    pair_mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
) -> Tensor:
    """CLIP (arXiv 2103.00020): half of [row + column cross-entropy], targets on the diagonal."""
    scores = feature_scores(image_features, text_features, normalize)
    logits = logit_scale * scores + (0.0 if logit_bias is None else logit_bias)
    return softmax_loss(logits, logits, pair_mask, label_smoothing)


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int = 1,
    negative_only: bool = False,
    pair_mask: Tensor | None = None,
    normalize: bool = False,
    average_over: str = "texts",
) -> Tensor:
    """SigLIP (arXiv 2303.15343, equation 3) with K positives a row (FLAIR, CAFT)."""
    scores = feature_scores(image_features, text_features, normalize)
    positive = positive_pairs(
        *scores.shape, captions_per_image=captions_per_image, device=scores.device
    )
    positive = positive & (not negative_only)
    total = sigmoid_loss(logit_scale * scores + logit_bias, positive, pair_mask)
    return total / max(scores.shape[1] if average_over == "texts" else scores.shape[0], 1)


# ---------------------------------------------------------------------------------------------
# Text-conditioned pooling (FLAIR, arXiv 2412.03561; CAFT, arXiv 2602.02977)
# ---------------------------------------------------------------------------------------------


class PoolWeights(NamedTuple):
    """The tensors of a TextConditionedPool, so that an op needs no module."""

    in_proj_weight: Tensor  # (3D, D)
    in_proj_bias: Tensor  # (3D,)
    out_proj_weight: Tensor  # (D, D)
    out_proj_bias: Tensor  # (D,)
    ln_q_weight: Tensor  # (D,), like the five below
    ln_q_bias: Tensor
    ln_k_weight: Tensor
    ln_k_bias: Tensor
    ln_v_weight: Tensor
    ln_v_bias: Tensor


def text_conditioned_pool(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    num_heads: int,
    *,
    add_zero_attn: bool = True,
    image_mask: Tensor | None = None,
) -> Tensor:
    """o_ij = multi-head attention of LN_q(t_j) over LN_k, LN_v(image i): (I, J, D)."""
    dim = image_tokens.shape[2]
    w_q, w_k, w_v = weights.in_proj_weight.chunk(3)
    b_q, b_k, b_v = weights.in_proj_bias.chunk(3)

    def heads(x: Tensor) -> Tensor:  # (..., D) -> (heads, ..., head_dim)
        return x.unflatten(-1, (num_heads, dim // num_heads)).movedim(-2, 0)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), weight, bias, eps=1e-5)

    q = heads(norm(text_features, weights.ln_q_weight, weights.ln_q_bias) @ w_q.T + b_q)
    k = heads(norm(image_tokens, weights.ln_k_weight, weights.ln_k_bias) @ w_k.T + b_k)
    v = heads(norm(image_tokens, weights.ln_v_weight, weights.ln_v_bias) @ w_v.T + b_v)
    logits = torch.einsum("hjd,hild->hijl", q, k) * (dim // num_heads) ** -0.5
    if image_mask is not None:
        logits = logits.masked_fill(~image_mask[:, None, :], -torch.inf)
    if add_zero_attn:  # one more key and value of zeros: logit 0, value 0
        logits, v = F.pad(logits, (0, 1)), F.pad(v, (0, 0, 0, 1))
    pooled = torch.einsum("hijl,hild->hijd", logits.softmax(dim=-1), v)
    pooled = pooled.movedim(0, -2).flatten(-2)
    return pooled @ weights.out_proj_weight.T + weights.out_proj_bias


def text_conditioned_scores(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    num_heads: int,
    *,
    add_zero_attn: bool = True,
    image_mask: Tensor | None = None,
    text_index: Tensor | None = None,
) -> Tensor:
    """cos(o_ij, t_j): (I, J), or (I, P) for the captions text_index (I, P) names per image."""
    dtype = score_dtype(torch.promote_types(image_tokens.dtype, text_features.dtype))
    tokens, texts = image_tokens.to(dtype), text_features.to(dtype)
    weights = PoolWeights(*(w.to(dtype) for w in weights))
    if image_mask is not None:
        tokens = tokens.masked_fill(~image_mask[..., None], 0)
        empty = ~image_mask.any(dim=1)
    else:
        empty = torch.full((len(tokens),), tokens.shape[1] == 0, device=tokens.device)
    if bool(empty.any()) and image_mask is not None:  # softmax over nothing would be NaN
        image_mask = image_mask | empty[:, None]
    pooled = text_conditioned_pool(
        tokens, texts, weights, num_heads, add_zero_attn=add_zero_attn, image_mask=image_mask
    )
    scores = (l2_normalize(pooled) * l2_normalize(texts)).sum(dim=-1)
    scores = torch.where(empty[:, None], 0.0, scores)
    return scores if text_index is None else scores.gather(1, text_index)


def hierarchical_scores(
    fine_tokens: Tensor,
    part_features: Tensor,
    whole_image_features: Tensor,
    whole_text_features: Tensor,
    weights: PoolWeights,
    num_heads: int,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    whole_logit_scale: Tensor | float,
    whole_logit_bias: Tensor | float,
    *,
    alpha: float = 0.3,
    shortlist: int | None = None,
    add_zero_attn: bool = True,
    image_mask: Tensor | None = None,
) -> Tensor:
    """CAFT's score (I, J): (1 - alpha) whole logit + alpha mean of the parts' (J, P, D) logits.

    With a shortlist, -inf but for each image's best texts by whole logit.
    """
    num_parts = part_features.shape[1]
    part = text_conditioned_scores(
        fine_tokens, l2_normalize(part_features).flatten(0, 1), weights, num_heads,
        add_zero_attn=add_zero_attn, image_mask=image_mask,
    )  # fmt: skip
    part = logit_scale * part.unflatten(1, (-1, num_parts)).mean(dim=2) + logit_bias
    whole = feature_scores(whole_image_features, whole_text_features, normalize=True)
    whole = whole_logit_scale * whole + whole_logit_bias
    scores = (1 - alpha) * whole + alpha * part
    if shortlist is None:
        return scores
    (_, best), _ = topk(whole, shortlist)
    return torch.full_like(scores, -torch.inf).scatter(1, best, scores.gather(1, best))


def text_conditioned_columns(
    num_images: int, captions_per_image: int, negative_offsets: Tensor
) -> Tensor:
    """(I, K + I - 1) caption indices: the image's own K, then one of each other image.

    Other images come in ascending order, and of image j the caption j * K + offset is taken.
    """
    device = negative_offsets.device
    image = torch.arange(num_images, device=device)
    own = image[:, None] * captions_per_image + torch.arange(captions_per_image, device=device)
    other = torch.arange(max(num_images - 1, 0), device=device).expand(num_images, -1)
    other = other + (other >= image[:, None])
    return torch.cat([own, other * captions_per_image + negative_offsets], dim=1)


def text_conditioned_sigmoid_loss(
    image_tokens: Tensor,
    text_features: Tensor,
    weights: PoolWeights,
    num_heads: int,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    captions_per_image: int,
    negative_offsets: Tensor | None = None,
    negative_only: bool = False,
    image_mask: Tensor | None = None,
    add_zero_attn: bool = True,
) -> Tensor:
    """-sum log sigmoid(yz) / columns. Negatives: all, or those of negative_offsets (I, I - 1)."""
    num_images = len(image_tokens)
    text_index = None
    if negative_offsets is not None:
        text_index = text_conditioned_columns(num_images, captions_per_image, negative_offsets)
    scores = text_conditioned_scores(
        image_tokens, text_features, weights, num_heads,
        add_zero_attn=add_zero_attn, image_mask=image_mask, text_index=text_index,
    )  # fmt: skip
    if text_index is None:
        owner = torch.arange(scores.shape[1], device=scores.device) // captions_per_image
    else:
        owner = text_index // captions_per_image
    positive = owner == torch.arange(num_images, device=scores.device)[:, None]
    total = sigmoid_loss(logit_scale * scores + logit_bias, positive & (not negative_only), None)
    return total / max(scores.shape[1], 1)


# ---------------------------------------------------------------------------------------------
# Token ops
# ---------------------------------------------------------------------------------------------


def region_grid(
    boxes: Tensor, image_sizes: Tensor, grid_size: tuple[int, int], model_size: int
) -> Tensor:
    """Boxes (M, 4) in pixels of images (M, 2) -> half-open patch ranges (M, 4): c1 r1 c2 r2."""
    boxes, sizes = boxes.double(), image_sizes.double()
    h, w = grid_size
    grid = torch.tensor([w, h], dtype=torch.float64, device=boxes.device)
    scaled = boxes.unflatten(1, (2, 2)) * model_size / sizes[:, None, :]  # (M, corner, xy)
    low = scaled[:, 0].round().clamp(0, model_size - 1)
    high = scaled[:, 1].round().clamp(0, model_size)
    first, end = (low * grid / model_size).floor(), (high * grid / model_size).ceil()
    centre = scaled.mean(dim=1).clamp(0, model_size - 1)
    patch = (centre * grid / model_size).floor()
    no_patch = (end <= first).any(dim=1, keepdim=True)
    first, end = torch.where(no_patch, patch, first), torch.where(no_patch, patch + 1, end)
    return torch.cat([first, end], dim=1).long()


def region_mean(
    tokens: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    grid_size: tuple[int, int],
    model_size: int,
    *,
    box_image: Tensor | None = None,
) -> Tensor:
    """Mean of the patch tokens (I, h*w, D) that each box (M, 4) touches: (M, D).

    FAST-GOAL's TSL (arXiv 2605.26615), with the image squashed to model_size x model_size.
    """
    if box_image is None:
        box_image = torch.arange(len(boxes), device=tokens.device)
    grid = tokens.unflatten(1, grid_size).to(score_dtype(tokens.dtype))
    ranges = region_grid(boxes, image_sizes[box_image], grid_size, model_size)
    means = [
        grid[i, r1:r2, c1:c2].mean(dim=(0, 1))
        for i, (c1, r1, c2, r2) in zip(box_image.tolist(), ranges.tolist(), strict=True)
    ]
    return (torch.stack(means) if means else grid.new_zeros(0, grid.shape[-1])).to(tokens.dtype)


def span_mean(
    tokens: Tensor,
    spans: Tensor,
    *,
    span_text: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Mean of the tokens (J, T, D) in each half-open span (M, 2), clipped to the context: (M, D).

    An empty span takes the last token of its text's length (default T).
    """
    num_texts, context, dim = tokens.shape
    if span_text is None:
        span_text = torch.arange(len(spans), device=tokens.device)
    if lengths is None:
        lengths = torch.full((num_texts,), context, device=tokens.device)
    wide = tokens.to(score_dtype(tokens.dtype))
    means = []
    for text, (start, end) in zip(
        span_text.tolist(), spans.clamp(0, context).tolist(), strict=True
    ):
        if end <= start:
            end = min(max(int(lengths[text]), 1), context)
            start = end - 1
        means.append(wide[text, start:end].mean(dim=0))
    return (torch.stack(means) if means else wide.new_zeros(0, dim)).to(tokens.dtype)


def token_similarity_loss(pooled: Tensor, local: Tensor, *, mode: str = "diagonal") -> Tensor:
    """FAST-GOAL's TSL: mean of (cos(pooled_b, local_b) - 1)^2; "matrix": equation 14 as printed."""
    cosine = feature_scores(pooled, local, normalize=True)
    if mode == "diagonal":
        return (cosine.diagonal() - 1).square().mean()
    return (
        (cosine - torch.eye(len(cosine), dtype=cosine.dtype, device=cosine.device)).square().mean()
    )


def farthest_point_sampling(
    points: Tensor, num_samples: int, *, start: int = 0, mask: Tensor | None = None
) -> Tensor:
    """Greedy farthest points of (N, L, D): indices (N, num_samples), the first is `start`.

    Squared Euclidean distances by direct differences; the lowest index wins ties. Masked points
    are never chosen while others remain; then the first repeats.
    """
    points = points.to(score_dtype(points.dtype))
    if mask is None:
        mask = points.new_ones(points.shape[:2], dtype=torch.bool)
    batch = torch.arange(len(points), device=points.device)
    chosen = points.new_full((len(points),), start, dtype=torch.long)
    indices = [chosen]
    distance = points.new_full(points.shape[:2], torch.inf)
    taken = torch.zeros_like(mask)
    for _ in range(num_samples - 1):
        taken[batch, chosen] = True
        to_chosen = (points - points[batch, chosen][:, None]).square().sum(dim=2)
        distance = torch.minimum(distance, to_chosen)
        candidate = distance.masked_fill(~mask, -1).argmax(dim=1)
        exhausted = (taken | ~mask).all(dim=1)
        chosen = torch.where(exhausted, start, candidate)
        indices.append(chosen)
    return torch.stack(indices, dim=1)


def soft_cluster_pool(tokens: Tensor, assign_logits: Tensor) -> Tensor:
    """a = softmax over clusters of (N, L, M); out[m] = sum_l a_lm x_l / sum_l a_lm: (N, M, D)."""
    dtype = score_dtype(tokens.dtype)
    share = assign_logits.to(dtype).softmax(dim=2)
    pooled = share.transpose(1, 2) @ tokens.to(dtype) / share.sum(dim=1)[..., None]
    return pooled.to(tokens.dtype)

"""What people write without this library: CLIP's and SigLIP's losses in plain PyTorch.

Both hold the (batch, batch) logits in the dtype of the features, which are (batch, dim); the scale
and the bias have no dimension. Caption i belongs to image i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# (image features, text features, logit scale, logit bias or None) -> loss
FeatureLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def clip_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
) -> Tensor:
    """CLIP's loss from one product, whose transpose serves the captions."""
    logits = (logit_scale * images) @ texts.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
) -> Tensor:
    """SigLIP's loss without a matrix of labels: log σ(-z) and log σ(z) differ by z."""
    assert logit_bias is not None
    logits = (logit_scale * images) @ texts.T + logit_bias
    negatives = F.softplus(logits).sum(dtype=torch.float32)
    return (negatives - logits.diagonal().sum(dtype=torch.float32)) / len(logits)


# ---------------------------------------------------------------------------------------------
# The yardstick for parity
# ---------------------------------------------------------------------------------------------

# Elements of the logits that are held at once, and rows of gradients that are known exactly.
_AREA = {"cpu": 1 << 22, "cuda": 1 << 28}
_SAMPLE = 256


@dataclass(frozen=True)
class Exact:
    """A loss and its gradients, computed in float32 whatever the features are.

    Attributes:
        sample: the rows of the features whose gradients are here, spread over the whole batch: they
            are enough to tell a right backward from a wrong one.
        parameters: gradients of the scale and, where there is one, of the bias.
    """

    loss: Tensor
    sample: Tensor
    images: Tensor  # (len(sample), dim)
    texts: Tensor
    parameters: Tensor


def _parts(images: Tensor) -> Iterator[slice]:
    batch = len(images)
    step = max(1, _AREA[images.device.type] // batch)
    return (slice(at, min(at + step, batch)) for at in range(0, batch, step))


def _sample(batch: int, device: torch.device) -> Tensor:
    return torch.linspace(0, batch - 1, min(batch, _SAMPLE), device=device).round().long()


@torch.no_grad()
def exact_clip_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Exact:
    """Some rows at a time, and twice: log-sum-exps first, then gradients."""
    images, texts, scale = images.float(), texts.float(), logit_scale.float()
    batch = len(images)
    rows, columns = [], images.new_full((batch,), -torch.inf)
    for part in _parts(images):
        logits = scale * (images[part] @ texts.T)
        rows.append(logits.logsumexp(1))
        columns = torch.logaddexp(columns, logits.logsumexp(0))
    row_lse = torch.cat(rows)
    pairs = (images * texts).sum(1)
    loss = (row_lse + columns).double().mean() / 2 - (scale * pairs).double().mean()

    def slopes(similarities: Tensor, own_lse: Tensor, other_lse: Tensor) -> Tensor:
        """Of the loss by these logits, but for the matched pairs."""
        logits = scale * similarities
        own = (logits - own_lse[:, None]).exp_()
        return own.add_(logits.sub_(other_lse).exp_()).div_(2 * batch)

    by_scale = -pairs.double().mean()
    for part in _parts(images):
        similarities = images[part] @ texts.T
        by_scale += (slopes(similarities, row_lse[part], columns) * similarities).sum().double()
    sample = _sample(batch, images.device)
    image_slopes = slopes(images[sample] @ texts.T, row_lse[sample], columns)
    text_slopes = slopes(texts[sample] @ images.T, columns[sample], row_lse)
    return Exact(
        loss, sample,
        scale * (image_slopes @ texts - texts[sample] / batch),
        scale * (text_slopes @ images - images[sample] / batch),
        by_scale.reshape(1),
    )  # fmt: skip


@torch.no_grad()
def exact_sigmoid_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Exact:
    """Some rows at a time."""
    images, texts = images.float(), texts.float()
    scale, bias = logit_scale.float(), logit_bias.float()
    batch = len(images)
    pairs = (images * texts).sum(1).double()
    loss = -(scale * pairs + bias).sum()
    by_scale, by_bias = -pairs.sum(), torch.full_like(pairs[0], -batch)
    for part in _parts(images):
        similarities = images[part] @ texts.T
        logits = scale * similarities + bias
        loss += F.softplus(logits).sum().double()
        slopes = logits.sigmoid_()
        by_bias += slopes.sum().double()
        by_scale += (slopes * similarities).sum().double()
    sample = _sample(batch, images.device)

    def by_features(own: Tensor, other: Tensor) -> Tensor:
        slopes = (scale * (own[sample] @ other.T) + bias).sigmoid_()
        return scale * (slopes @ other - other[sample]) / batch

    return Exact(
        loss / batch, sample, by_features(images, texts), by_features(texts, images),
        torch.stack((by_scale, by_bias)) / batch,
    )  # fmt: skip

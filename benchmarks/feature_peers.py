"""Other people's losses of plain features, behind one signature, so that all do the same work.

    pip install --no-deps inf-cl memeff siglip-kernel
    pip install 'sentence-transformers>=6'

All take unit-length features and the multiplier of the logits, and give the loss that we give; what
they do beside that by default is switched off here. open_clip comes with FastGOAL's models; none of
the others is a dependency. What is not installed, or can not run on the device at hand, is left out
with the reason.

inf-cl (arXiv 2410.17243) has one direction a call, in float32 whatever the features are: about ten
products. memeff takes the temperature as a Python number, so it finds no gradient of it, and
rescales the other gradients unless told not to. siglip-kernel computes the gradients in its
forward, also when nobody wants them. sentence-transformers has a cached loss: the part of it that
turns features into their gradients, some rows at a time, is measured, and the encoding that it is
made for is not; it also takes the scale as a number.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .feature_baselines import FeatureLoss
from .peers import Unavailable, import_peer

CLIP, SIGMOID = "clip_contrastive_loss", "sigmoid_contrastive_loss"

# Rows at a time for those who leave that to the caller. Each part reads, or writes, all of the
# other tower once: fewer rows are slower, more hold more.
ROWS = 1024


@dataclass(frozen=True)
class FeaturePeer:
    """A loss of a package and how to call it.

    Attributes:
        name: of the contender, as tables show it.
        package: whose version the results name.
        make: the loss, given the module, the op and the scale's value as a number.
        trains_scale: whether it gives the gradient of the scale (and of the bias).
        note: what a reader of its figures must know.
    """

    name: str
    package: str
    module: str
    licence: str
    ops: tuple[str, ...]
    make: Callable[[ModuleType, str, float], FeatureLoss]
    devices: tuple[str, ...] = ("cuda",)
    trains_scale: bool = True
    note: str | None = None

    def load(self, op: str, logit_scale: float, device: torch.device) -> FeatureLoss:
        """Its loss of (images, texts, logit_scale, logit_bias).

        Raises:
            Unavailable: not installed, not importable, or not made for this device.
        """
        if device.type not in self.devices:
            raise Unavailable("its kernels need a CUDA device")
        return self.make(import_peer(self.module), op, logit_scale)

    def version(self) -> str | None:
        """The installed version, or None."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _open_clip(module: ModuleType, op: str, logit_scale: float) -> FeatureLoss:
    return module.ClipLoss() if op == CLIP else module.SigLipLoss()


def _open_clip_chunked(module: ModuleType, op: str, logit_scale: float) -> FeatureLoss:
    if "chunk_size" not in inspect.signature(module.SigLipLoss).parameters:
        raise Unavailable("SigLipLoss of the installed open_clip has no chunk_size")
    return module.SigLipLoss(chunk_size=ROWS)


def _inf_cl(module: ModuleType, op: str, logit_scale: float) -> FeatureLoss:
    def loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # Its tiles hold a "head" of the features, a power of two of at most 256 elements.
        head = math.gcd(images.shape[1], 256)
        rows = module.cal_flash_loss(images, texts, scale=scale, head_dim=head)
        columns = module.cal_flash_loss(texts, images, scale=scale, head_dim=head)
        return (rows.mean() + columns.mean()) / 2

    return loss


def _memeff(module: ModuleType, op: str, logit_scale: float) -> FeatureLoss:
    # stable=True, its default, would multiply the gradients by sqrt(batch * temperature).
    given = module.MemoryEfficientCLIPLoss(
        temperature=1 / logit_scale, normalized_inputs=True, stable=False
    )
    return lambda images, texts, scale, bias: given(images, texts)


def _siglip_kernel(module: ModuleType, op: str, logit_scale: float) -> FeatureLoss:
    return lambda images, texts, scale, bias: module.fused_siglip_loss(
        images, texts, scale.log(), bias
    )


class _GradientsFirst(torch.autograd.Function):
    """The loss of someone who has the gradients by the time of the value, and keeps them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, calculate: Callable[..., Tensor]):
        with torch.enable_grad():
            leaves = [features.detach().requires_grad_() for features in (images, texts)]
            loss = calculate([[leaf] for leaf in leaves], with_backward=True)
        ctx.gradients = [leaf.grad for leaf in leaves]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # pyrefly: ignore[bad-override]
        images, texts = ctx.gradients
        return images * upstream, texts * upstream, None


def _sentence_transformers(module: ModuleType, op: str, logit_scale: float) -> FeatureLoss:
    cached = module.CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),  # stands for the encoder, which is not called
        scale=logit_scale,
        similarity_fct=torch.nn.functional.linear,  # a @ b.T: the features have unit length
        mini_batch_size=ROWS,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )

    def loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if images.requires_grad or texts.requires_grad:
            return _GradientsFirst.apply(images, texts, cached.calculate_loss)
        return cached.calculate_loss([[images], [texts]])

    return loss


FEATURE_PEERS = (
    FeaturePeer(
        "open_clip", "open-clip-torch", "open_clip.loss", "MIT", (CLIP, SIGMOID), _open_clip,
        devices=("cuda", "cpu"),
    ),
    FeaturePeer(
        "open_clip chunked", "open-clip-torch", "open_clip.loss", "MIT", (SIGMOID,),
        _open_clip_chunked, devices=("cuda", "cpu"), note=f"SigLipLoss(chunk_size={ROWS})",
    ),
    FeaturePeer("memeff", "memeff", "memeff", "Apache-2.0", (CLIP,), _memeff, trains_scale=False,
                note="no gradient of the scale"),
    FeaturePeer("siglip-kernel", "siglip-kernel", "siglip_kernel", "Apache-2.0", (SIGMOID,),
                _siglip_kernel, note="computes the gradients in its forward"),
    FeaturePeer(
        "sentence-transformers cached", "sentence-transformers",
        "sentence_transformers.sentence_transformer.losses", "Apache-2.0", (CLIP,),
        _sentence_transformers, devices=("cuda", "cpu"), trains_scale=False,
        note=f"CachedMultipleNegativesRankingLoss on given features, {ROWS} rows at a time; no "
        "gradient of the scale",
    ),
    # The licence file of inf-cl is Apache-2.0's; its metadata says MIT.
    FeaturePeer("inf-cl", "inf-cl", "inf_cl", "Apache-2.0", (CLIP,), _inf_cl,
                note="multiplies in float32 (TF32) whatever the features are"),
)  # fmt: skip

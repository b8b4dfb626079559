"""The losses of plain features that are measured: sizes, inputs, and every contender's way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_kernels import clip_contrastive_loss, sigmoid_contrastive_loss
from fastgoal_kernels.backends import BackendError, choose_backend

from . import feature_baselines
from .feature_baselines import FeatureLoss
from .feature_peers import CLIP, FEATURE_PEERS, SIGMOID
from .peers import Unavailable

# A trained CLIP's scale, which is also the most that its trainers allow, and where SigLIP starts.
LOGIT_SCALE = {CLIP: 100.0, SIGMOID: 10.0}
LOGIT_BIAS = {SIGMOID: -10.0}

# Batch and dim that the targets are about.
PROMISED = (65_536, 768)

# Cosines as trained models have them: all features lean one way, so that any two of them share
# this much; and a matched pair's own part has a cosine between these two, so that the batch has
# easy pairs and hard ones and the loss is neither zero nor that of noise.
SHARED = 0.15
MATCHED = (0.05, 0.35)


@dataclass(frozen=True)
class FeatureWorkload:
    """One row of the sweep, without the contender.

    Attributes:
        op: "clip_contrastive_loss" or "sigmoid_contrastive_loss".
        stage: "inference" (no gradients wanted) or "forward+backward".
        batch: images, and as many captions.
    """

    op: str
    stage: str
    batch: int
    dim: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def describe(self) -> str:
        """One line for the screen and the tables."""
        return f"{self.op} {self.stage}: B {self.batch:,}, D {self.dim}, {self.dtype}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class FeatureInputs(NamedTuple):
    """What a loss is called with. Leaves that want gradients unless the stage is inference."""

    images: Tensor  # (batch, dim), of unit length
    texts: Tensor
    logit_scale: Tensor  # 0-dim float32
    logit_bias: Tensor | None  # of the sigmoid loss


def make_inputs(work: FeatureWorkload, device: torch.device, seed: int = 0) -> FeatureInputs:
    """The inputs of a workload; the same seed gives the same features for both losses."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def directions(count: int) -> Tensor:
        return F.normalize(torch.randn(count, work.dim, generator=generator, device=device), dim=-1)

    shared = directions(1)
    trains = work.stage != "inference"

    def features(own: Tensor) -> Tensor:
        mixed = SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own
        return F.normalize(mixed, dim=-1).to(work.torch_dtype).requires_grad_(trains)

    low, high = MATCHED
    random = torch.rand(work.batch, 1, generator=generator, device=device)
    cosine = low + (high - low) * random
    texts = directions(work.batch)
    images = cosine * texts + (1 - cosine**2).sqrt() * directions(work.batch)
    scale = torch.tensor(LOGIT_SCALE[work.op], device=device)
    bias = None
    if work.op in LOGIT_BIAS:
        bias = torch.tensor(LOGIT_BIAS[work.op], device=device).requires_grad_(trains)
    return FeatureInputs(features(images), features(texts), scale.requires_grad_(trains), bias)


def useful_flop(work: FeatureWorkload) -> float:
    """Of a loss that holds no logits: one product without gradients, four or three with them.

    A softmax needs whole rows before its first gradient and multiplies twice; a sigmoid does not.
    """
    products = 1 if work.stage == "inference" else {CLIP: 4, SIGMOID: 3}[work.op]
    return 2.0 * products * work.batch**2 * work.dim


@dataclass(frozen=True)
class Way:
    """A contender's way of doing the work."""

    loss: FeatureLoss
    trains_scale: bool = True

    def leaves(self, inputs: FeatureInputs) -> tuple[Tensor, ...]:
        """Those inputs whose gradients it gives."""
        given = inputs if self.trains_scale else inputs[:2]
        return tuple(leaf for leaf in given if leaf is not None)


def _fastgoal(op: str, backend: str) -> FeatureLoss:
    def loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return clip_contrastive_loss(images, texts, scale, backend=backend)
        return sigmoid_contrastive_loss(images, texts, scale, bias, backend=backend)

    return loss


COMPILED = "torch.compile of "


def build(name: str, work: FeatureWorkload, inputs: FeatureInputs) -> Way:
    """A contender's way of doing the work.

    Raises:
        Unavailable: it can not do this work here; the message says why.
    """
    if name.startswith("fastgoal "):
        backend = name.removeprefix("fastgoal ")
        try:
            choose_backend(work.op, backend, inputs.images, inputs.texts)
        except BackendError as error:
            raise Unavailable(str(error)) from error
        return Way(_fastgoal(work.op, backend))
    if name.startswith(COMPILED):  # static shapes: the best that it can do for one workload
        way = build(name.removeprefix(COMPILED), work, inputs)
        return Way(torch.compile(way.loss, dynamic=False), way.trains_scale)
    if name == "eager":
        plain = {CLIP: feature_baselines.clip_loss, SIGMOID: feature_baselines.sigmoid_loss}
        return Way(plain[work.op])
    peer = next(peer for peer in FEATURE_PEERS if peer.name == name)
    loss = peer.load(work.op, LOGIT_SCALE[work.op], inputs.images.device)
    return Way(loss, peer.trains_scale)


# In the order in which they are measured: should the time run out, the last are missed least.
CONTENDERS = (
    "fastgoal triton",
    "fastgoal torch",
    *(peer.name for peer in FEATURE_PEERS),
    "eager",
    COMPILED + "open_clip",
)


def takes_part(contender: str, work: FeatureWorkload) -> bool:
    """Peers have one loss or both."""
    return all(work.op in peer.ops for peer in FEATURE_PEERS if peer.name == contender)


def worth_compiling(work: FeatureWorkload) -> bool:
    """Compiling takes seconds a size: of a GPU's many only that of the targets."""
    return work.batch < 8192 or (work.batch, work.dim) == PROMISED


def sweep(cuda: bool, quick: bool) -> list[FeatureWorkload]:
    """The workloads of `python -m benchmarks.device`: the real sizes on a GPU, small ones else.

    Small sizes come first: a contender whose calls grow too long is stopped there.
    """
    if quick:
        sizes, dtype, alone = [(24, 16)], "float32", (24, 16)
    elif cuda:
        batches, dims = (8_192, 32_768, 65_536, 131_072), (512, 768, 1024)
        sizes, dtype, alone = [(b, d) for b in batches for d in dims], "bfloat16", PROMISED
    else:
        sizes, dtype, alone = [(1024, 128)], "float32", (1024, 128)
    return [
        FeatureWorkload(op, stage, batch, dim, dtype)
        for op in (CLIP, SIGMOID)
        for batch, dim in sizes
        for stage in ("inference", "forward+backward")
        if stage != "inference" or (batch, dim) == alone
    ]

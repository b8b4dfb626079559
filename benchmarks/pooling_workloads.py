"""The text-conditioned loss as it is measured: sizes, inputs, and every contender's way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgoal_kernels import TextConditionedPool, text_conditioned_sigmoid_loss
from fastgoal_kernels.backends import BackendError, choose_backend

from .peers import Unavailable
from .pooling_baselines import PoolingLoss, eager_loss, published_loss

OP = "text_conditioned_sigmoid_loss"
ALL, SAMPLE = "all", "sample"
LOGIT_SCALE = 10.0

# Images and captions an image that the targets are about; every image meets every caption in the
# larger one, which is a batch of 256 on each of eight devices.
PROMISED, LARGE = (256, 8), (2048, 8)


@dataclass(frozen=True)
class PoolingWorkload:
    """One row of the sweep, without the contender.

    Attributes:
        negatives: "all" captions of other images, or "sample", one of each.
        tokens: of an image.
    """

    negatives: str
    images: int
    captions_per_image: int
    tokens: int
    dim: int
    heads: int
    dtype: str
    op: str = OP
    stage: str = "forward+backward"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def texts(self) -> int:
        return self.images * self.captions_per_image

    @property
    def columns(self) -> int:
        """Captions that an image is compared with."""
        return self.texts if self.negatives == ALL else self.captions_per_image + self.images - 1

    def describe(self) -> str:
        """One line for the screen and the tables."""
        return describe(self.as_json())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(row: dict[str, Any]) -> str:
    """What a row of this section measures."""
    texts = row["images"] * row["captions_per_image"]
    return (
        f"{row['op']}, {row['negatives']}, {row['stage']}: {row['images']:,} × {texts:,}, "
        f"K {row['captions_per_image']}, {row['tokens']} tokens, D {row['dim']}, {row['dtype']}"
    )


class PoolingInputs(NamedTuple):
    """What the loss is called with; gradients are wanted of all but the offsets."""

    pool: TextConditionedPool
    images: Tensor  # (images, tokens, dim)
    texts: Tensor  # (images * K, dim)
    logit_scale: Tensor  # 0-dim float32, like the bias
    logit_bias: Tensor
    offsets: Tensor | None  # (images, images - 1), of sampled negatives

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (
            self.images, self.texts, self.logit_scale, self.logit_bias, *self.pool.parameters(),
        )  # fmt: skip


def make_inputs(work: PoolingWorkload, device: torch.device, seed: int = 0) -> PoolingInputs:
    """The inputs of a workload; the same seed gives the same tokens whatever the negatives.

    Parameters are float32, as trainers keep them, and none is zero. At this bias negatives pull
    about twice as much as positives, so that a wrong gradient of either is seen, and that of the
    bias is not what is left of two that cancel. (Trainers start far below, where the negatives'
    share can not be told from rounding.)
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    images = random(work.images, work.tokens, work.dim).to(work.torch_dtype).requires_grad_()
    texts = random(work.texts, work.dim).to(work.torch_dtype).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = TextConditionedPool(work.dim, work.heads)
        for parameter in pool.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    offsets = None
    if work.negatives == SAMPLE:
        shape = (work.images, work.images - 1)
        offsets = torch.randint(work.captions_per_image, shape, generator=generator, device=device)
    positives = work.captions_per_image
    bias = math.log(2 * positives / max(work.columns - positives, 1))
    scale, shift = (torch.tensor(x, device=device).requires_grad_() for x in (LOGIT_SCALE, bias))
    return PoolingInputs(pool.to(device), images, texts, scale, shift, offsets)


def useful_flop(work: PoolingWorkload) -> float:
    """Of a step: every product once, and twice in the backward. Computing again is not useful."""
    pairs = work.images * work.columns
    attention = 2 * (work.tokens + 1) * work.dim
    once = (2 * work.images * work.tokens + work.texts + pairs) * work.dim**2 + pairs * attention
    return 3 * 2.0 * once


Way = Callable[[PoolingInputs], Tensor]


def _fastgoal(work: PoolingWorkload, backend: str) -> Way:
    def loss(inputs: PoolingInputs) -> Tensor:
        return text_conditioned_sigmoid_loss(
            inputs.pool, inputs.images, inputs.texts, inputs.logit_scale, inputs.logit_bias,
            captions_per_image=work.captions_per_image, negatives=work.negatives,
            negative_offsets=inputs.offsets, backend=backend,
        )  # fmt: skip

    return loss


def _plain(work: PoolingWorkload, loss: PoolingLoss) -> Way:
    """Half precision by autocast, as trainers have it: the parameters stay float32."""

    def call(inputs: PoolingInputs) -> Tensor:
        narrow = work.torch_dtype != torch.float32
        device = inputs.images.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=narrow):
            return loss(*inputs[:5], work.captions_per_image, inputs.offsets)

    return call


EAGER, PUBLISHED = "eager", "published form"
COMPILED = "torch.compile of eager"


def build(name: str, work: PoolingWorkload, inputs: PoolingInputs) -> Way:
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
        return _fastgoal(work, backend)
    if name == COMPILED:  # static shapes: the best that it can do for one workload
        return torch.compile(_plain(work, eager_loss), dynamic=False)
    return _plain(work, {EAGER: eager_loss, PUBLISHED: published_loss}[name])


# In the order in which they are measured: should the time run out, the last are missed least.
CONTENDERS = ("fastgoal triton", "fastgoal torch", PUBLISHED, EAGER, COMPILED)

NOTES = {
    PUBLISHED: "a restatement in plain PyTorch of the loss that FLAIR and CAFT train with: each "
    "caption's query projected for each image, labels (and sampled columns) made in Python; nobody "
    "published a training step with all negatives",
    EAGER: "plain PyTorch at its best: queries once a caption, keys and values once an image, "
    "PyTorch's own attention, all that the pairs pooled in memory",
}


def worth_compiling(work: PoolingWorkload) -> bool:
    """Compiling takes seconds, for what does not fit in the end."""
    return (work.images, work.captions_per_image) != LARGE


def sweep(cuda: bool, quick: bool) -> list[PoolingWorkload]:
    """The workloads of `python -m benchmarks.device`: the real sizes on a GPU, small ones else."""
    if quick:
        sizes, tokens, dim, heads, dtype = [(SAMPLE, 5, 3), (ALL, 5, 3)], 6, 16, 2, "float32"
    elif cuda:
        sizes = [(SAMPLE, *PROMISED), (ALL, *PROMISED), (ALL, *LARGE)]
        tokens, dim, heads, dtype = 64, 512, 8, "bfloat16"
    else:
        sizes, tokens, dim, heads, dtype = [(SAMPLE, 16, 4), (ALL, 16, 4)], 64, 128, 4, "float32"
    return [PoolingWorkload(*size, tokens, dim, heads, dtype) for size in sizes]

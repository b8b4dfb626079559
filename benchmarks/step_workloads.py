"""A whole training step of CAFT as it is measured: sizes, inputs, and every contender's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgoal_kernels import HierarchicalAlignmentLoss, use_backend
from fastgoal_kernels.backends import BackendError, choose_backend
from fastgoal_models.caft import Caft

from .parity import relative_error, try_check
from .peers import Unavailable
from .pooling_workloads import ALL, SAMPLE
from .step_baselines import published_hierarchical_loss, published_ops

OP = "CAFT training step"
PUBLISHED = "published form"
CONTENDERS = ("fastgoal triton", "fastgoal torch", PUBLISHED)


@dataclass(frozen=True)
class StepWorkload:
    """One row of the sweep, without the contender: loss and gradients of all parameters."""

    model: str  # a configuration of Caft
    superpixels: str
    images: int
    captions_per_image: int
    negatives: str
    dtype: str  # of autocast; parameters are float32
    op: str = OP
    stage: str = "forward+backward"

    def describe(self) -> str:
        """One line for the screen and the tables."""
        return describe(self.as_json())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(row: dict[str, Any]) -> str:
    """What a row of this section measures."""
    return (
        f"{row['op']}, {row['model']}, {row['superpixels']}, {row['negatives']} negatives, "
        f"{row['stage']}: {row['images']} images, K {row['captions_per_image']}, {row['dtype']}"
    )


class StepInputs(NamedTuple):
    """A batch, the model it trains, and which captions are its sampled negatives."""

    model: Caft
    images: Tensor  # (N, 3, S, S)
    texts: Tensor  # (N, K, 77)
    offsets: Tensor | None  # (N, N - 1)

    @property
    def leaves(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def make_inputs(work: StepWorkload, device: torch.device, seed: int = 0) -> StepInputs:
    """Random weights, smooth random pictures, captions of about a third of the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Caft.create(work.model, superpixels=work.superpixels).to(device).train()
    generator = torch.Generator().manual_seed(seed)
    size, context = model.config.image_size, model.config.text.context_length
    coarse = torch.randn(work.images, 3, size // 8, size // 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    texts = torch.zeros(work.images, work.captions_per_image, context, dtype=torch.long)
    lengths = torch.randint(8, 40, texts.shape[:2], generator=generator)
    words = torch.randint(1000, 40000, texts.shape, generator=generator)
    place = torch.arange(context)
    texts = torch.where(place < lengths[..., None], words, texts)
    texts[..., 0] = model.config.text.vocab_size - 2
    texts = torch.where(place == lengths[..., None], model.config.text.vocab_size - 1, texts)
    offsets = None
    if work.negatives == SAMPLE:
        shape = (work.images, work.images - 1)
        offsets = torch.randint(work.captions_per_image, shape, generator=generator).to(device)
    _without_dropout(model)
    return StepInputs(model, images.to(device), texts.to(device), offsets)


def _without_dropout(model: Caft) -> None:
    """Its random numbers would not be the same for every contender."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


Way = Callable[[StepInputs], Tensor]


def build(name: str, work: StepWorkload, inputs: StepInputs) -> Way:
    """A contender's loss of a batch.

    Raises:
        Unavailable: it can not do this work here; the message says why.
    """
    device = inputs.images.device
    narrow = work.dtype != "float32"

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=narrow)

    def published(own: StepInputs) -> Tensor:
        with published_ops(own.model), autocast():
            features = own.model(own.images, own.texts)
            return published_hierarchical_loss(**features, offsets=own.offsets)

    if name == PUBLISHED:
        return published
    backend = name.removeprefix("fastgoal ")
    try:
        choose_backend("text_conditioned_sigmoid_loss", backend, inputs.images)
    except BackendError as error:
        raise Unavailable(str(error)) from error
    loss = HierarchicalAlignmentLoss(work.captions_per_image, work.negatives)

    def ours(own: StepInputs) -> Tensor:
        with use_backend(backend), autocast():
            # The negatives that the rivals have, too.
            return loss(**own.model(own.images, own.texts), negative_offsets=own.offsets)

    return ours


# ---------------------------------------------------------------------------------------------
# Parity: the published form in float32
# ---------------------------------------------------------------------------------------------

# Float32 sums in another order, through a dozen layers there and back. In bf16 every layer rounds
# (2^-9), and a farthest point may be another one of two that are nearly as far.
LIMITS = {
    "float32": {"loss": 1e-4, "gradients": 1e-2},
    "bfloat16": {"loss": 2e-2, "gradients": 0.3},
}


def limits(work: StepWorkload) -> dict[str, float]:
    """What anyone's errors may be."""
    return LIMITS[work.dtype]


@lru_cache(maxsize=1)  # of one workload at a time: the gradients are as large as the model
def _truth(work: StepWorkload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and all gradients, in one row."""
    exact = StepWorkload(**work.as_json() | {"dtype": "float32"})
    inputs = make_inputs(exact, device)
    loss = build(PUBLISHED, exact, inputs)(inputs)
    return loss.detach(), _in_one_row(gradients(loss, inputs))


def gradients(loss: Tensor, inputs: StepInputs) -> tuple[Tensor, ...]:
    """Of all parameters; zeros where the loss does not depend on one."""
    return torch.autograd.grad(loss, inputs.leaves, allow_unused=True, materialize_grads=True)


def _in_one_row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def measure_errors(work: StepWorkload, way: Way, inputs: StepInputs) -> dict[str, float]:
    """Relative errors of what the contender computes on these inputs."""
    loss, wanted = _truth(work, inputs.images.device)
    found = way(inputs)
    return {
        "loss": relative_error(found.detach(), loss),
        "gradients": relative_error(_in_one_row(gradients(found, inputs)), wanted),
    }


def run_checks(device: torch.device) -> list[dict[str, Any]]:
    """A small step by both backends against the published form."""

    def check(backend: str, negatives: str) -> float:
        work = StepWorkload("caft-xs", "grid", 3, 8, negatives, "float32")
        inputs = make_inputs(work, device)
        errors = measure_errors(work, build(f"fastgoal {backend}", work, inputs), inputs)
        return max(errors.values())

    return [
        try_check(f"{backend} {OP} {negatives}", partial(check, backend, negatives))
        for backend in ("triton", "torch")
        for negatives in (ALL, SAMPLE)
    ]


def sweep(cuda: bool, quick: bool) -> list[StepWorkload]:
    """The workloads of `python -m benchmarks.device`: CAFT-B on a GPU, the smallest model else."""
    if cuda and not quick:
        return [
            StepWorkload("caft-b", "sfcn", 256, 8, negatives, "bfloat16")
            for negatives in (SAMPLE, ALL)
        ]
    return [StepWorkload("caft-xs", "grid", 2 if quick else 8, 8, SAMPLE, "float32")]

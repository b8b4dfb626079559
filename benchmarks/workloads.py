"""The MaxSim work that is measured: sizes, inputs, and every contender's way of doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgoal_kernels import maxsim_contrastive_loss, maxsim_scores
from fastgoal_kernels.backends import BackendError, choose_backend

from . import baselines
from .baselines import Scores
from .cpu_peers import CPU_PEERS, try_elsewhere
from .peers import PEERS, Captions, Unavailable

LOGIT_SCALE = 1 / 0.07
BOTH = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Workload:
    """One row of the sweep, without the contender.

    Attributes:
        op: "maxsim_scores" or "maxsim_contrastive_loss" (softmax objective).
        direction: "text_to_image" or "both".
        stage: "inference" (no gradients wanted), "forward" (of a training step, so that the
            backward's winners are kept) or "forward+backward".
        layout: captions that are "full", "padded" with a mask, or "packed" with offsets; the last
            two at `fill` of `text_tokens` on average.
    """

    op: str
    direction: str
    stage: str
    images: int
    texts: int
    text_tokens: int
    image_tokens: int
    dim: int
    dtype: str
    layout: str = "full"
    fill: float = 1.0

    @property
    def directions(self) -> tuple[str, ...]:
        return BOTH if self.direction == "both" else (self.direction,)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def describe(self) -> str:
        """One line for the screen and the tables."""
        layout = "" if self.layout == "full" else f", {self.layout} at {self.fill:.0%}"
        return (
            f"{self.op} {self.direction} {self.stage}: {self.images}×{self.texts}, "
            f"T {self.text_tokens}, R {self.image_tokens}, D {self.dim}, {self.dtype}{layout}"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """Unit-length random tokens. Leaves that want gradients unless the stage is inference."""

    images: Tensor  # (images, image_tokens, dim)
    captions: Captions

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.images, self.captions.tokens


def make_inputs(work: Workload, device: torch.device, seed: int = 0) -> Inputs:
    """The inputs of a workload; the same seed gives the same tokens in every layout."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        random = torch.randn(*shape, work.dim, generator=generator, device=device)
        return F.normalize(random, dim=-1).to(work.torch_dtype)

    trains = work.stage != "inference"
    images = tokens(work.images, work.image_tokens).requires_grad_(trains)
    padded = tokens(work.texts, work.text_tokens)
    if work.layout == "full":
        return Inputs(images, Captions(padded.requires_grad_(trains), work.text_tokens))
    # Evenly spread around the mean, from short captions to ones that fill the context.
    reach = min(work.fill, 1 - work.fill)
    share = torch.linspace(work.fill - reach, work.fill + reach, work.texts, device=device)
    lengths = (share * work.text_tokens).round().clamp(1, work.text_tokens)
    order = torch.randperm(work.texts, generator=generator, device=device)
    lengths = lengths[order].to(torch.int32)
    mask = torch.arange(work.text_tokens, device=device) < lengths[:, None]
    if work.layout == "padded":
        padded = padded.masked_fill(~mask[..., None], 0).requires_grad_(trains)
        return Inputs(images, Captions(padded, work.text_tokens, lengths, mask=mask))
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = padded[mask].requires_grad_(trains)
    return Inputs(images, Captions(packed, int(lengths.max()), lengths, offsets=offsets))


def useful_flop(work: Workload, captions: Captions) -> float:
    """Of one forward: the products of real tokens, once, whatever the directions."""
    texts = work.texts * work.text_tokens
    if captions.lengths is not None:
        texts = int(captions.lengths.sum())
    return 2.0 * work.images * work.image_tokens * texts * work.dim


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within: float32 products at torch.set_float32_matmul_precision(precision)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


Work = Callable[[Inputs], Any]  # scores by direction, or the loss


def _fastgoal(work: Workload, backend: str) -> Work:
    def kwargs(captions: Captions) -> dict[str, Any]:
        layout = {"text_mask": captions.mask, "text_offsets": captions.offsets}
        longest = captions.longest if captions.offsets is not None else None
        return {**layout, "max_text_tokens": longest, "direction": work.direction}

    def scores(inputs: Inputs) -> Scores:
        found = maxsim_scores(
            inputs.images, inputs.captions.tokens, backend=backend, **kwargs(inputs.captions)
        )
        return dict(
            zip(work.directions, (found,) if isinstance(found, Tensor) else found, strict=True)
        )

    def loss(inputs: Inputs) -> Tensor:
        return maxsim_contrastive_loss(
            inputs.images, inputs.captions.tokens, LOGIT_SCALE, backend=backend,
            **kwargs(inputs.captions),
        )  # fmt: skip

    return scores if work.op == "maxsim_scores" else loss


def _with_loss(work: Workload, score: Callable[[Inputs], Scores]) -> Work:
    if work.op == "maxsim_scores":
        return score
    return lambda inputs: baselines.filip_loss(score(inputs), LOGIT_SCALE)


EAGER = {"eager amax": baselines.scores_amax, "eager max": baselines.scores_max}
COMPILED = {"torch.compile": "eager amax", "torch.compile max": "eager max"}


def _eager(work: Workload, score: Callable[..., Scores]) -> Work:
    if work.layout == "packed":
        raise Unavailable("takes padded captions only; see the padded row")
    return _with_loss(
        work,
        lambda inputs: score(
            inputs.images, inputs.captions.tokens, work.directions, inputs.captions.mask
        ),
    )


def build(name: str, work: Workload, inputs: Inputs) -> Work:
    """A contender's way of doing the work.

    Raises:
        Unavailable: it can not do this work here; the message says why.
    """
    if name.startswith("fastgoal "):
        backend = name.removeprefix("fastgoal ")
        try:
            choose_backend(work.op, backend, *inputs.leaves)
        except BackendError as error:
            raise Unavailable(str(error)) from error
        return _fastgoal(work, backend)
    if name in EAGER:
        return _eager(work, EAGER[name])
    if name in COMPILED:  # static shapes: the best that it can do for one workload
        return torch.compile(_eager(work, EAGER[COMPILED[name]]), dynamic=False)
    device = inputs.images.device
    ways = [peer for peer in (*PEERS, *CPU_PEERS) if peer.name == name]
    peer = next((way for way in ways if way.device == device.type), ways[0])
    score = peer.load(device)
    if peer.native:
        try_elsewhere(peer, work.text_tokens, work.image_tokens, work.dim)
    return _with_loss(work, lambda inputs: score(inputs.images, inputs.captions, work.directions))


# In the order in which they are measured: should the time run out, the last are missed least.
CONTENDERS = (
    "fastgoal triton",
    "fastgoal torch",
    "eager amax",
    *(peer.name for peer in PEERS),
    "eager max",
    "torch.compile",
)


def takes_part(contender: str, work: Workload) -> bool:
    """The forward of a training step on its own is only of interest as a share of our own step."""
    return work.stage != "forward" or contender.startswith("fastgoal ")


def sweep(cuda: bool, quick: bool) -> list[Workload]:
    """The workloads of `python -m benchmarks.device`: the real sizes on a GPU, tiny ones else."""
    if quick:
        size, dims, text_tokens, long_text = (6, 6), (16,), 5, 12
        image_tokens, dtype = 7, "float32"
    elif cuda:
        size, dims, text_tokens, long_text = (1024, 1024), (512, 768), 77, 248
        image_tokens, dtype = 196, "bfloat16"
    else:
        size, dims, text_tokens, long_text = (16, 16), (128,), 77, 248
        image_tokens, dtype = 196, "float32"

    def work(op: str, direction: str, stage: str, dim: int, **more: Any) -> Workload:
        tokens = more.pop("text_tokens", text_tokens)
        return Workload(op, direction, stage, *size, tokens, image_tokens, dim, dtype, **more)

    one, both = "text_to_image", "both"
    plain = [
        ("maxsim_scores", one, "inference"),
        ("maxsim_scores", both, "inference"),
        ("maxsim_scores", one, "forward"),
        ("maxsim_scores", both, "forward"),
        ("maxsim_contrastive_loss", one, "forward"),
        ("maxsim_contrastive_loss", one, "forward+backward"),
        ("maxsim_contrastive_loss", both, "forward"),
        ("maxsim_contrastive_loss", both, "forward+backward"),
    ]
    ragged = [
        ("maxsim_scores", one, "inference"),
        ("maxsim_contrastive_loss", both, "forward+backward"),
    ]
    return [work(*kind, dim) for dim in dims for kind in plain] + [
        work(*kind, dims[0], text_tokens=long_text, layout=layout, fill=0.55)
        for kind in ragged
        for layout in ("padded", "packed")
    ]

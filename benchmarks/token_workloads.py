"""The token ops that are measured: sizes, inputs, and every contender's way of doing the work.

farthest_point_sampling    CAFT's graph pooling chooses among an image's tokens
region_mean + span_mean + token_similarity_loss
                           FAST-GOAL's TSL of one region and one sentence an image
soft_cluster_pool          CAFT's graph pooling averages tokens into clusters
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgoal_kernels import (
    farthest_point_sampling,
    reference,
    region_mean,
    soft_cluster_pool,
    span_mean,
    token_similarity_loss,
)
from fastgoal_kernels.backends import BackendError, choose_backend

from .peers import Unavailable

FARTHEST = "farthest_point_sampling"
SIMILARITY = "region_mean + span_mean + token_similarity_loss"
CLUSTERS = "soft_cluster_pool"
# The public functions that a row calls.
OPS = {
    FARTHEST: (FARTHEST,),
    SIMILARITY: ("region_mean", "span_mean", "token_similarity_loss"),
    CLUSTERS: (CLUSTERS,),
}
COUNTED = {FARTHEST: "{tokens} points → {count}", SIMILARITY: "{tokens} patches, {count} words",
           CLUSTERS: "{tokens} tokens → {count}"}  # fmt: skip

# Side of the square input that the patches cut up.
MODEL_SIZE = 224


@dataclass(frozen=True)
class TokenWorkload:
    """One row of the sweep, without the contender.

    Attributes:
        op: a key of OPS.
        stage: "forward+backward", or "inference" of what has no gradient.
        tokens: of an image: patches or points.
        count: points that are chosen, words of a caption, or clusters.
    """

    op: str
    stage: str
    images: int
    tokens: int
    count: int
    dim: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def describe(self) -> str:
        """One line for the screen and the tables."""
        return describe(self.as_json())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(row: dict[str, Any]) -> str:
    """What a row of this section measures."""
    size = COUNTED[row["op"]].format(**row)
    return (
        f"{row['op']}, {row['stage']}: {row['images']} images, {size}, D {row['dim']}, "
        f"{row['dtype']}"
    )


class TokenInputs(NamedTuple):
    """What the ops are called with; gradients are wanted of `leaves`."""

    leaves: tuple[Tensor, ...]
    others: tuple[Any, ...] = ()


def make_inputs(work: TokenWorkload, device: torch.device, seed: int = 0) -> TokenInputs:
    """Random tokens; boxes and spans of a tenth to all of their image or caption."""
    generator = torch.Generator(device=device).manual_seed(seed)
    trains = work.stage != "inference"

    def tokens(*shape: int) -> Tensor:
        random = torch.randn(*shape, generator=generator, device=device)
        return random.to(work.torch_dtype).requires_grad_(trains)

    def stretches(count: int) -> tuple[Tensor, Tensor]:
        """Starts and ends, as shares of the whole."""
        length, place = torch.rand(2, count, generator=generator, device=device)
        length = 0.1 + 0.9 * length
        return place * (1 - length), place * (1 - length) + length

    images = tokens(work.images, work.tokens, work.dim)
    if work.op == FARTHEST:
        return TokenInputs((images,), (work.count,))
    if work.op == CLUSTERS:
        logits = tokens(work.images, work.tokens, work.count)
        upstream = tokens(work.images, work.count, work.dim).detach()
        return TokenInputs((images, logits), (upstream,))
    words = tokens(work.images, work.count, work.dim)
    crops, sentences = (tokens(work.images, work.dim) for _ in range(2))
    sizes = torch.tensor([640, 480], device=device).expand(work.images, 2).contiguous()
    (left, right), (top, bottom) = (stretches(work.images) for _ in range(2))
    boxes = torch.stack((left * 640, top * 480, right * 640, bottom * 480), dim=1)
    start, end = (work.count * share for share in stretches(work.images))
    spans = torch.stack((start.floor(), end.ceil()), dim=1).long()
    side = round(work.tokens**0.5)
    return TokenInputs((images, words, crops, sentences), (boxes, sizes, (side, side), spans))


# Outputs and, after them, the gradients of the leaves, if any are wanted.
Way = Callable[[TokenInputs], tuple[Tensor, ...]]
Choose = Callable[[Tensor, int], Tensor]


def _choosing(choose: Choose) -> Way:
    return lambda inputs: (choose(inputs.leaves[0], inputs.others[0]),)


def _similarity(backend: dict[str, str | None]) -> Way:
    """TSL of the regions and TSL of the spans."""

    def call(inputs: TokenInputs) -> tuple[Tensor, ...]:
        patches, words, crops, sentences = inputs.leaves
        boxes, sizes, grid, spans = inputs.others
        regions = region_mean(
            patches, boxes, sizes, grid, MODEL_SIZE, backend=backend["region_mean"]
        )
        parts = span_mean(words, spans, backend=backend["span_mean"])
        tsl = backend["token_similarity_loss"]
        loss = token_similarity_loss(regions, crops, backend=tsl)
        loss = loss + token_similarity_loss(parts, sentences, backend=tsl)
        return loss, *torch.autograd.grad(loss, inputs.leaves)

    return call


def _clusters(pool: Callable[[Tensor, Tensor], Tensor]) -> Way:
    def call(inputs: TokenInputs) -> tuple[Tensor, ...]:
        pooled = pool(*inputs.leaves)
        return pooled, *torch.autograd.grad(pooled, inputs.leaves, inputs.others[0])

    return call


@torch.no_grad()
def gram_farthest_points(points: Tensor, num_samples: int) -> Tensor:
    """A batched greedy loop over squared distances made once, of a product in float32.

    Faster than differences, and less exact: |a|² + |b|² - 2 <a, b> cancels for close points.
    """
    wide = points.float()
    squares = wide.square().sum(dim=2)
    distances = squares[:, :, None] + squares[:, None, :] - 2 * wide @ wide.mT
    batch = torch.arange(len(points), device=points.device)
    chosen = torch.zeros_like(batch)
    indices, nearest = [chosen], distances[batch, chosen]
    for _ in range(num_samples - 1):
        chosen = nearest.argmax(dim=1)
        indices.append(chosen)
        nearest = torch.minimum(nearest, distances[batch, chosen])
    return torch.stack(indices, dim=1)


def _ours(work: TokenWorkload, backend: str, inputs: TokenInputs) -> Way:
    """Of a row with several ops, those without a Triton kernel take the default."""
    backends: dict[str, str | None] = {}
    reasons = []
    for op in OPS[work.op]:
        try:
            backends[op] = choose_backend(op, backend, *inputs.leaves)
        except BackendError as error:
            backends[op] = None
            reasons.append(str(error))
    if len(reasons) == len(backends):
        raise Unavailable(reasons[0])
    if work.op == SIMILARITY:
        return _similarity(backends)
    if work.op == CLUSTERS:
        return _clusters(partial(soft_cluster_pool, backend=backend))
    return _choosing(partial(farthest_point_sampling, backend=backend))


GRAM = "Gram matrix loop"
COMPILED = "torch.compile of eager"


def build(name: str, work: TokenWorkload, inputs: TokenInputs) -> Way:
    """A contender's way of doing the work; "eager" is the definition, loops over images included.

    Raises:
        Unavailable: it can not do this work here; the message says why.
    """
    if name.startswith("fastgoal "):
        return _ours(work, name.removeprefix("fastgoal "), inputs)
    if name == GRAM:
        return _choosing(gram_farthest_points)
    if work.op == SIMILARITY:
        return _similarity(dict.fromkeys(OPS[work.op], "reference"))
    if work.op == FARTHEST:
        return _choosing(reference.farthest_point_sampling)
    pool = reference.soft_cluster_pool
    return _clusters(torch.compile(pool, dynamic=False) if name == COMPILED else pool)


# In the order in which they are measured: should the time run out, the last are missed least.
CONTENDERS = ("fastgoal triton", "fastgoal torch", GRAM, "eager", COMPILED)


def takes_part(contender: str, work: TokenWorkload) -> bool:
    """Gram matrices are of points; loops over images do not compile, nor do those over samples."""
    only = {GRAM: FARTHEST, COMPILED: CLUSTERS}
    return only.get(contender, work.op) == work.op


def sweep(cuda: bool, quick: bool) -> list[TokenWorkload]:
    """The workloads of `python -m benchmarks.device`: the real sizes on a GPU, small ones else."""
    if quick:
        images, dim, dtype = 4, 16, "float32"
        sizes = {FARTHEST: (9, 4), SIMILARITY: (9, 12), CLUSTERS: (5, 3)}
    else:
        images, dim, dtype = (256, 768, "bfloat16") if cuda else (32, 128, "float32")
        sizes = {FARTHEST: (197, 65), SIMILARITY: (196, 248), CLUSTERS: (65, 32)}
    return [
        TokenWorkload(
            op, "inference" if op == FARTHEST else "forward+backward", images, *size, dim, dtype
        )
        for op, size in sizes.items()
    ]

"""Every way of the MaxSim backward against the others: `python -m benchmarks.maxsim_backward`.

    python -m benchmarks.maxsim_backward [--out PATH] [--budget SECONDS] [--dry-run]

The gradient of each side, by each way that `ops/maxsim_backward_triton` can go, on a CUDA device:
text_to_image and both directions, 64² to 1024² pairs, captions of 77 and 248 tokens, images of 196,
256 and 576, D 512 and 768, bf16; winners as random tokens give them, and as images do in which one
region wins most words; gradients of all pairs, and with grad_filter_eps at scale 100 of those that
it leaves, for random and for trained tokens. Parity with the torch backend is asserted first.
Without CUDA the command says so; --dry-run then goes through it all with tiny sizes (under
TRITON_INTERPRET=1 with the kernels' own ways).

The JSON it writes:

    schema, kind "maxsim_backward", command, date, source, versions, device    as benchmarks.device
    seconds, finished
    rows    one per workload, side and way:
        direction images texts text_tokens image_tokens dim dtype pairs side way
        live            share of the pairs that have a gradient
        rule            whether the library would go this way
        status          ok | wrong | out of memory | failed | skipped
        reason          why, when it is not ok
        expected_ms     by counts (`expected_seconds`), all pairs live
        parity          relative error against the torch backend
        median_ms low_ms high_ms best_ms repeats
        extra_bytes     peak beyond inputs and the gradient
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastgoal_kernels import available_backends
from fastgoal_kernels.ops import maxsim_torch
from fastgoal_kernels.ops.maxsim import maxsim
from fastgoal_kernels.ops.score_loss import score_loss
from fastgoal_kernels.ops.token_rows import TokenRows, token_rows

from . import facts
from .device import device_is_lost, write
from .measure import copies_past_l2, measure_memory, measure_time
from .parity import first_line, relative_error

SCHEMA = 1
LOGIT_SCALE, FILTER_EPS = 100.0, 1e-5
# Rounding to bf16 of shares and of sums.
TOLERANCE = 2e-2

Direction = tuple[Tensor, Tensor]  # winners, dL/dS (own items, other items)


@dataclass(frozen=True)
class Workload:
    """One backward.

    Attributes:
        pairs: "all": every pair has a gradient; "skewed": so, and one region wins most words;
            "filtered random", "filtered trained": what grad_filter_eps leaves.
    """

    direction: str
    images: int
    texts: int
    text_tokens: int
    image_tokens: int
    dim: int
    dtype: str
    pairs: str = "all"

    @property
    def filtered(self) -> bool:
        return self.pairs.startswith("filtered")

    def describe(self) -> str:
        """One line for the screen."""
        return (
            f"{self.direction} {self.images}×{self.texts}, T {self.text_tokens}, "
            f"R {self.image_tokens}, D {self.dim}, {self.pairs}"
        )


def sweep(dry_run: bool) -> Iterator[Workload]:
    """The workloads, the most telling first, should the time run out."""
    if dry_run:
        main = Workload("both", 3, 3, 5, 9, 16, "float32")
        sizes: tuple[int, ...] = (2,)
        lengths: tuple[tuple[int, int], ...] = ((7, 9),)
    else:
        main = Workload("both", 1024, 1024, 77, 196, 512, "bfloat16")
        sizes = (64, 256)
        lengths = ((77, 256), (77, 576), (248, 196), (248, 256), (248, 576))
    kinds = ("all", "skewed", "filtered random", "filtered trained")
    shapes = [
        *(replace(main, pairs=pairs) for pairs in kinds),
        *(replace(main, images=size, texts=size) for size in sizes),
        *(replace(main, text_tokens=text, image_tokens=image) for text, image in lengths),
        *(
            replace(main, images=size, texts=size, text_tokens=text, image_tokens=image)
            for size in sizes
            for text, image in lengths
        ),
    ]
    for shape in [*shapes, *(replace(shape, dim=shape.dim * 3 // 2) for shape in shapes)]:
        yield replace(shape, direction="text_to_image")
        yield shape


@dataclass(frozen=True)
class Side:
    """What `side_gradient` takes, and which side it is."""

    name: str
    own: TokenRows
    other: TokenRows
    gather: Direction | None
    scatter: Direction | None
    skip_zeros: bool

    @property
    def tensors(self) -> list[Tensor]:
        winners = [way[0] for way in (self.gather, self.scatter) if way]
        return [self.own.rows, self.other.rows, *winners]

    def copy(self) -> Side:
        """The same on memory of its own."""

        def clone(way: Direction | None) -> Direction | None:
            return (way[0].clone(), way[1]) if way else None

        own = self.own._replace(rows=self.own.rows.clone())
        other = self.other._replace(rows=self.other.rows.clone())
        return replace(
            self, own=own, other=other, gather=clone(self.gather), scatter=clone(self.scatter)
        )


def make_tokens(work: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit tokens; trained ones: words are noisy copies of regions of their own image."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, work.dim, generator=generator, device=device)

    images = F.normalize(random(work.images, work.image_tokens), dim=-1)
    texts = random(work.texts, work.text_tokens)
    if work.pairs == "filtered trained":
        shape = work.texts, work.text_tokens, 1
        region = torch.randint(work.image_tokens, shape, generator=generator, device=device)
        own = images.gather(1, region.expand(-1, -1, work.dim))
        texts = own + 1.5 * F.normalize(texts, dim=-1)
    dtype = getattr(torch, work.dtype)
    return images.to(dtype), F.normalize(texts, dim=-1).to(dtype)


def kernels_run() -> bool:
    """On a CUDA device, or under Triton's interpreter."""
    return "triton" in available_backends()["maxsim_scores"]


def make_sides(work: Workload, device: torch.device) -> list[Side]:
    """Both sides' backwards, from the winners of a forward and the gradients of a loss."""
    backend = "triton" if kernels_run() else "torch"
    image_tokens, text_tokens = make_tokens(work, device)
    t2i, i2t, t2i_winners, i2t_winners = maxsim(
        image_tokens, text_tokens, None, None, None, None, 0, 0, work.direction, True, True, backend
    )  # fmt: skip
    both = work.direction == "both"
    leaves = [t2i.requires_grad_(), *([i2t.requires_grad_()] if both else [])]
    scale = torch.tensor(LOGIT_SCALE if work.filtered else 1 / 0.07, device=device)
    rows, columns = (i2t, t2i) if both else (t2i, None)
    eps = FILTER_EPS if work.filtered else 0.0
    loss = score_loss(
        rows, columns, scale, torch.zeros_like(scale), None, "softmax", 1, eps, backend
    )
    grads = torch.autograd.grad(loss[0], leaves)
    if work.pairs == "skewed":
        keep = torch.rand(t2i_winners.shape, device=device) < 0.1
        t2i_winners = torch.where(keep, t2i_winners, torch.zeros_like(t2i_winners))
    images = token_rows(image_tokens, None, None, work.image_tokens, True)
    texts = token_rows(text_tokens, None, None, work.text_tokens, True)
    of_images = t2i_winners, grads[0]
    queried = (i2t_winners, grads[1]) if both else None
    of_texts = (queried[0], queried[1].T) if queried else None
    return [
        Side("images", images, texts, queried, of_images, work.filtered),
        Side("texts", texts, images, (t2i_winners, grads[0].T), of_texts, work.filtered),
    ]


Way = Callable[[Side], Tensor]


def torch_way(side: Side) -> Tensor:
    """The torch backend, which is also the yardstick."""
    return maxsim_torch._side_gradient(side.own, side.other, side.gather, side.scatter, False)


def load_ways() -> dict[str, Way]:
    """The kernels' ways where they run; in a dry run without them, the torch backend."""
    if not kernels_run():
        return {"torch": torch_way}
    from fastgoal_kernels.ops.maxsim_backward_triton import side_gradient

    def go(way: str, side: Side) -> Tensor:
        return side_gradient(side.own, side.other, side.gather, side.scatter, side.skip_zeros, way)

    return {way: partial(go, way) for way in ("lists", "product")}


def expectation(side: Side, way: str) -> dict[str, Any]:
    """What the rule thinks of this way."""
    if way == "torch":
        return {"rule": None, "expected_ms": None}
    from fastgoal_kernels.ops.maxsim_backward_triton import expected_seconds, strategy

    kinds = side.gather is not None, side.scatter is not None
    return {
        "rule": strategy(side.own, side.other, *kinds, side.skip_zeros) == way,
        "expected_ms": 1e3 * expected_seconds(side.own, side.other, *kinds)[way],
    }


def measure_row(side: Side, way: Way, truth: Tensor, device: torch.device, seconds: float) -> dict:
    """One side by one way. Raises whatever the way raises."""
    error = relative_error(way(side), truth)
    if not error <= TOLERANCE:
        reason = f"relative error {error:.2g} is above {TOLERANCE:g}"
        return {"parity": error, "status": "wrong", "reason": reason}
    sides = [side]
    sides += [side.copy() for _ in range(copies_past_l2(side.tensors, device) - 1)]
    extra = measure_memory(lambda: way(side), device)
    timing = measure_time([partial(way, each) for each in sides], device, seconds=seconds)
    return {"parity": error, "extra_bytes": extra, **asdict(timing), "status": "ok"}


EMPTY_ROW = dict.fromkeys(
    ("side", "way", "live", "rule", "expected_ms", "status", "reason", "parity",
     "median_ms", "low_ms", "high_ms", "best_ms", "repeats", "extra_bytes")
)  # fmt: skip


def measure_work(
    work: Workload, ways: dict[str, Way], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """The rows of one workload."""
    for side in make_sides(work, device):
        grads = [way[1] for way in (side.gather, side.scatter) if way]
        live = sum(float((g != 0).float().mean()) for g in grads) / len(grads)
        truth = torch_way(side)
        for name, way in ways.items():
            row = {**asdict(work), **EMPTY_ROW, "side": side.name, "way": name, "live": live}
            row.update(expectation(side, name))
            try:
                row.update(measure_row(side, way, truth, device, seconds))
            except torch.OutOfMemoryError as error:
                row.update(status="out of memory", reason=first_line(error))
            except Exception as error:  # the rest of the sweep goes on
                row.update(status="failed", reason=first_line(error))
            yield row
        del truth


def show(row: dict[str, Any], work: Workload, console: Console) -> None:
    """One line of progress."""
    text = f"{row['status']}: {row['reason']}"
    if row["status"] == "ok":
        expected = "" if row["expected_ms"] is None else f", counted {row['expected_ms']:.3f} ms"
        text = f"{row['median_ms']:.3f} ms{expected}, {row['extra_bytes'] / 1e6:,.1f} MB"
    mark = "*" if row["rule"] else " "
    what = f"{work.describe()}, {row['live']:.1%} live"
    console.print(
        f"{row['way']:>8}{mark} {row['side']:>6}  {what}  {text}", markup=False, soft_wrap=True
    )


def main(argv: list[str] | None = None) -> int:
    """The command; 1 when a way was wrong or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.maxsim_backward", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help="the JSON (default: benchmarks/results/...)")
    parser.add_argument(
        "--budget", type=float, default=450, help="seconds after which no workload starts"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does it work?")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.dry_run:
        console.print(
            "There is no CUDA device here to measure. --dry-run shows that the command works."
        )
        return 1
    device = torch.device("cuda" if cuda else "cpu")
    start = time.monotonic()
    command = "python -m benchmarks.maxsim_backward" + " --dry-run" * arguments.dry_run
    document: dict[str, Any] = {
        "schema": SCHEMA, "kind": "maxsim_backward", **facts.provenance(command, device),
        "finished": False,
    }  # fmt: skip
    name = "".join(c if c.isalnum() else "-" for c in document["device"]["name"].lower())
    path = arguments.out
    if path is None and not arguments.dry_run:
        path = facts.ROOT / "benchmarks" / "results" / f"maxsim-backward-{name}.json"
    rows: list[dict[str, Any]] = []
    document["rows"] = rows
    ways = load_ways()
    stop: str | None = None
    for work in sweep(arguments.dry_run):
        if stop is None and time.monotonic() - start > arguments.budget:
            stop = f"the time budget of {arguments.budget:.0f} s was used up"
        if stop is not None:
            rows.append({**asdict(work), **EMPTY_ROW, "status": "skipped", "reason": stop})
            continue
        try:
            for row in measure_work(work, ways, device, 0.01 if arguments.dry_run else 0.2):
                show(row, work, console)
                rows.append(row)
        except Exception as error:  # its inputs or its yardstick: no way can be measured
            reason = first_line(error)
            rows.append({**asdict(work), **EMPTY_ROW, "status": "failed", "reason": reason})
            console.print(f"{work.describe()}: {reason}", markup=False)
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            if rows[-1]["status"] == "failed" and device_is_lost(device):
                stop = f"the device stopped answering after {work.describe()}"
        document["seconds"] = time.monotonic() - start
        if path is not None:
            write(document, path)
    document["finished"] = True
    if path is not None:
        write(document, path)
        console.print(f"{len(rows)} rows, written to {path}", markup=False)
    if stop is not None:
        console.print(stop, style="yellow")
    return 1 if any(row["status"] in ("wrong", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

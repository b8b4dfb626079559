"""The text-conditioned loss on a CPU against plain PyTorch and the published form, in one table.

    python -m benchmarks.text_conditioned_cpu [--images 64] [--captions-per-image 8] [--rounds N]
                                              [--threads 2] [--json PATH]

A training step, float32, 64 tokens an image, D 512, 8 heads, with the gradients of the tokens, the
text features, the pool's parameters, the scale and the bias; with all negatives, and with sampled
ones. The table says whether we keep to what is promised at 64 images with 8 captions each: with all
negatives at least twice as fast as plain PyTorch in at most a tenth of its extra memory, and in no
more than the published loss of sampled negatives needs.

Parity with float64 is asserted before anything is timed. Each round runs every contender once, so
that a busy machine slows all of them alike; best times stand beside the medians, because they
suffer least from it. Compilation is not timed. Extra memory is the peak of live tensor bytes beyond
the inputs and their gradients.

The JSON it writes:

    schema 1, kind "text_conditioned_cpu", command, date, source {commit, modified}, versions,
    device {...}
    rows                       one per negatives and contender:
        contender negatives images captions_per_image tokens dim heads dtype op stage
        status                 ok | unavailable | wrong | failed
        reason                 why, when it is not ok
        parity                 largest relative error against float64: {loss | gradients |
                               parameters}, the last of the gradients of scale, bias and pool
        extra_bytes median_ms low_ms high_ms best_ms repeats  with the 20th and 80th percentile
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import cpu_rows, pooling_parity, text_conditioned_cpu_sections
from .cpu_rows import CPU, Rival, Row, require_memory, require_right
from .measure import forward_backward, measure_memory
from .pooling_workloads import PoolingInputs, PoolingWorkload, build, make_inputs
from .text_conditioned_cpu_sections import OURS

# Of what all pairs pool, (images, columns, dim) in float32: the most that plain PyTorch holds at
# once, with a little to spare.
PAIR_COPIES = 12


def bytes_needed(contender: str, work: PoolingWorkload) -> float:
    """What a contender that holds all pairs may need."""
    return 0 if contender == OURS else PAIR_COPIES * 4 * work.images * work.columns * work.dim


def prepare(
    contender: str, work: PoolingWorkload, inputs: PoolingInputs
) -> tuple[Callable[[], Any], Row]:
    """What is to be timed, once it is right, and what is known of it before.

    Raises:
        Unavailable: it can not take part; the message says why.
        AssertionError: its results are wrong.
    """
    require_memory(bytes_needed(contender, work))
    way = build(contender, work, inputs)
    errors = pooling_parity.measure(work, way, inputs)
    require_right(errors, pooling_parity.limits(work, CPU))

    def step() -> Any:
        return forward_backward(lambda: way(inputs), inputs.leaves)

    return step, {"parity": errors, "extra_bytes": measure_memory(step, CPU)}


def measure(entrants: list[tuple[str, PoolingWorkload]], rounds: int) -> list[Row]:
    """A row for each entrant. Raises when ours is wrong or fails; a rival is left out then."""
    works = dict.fromkeys(work for _, work in entrants)
    inputs = {work: make_inputs(work, CPU) for work in works}
    rivals = [
        Rival(
            {"contender": contender, **work.as_json()},
            contender == OURS,
            partial(prepare, contender, work, inputs[work]),
        )
        for contender, work in entrants
    ]
    return cpu_rows.measure(rivals, rounds)


def main(argv: list[str] | None = None) -> int:
    """The command; always 0 unless our result is wrong: times are read, not asserted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.text_conditioned_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--captions-per-image", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    sections = text_conditioned_cpu_sections
    rows = measure(
        sections.entrants(arguments.images, arguments.captions_per_image), arguments.rounds
    )
    cpu_rows.show(
        sections.title(rows),
        sections.HEAD,
        sections.tables(rows),
        sections.footer(rows),
        cpu_rows.console(),
        words=("", "negatives"),
    )
    if arguments.json:
        command = (
            f"python -m benchmarks.text_conditioned_cpu --images {arguments.images} "
            f"--captions-per-image {arguments.captions_per_image} --rounds {arguments.rounds} "
            f"--threads {arguments.threads}"
        )
        cpu_rows.write(arguments.json, "text_conditioned_cpu", 1, command, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

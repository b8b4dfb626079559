"""The losses of plain features on a CPU against everything else that runs there, in one table.

    python -m benchmarks.feature_cpu [--size 8192] [--rounds N] [--threads 2] [--json PATH]

A training step of CLIP's and SigLIP's losses, float32, D 512, against open_clip's own,
torch.compile of those, plain PyTorch and sentence-transformers' cached loss, which is optional
(`pip install 'sentence-transformers>=6'`; Apache 2.0). The table says whether we keep to what is
promised beside open_clip's ClipLoss at batch 8,192: at most 1/20 of its extra memory, and not
slower.

Parity is asserted before anything is timed. Each round runs every contender once, so that a busy
machine slows all of them alike; best times stand beside the medians, because they suffer least from
it. Compilation is not timed. Extra memory is the peak of live tensor bytes beyond the inputs and
their gradients.

The JSON it writes:

    schema 1, kind "feature_cpu", command, date, source {commit, modified}, versions, device {...}
    rows                       one per loss and contender:
        contender op stage batch dim dtype
        status                 ok | unavailable | wrong | failed
        reason                 why, when it is not ok
        parity                 largest relative error against float32: {loss | gradients |
                               parameters}, the last of the gradients of scale and bias
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

from . import cpu_rows, feature_cpu_sections, feature_parity
from .cpu_rows import CPU, Rival, Row, require_memory, require_right
from .feature_cpu_sections import OURS
from .feature_peers import FEATURE_PEERS
from .feature_workloads import FeatureInputs, FeatureWorkload, build, make_inputs
from .measure import forward_backward, measure_memory

# Of the matrix of all logits in float32: the most that open_clip's losses hold at once, with a
# little to spare. Who holds less than a matrix is not asked.
LOGIT_COPIES = 6
HOLDS_NO_LOGITS = (OURS, "sentence-transformers cached")


def bytes_needed(contender: str, work: FeatureWorkload) -> float:
    """What a contender that holds all logits may need."""
    return 0 if contender in HOLDS_NO_LOGITS else LOGIT_COPIES * 4 * work.batch**2


def prepare(
    contender: str, work: FeatureWorkload, inputs: FeatureInputs
) -> tuple[Callable[[], Any], Row]:
    """What is to be timed, once it is right, and what is known of it before.

    Raises:
        Unavailable: it can not take part; the message says why.
        AssertionError: its results are wrong.
    """
    require_memory(bytes_needed(contender, work))
    way = build(contender, work, inputs)
    errors = feature_parity.measure(work, way, inputs)
    require_right(errors, feature_parity.limits(contender, work, CPU))
    leaves = way.leaves(inputs)

    def step() -> Any:
        return forward_backward(lambda: way.loss(*inputs), leaves)

    return step, {"parity": errors, "extra_bytes": measure_memory(step, CPU)}


def measure(entrants: list[tuple[str, FeatureWorkload]], rounds: int) -> list[Row]:
    """A row for each entrant. Raises when ours is wrong or fails; a rival is left out then."""
    inputs = {work: make_inputs(work, CPU) for _, work in entrants}
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
        prog="python -m benchmarks.feature_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", type=int, default=8192, help="pairs in the batch (default 8192)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = measure(feature_cpu_sections.entrants(arguments.size), arguments.rounds)
    cpu_rows.show(
        feature_cpu_sections.title(rows),
        feature_cpu_sections.HEAD,
        map(feature_cpu_sections.table, feature_cpu_sections.by_loss(rows).values()),
        feature_cpu_sections.footer(rows),
        cpu_rows.console(),
        words=("", "loss"),
    )
    if arguments.json:
        command = (
            f"python -m benchmarks.feature_cpu --size {arguments.size} "
            f"--rounds {arguments.rounds} --threads {arguments.threads}"
        )
        versions = {peer.package: peer.version() for peer in FEATURE_PEERS}
        cpu_rows.write(arguments.json, "feature_cpu", 1, command, rows, **versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())

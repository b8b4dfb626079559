"""MaxSim on a CPU against everything else that runs there: time and memory in one run.

    python -m benchmarks.maxsim_cpu [--size 64 | 128] [--rounds N] [--threads 2] [--json PATH]

Against eager PyTorch (`amax` and `max(dim)`), torch.compile of both, and other people's libraries,
which are optional (`pip install --no-deps late-interaction-kernels maxsim-cpu fast-maxsim`; Apache
2.0 all): a training step of the softmax loss, the scores alone for those without gradients, and
captions that fill 55 % of a longer context. Both directions, float32, R 196, D 512, T 77 or 248.

Parity is asserted before anything is timed. Each round runs every rival once, so that a busy
machine slows all of them alike; best times stand beside the medians, because they suffer least from
it. Compilation is not timed. Extra memory is the peak of live tensor bytes beyond the inputs and
what the call returns; what a library allocates outside of PyTorch is not seen.

The JSON it writes:

    schema 2, kind "maxsim_cpu", command, date, source {commit, modified}, versions, device {...}
    rows                       one per section and contender:
        section                training | forward | ragged
        contender bfloat16     the latter: float32 tokens may be multiplied in bfloat16
        op direction stage images texts text_tokens image_tokens dim dtype layout fill
        status                 ok | unavailable | wrong | failed
        reason                 why, when it is not ok
        parity                 largest relative error against float32: {scores | loss | gradients}
        extra_bytes            null where it is not seen
        median_ms low_ms high_ms best_ms repeats       with the 20th and 80th percentile
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import cpu_rows, cpu_sections, parity
from .cpu_peers import CPU_PEERS, limit_native_threads
from .cpu_rows import CPU, Rival, Row, require_memory, require_right
from .cpu_sections import Entrant, Section
from .measure import forward_backward, measure_memory
from .peers import Unavailable
from .workloads import Inputs, build, float32_products, make_inputs

NATIVE = {peer.name for peer in CPU_PEERS if peer.native}
# Of the tensor of all similarities: the most that plain PyTorch holds at once (amax, both
# directions, in the backward), with a little to spare.
SIMILARITY_COPIES = 4.5


def bytes_needed(entrant: Entrant) -> float:
    """What a contender that holds all similarities may need."""
    if entrant.ours or entrant.contender in NATIVE:
        return 0
    work = entrant.work
    similarities = work.images * work.texts * work.text_tokens * work.image_tokens
    return SIMILARITY_COPIES * 4 * similarities


def check(entrant: Entrant, errors: dict[str, float]) -> None:
    """Raise AssertionError if a result is wrong, Unavailable if it is not what the row is about."""
    limits = parity.BF16_PRODUCTS if entrant.bfloat16 else parity.EXACT
    require_right(errors, limits)
    if entrant.bfloat16 and all(error < parity.FLOAT32 for error in errors.values()):
        raise Unavailable("it multiplies in float32 here even if it may use bfloat16")


def prepare(entrant: Entrant, inputs: Inputs) -> tuple[Callable[[], Any], Row]:
    """What is to be timed, once it is right, and what is known of it before.

    Raises:
        Unavailable: it can not take part; the message says why.
    """
    require_memory(bytes_needed(entrant))
    precision = "medium" if entrant.bfloat16 else "highest"
    work = entrant.work
    with float32_products(precision):
        call = build(entrant.contender, work, inputs)
        errors = parity.measure(work, call, inputs)
    check(entrant, errors)

    def step() -> Any:
        with float32_products(precision):
            if work.stage == "forward+backward":
                return forward_backward(lambda: call(inputs), inputs.leaves)
            return tuple(call(inputs).values())

    extra = None if entrant.contender in NATIVE else measure_memory(step, CPU)
    return step, {"parity": errors, "extra_bytes": extra}


def measure(section: Section, rounds: int) -> list[Row]:
    """A row for each entrant. Raises when ours is wrong or fails; a rival is left out then."""
    works = dict.fromkeys(entrant.work for entrant in section.entrants)
    inputs = {work: make_inputs(work, CPU) for work in works}

    def known(entrant: Entrant) -> Row:
        label = {"section": section.name, "contender": entrant.label}
        return {**label, "bfloat16": entrant.bfloat16, **entrant.work.as_json()}

    rivals = [
        Rival(known(entrant), entrant.ours, partial(prepare, entrant, inputs[entrant.work]))
        for entrant in section.entrants
    ]
    return cpu_rows.measure(rivals, rounds)


def main(argv: list[str] | None = None) -> int:
    """The command; always 0 unless our result is wrong: times are read, not asserted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.maxsim_cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", type=int, default=64, help="images and texts (default 64)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    limit_native_threads(arguments.threads)
    console = cpu_rows.console()
    rows: list[Row] = []
    for section in cpu_sections.sections(arguments.size):
        measured = measure(section, arguments.rounds)
        cpu_rows.show(
            cpu_sections.title(measured),
            cpu_sections.HEAD,
            [cpu_sections.table(measured)],
            cpu_sections.footer(measured),
            console,
        )
        rows += measured
    if arguments.json:
        command = (
            f"python -m benchmarks.maxsim_cpu --size {arguments.size} "
            f"--rounds {arguments.rounds} --threads {arguments.threads}"
        )
        cpu_rows.write(arguments.json, "maxsim_cpu", 2, command, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

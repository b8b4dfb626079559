"""One command that measures this device: `python -m benchmarks.device`, under eight minutes.

    python -m benchmarks.device [--quick] [--out PATH] [--budget SECONDS] [--cpu]
                                [--section maxsim | features | pooling | tokens | steps]
                                [--only TEXT]

Device facts and measured ceilings, correctness spot checks, then five sections: MaxSim and its
contrastive loss; the contrastive losses of plain features; the text-conditioned loss; the token
ops; and CAFT's whole training step. All against plain PyTorch, torch.compile, the chunked torch
backend and other people's packages or a restatement of what was published. Parity is asserted
before anything is timed; what fails or
is missing becomes a row that says why, and so does a contender whose next larger call would take
more than a second, judging by the one before it. On a CPU the sizes are small; those of --quick are
tiny, show that the sweep works, and measure little else. `fastgoal bench` is the same sweep with a
table and a picture.

The JSON it writes:

    schema, kind "device", command, date, source {commit, modified}, versions, device {...}
    seconds, finished          finished is false in what an interrupted run leaves behind
    ceilings                   copy_gb_s, gemm_tflop_s and the gemm_dtype they were measured in
    checks                     [{name, status (ok, wrong, unavailable, failed), error, reason}]
    rows                       one per workload and contender:
        op direction stage images texts text_tokens image_tokens dim dtype layout fill contender
                               of MaxSim; of plain features: op stage batch dim dtype contender;
                               of the text-conditioned loss: op negatives stage images
                               captions_per_image tokens dim heads dtype contender; of token ops:
                               op stage images tokens count dim dtype contender; of a training
                               step: op stage model superpixels images captions_per_image negatives
                               dtype contender
        status                 ok | unavailable | wrong | out of memory | failed | skipped
        reason                 why, when it is not ok
        parity                 largest relative error: {scores | loss | output | choices | gradients
                               | parameters}, the last of the gradients of scale, bias and pool;
                               against float32, of pooling and tokens against float64
        median_ms low_ms high_ms best_ms repeats       with the 20th and 80th percentile
        extra_bytes            peak beyond the inputs and what the call returns
        tflop_s share_of_gemm  useful FLOP; of MaxSim null when a backward is included, and always
                               of token ops and of training steps
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from . import (
    facts,
    feature_parity,
    feature_workloads,
    parity,
    pooling_parity,
    pooling_workloads,
    step_workloads,
    token_parity,
    token_workloads,
)
from .feature_peers import FEATURE_PEERS
from .feature_workloads import FeatureInputs, FeatureWorkload
from .measure import copies_past_l2, forward_backward, measure_memory, measure_time
from .peers import Unavailable
from .pooling_workloads import PoolingInputs, PoolingWorkload
from .step_workloads import StepWorkload
from .token_workloads import TokenWorkload
from .workloads import (
    CONTENDERS,
    Inputs,
    Workload,
    build,
    make_inputs,
    sweep,
    takes_part,
    useful_flop,
)

SCHEMA = 1
SLOWEST_CALL = 1.0  # seconds; a longer one is not worth what it takes of the eight minutes

AnyWorkload = Workload | FeatureWorkload | PoolingWorkload | TokenWorkload | StepWorkload

# ---------------------------------------------------------------------------------------------
# Ceilings
# ---------------------------------------------------------------------------------------------


def measure_ceilings(device: torch.device, quick: bool) -> dict[str, Any]:
    """What the device reaches at best: a large copy and a large matrix product, by measurement."""
    cuda = device.type == "cuda" and not quick
    count = 2**28 if cuda else 2**20 if quick else 2**24
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = measure_time([lambda: target.copy_(source)], device, seconds=0.3)
    side = 8192 if cuda else 128 if quick else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    gemm = measure_time([lambda: a @ b], device, seconds=0.5)
    return {
        "copy_gb_s": 2 * source.nbytes / copy.median_ms / 1e6,
        "gemm_tflop_s": 2 * side**3 / gemm.median_ms / 1e9,
        "gemm_dtype": str(dtype).removeprefix("torch."),
    }


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A contender that has computed a workload once, and what it takes to go on."""

    errors: dict[str, float]
    limits: dict[str, float]
    steps: list[Callable[[], Any]]  # the same work on copies of the inputs
    flop: float | None
    min_repeats: int
    seconds: float


def try_maxsim(work: Workload, contender: str, device: torch.device, seconds: float) -> Trial:
    """One contender at one workload of MaxSim."""
    inputs = make_inputs(work, device)
    call = build(contender, work, inputs)
    errors = parity.measure(work, call, inputs)
    own_rounding = contender.startswith(("eager", "torch.compile"))

    def step(own: Inputs) -> Callable[[], Any]:
        if work.stage == "forward+backward":
            return lambda: forward_backward(lambda: call(own), own.leaves)
        return lambda: call(own)

    copies = copies_past_l2(inputs.leaves, device)
    more = (make_inputs(work, device) for _ in range(copies - 1))
    return Trial(
        errors,
        parity.ROUNDED if own_rounding else parity.EXACT,
        [step(own) for own in (inputs, *more)],
        None if work.stage == "forward+backward" else useful_flop(work, inputs.captions),
        min_repeats=5,
        seconds=seconds,
    )


def try_features(
    work: FeatureWorkload, contender: str, device: torch.device, seconds: float
) -> Trial:
    """One contender at one workload of plain features: fewer repeats, there are many sizes."""
    inputs = feature_workloads.make_inputs(work, device)
    way = feature_workloads.build(contender, work, inputs)
    errors = feature_parity.measure(work, way, inputs)

    def step(own: FeatureInputs) -> Callable[[], Any]:
        if work.stage == "forward+backward":
            return lambda: forward_backward(lambda: way.loss(*own), way.leaves(own))
        return lambda: way.loss(*own)

    copies = copies_past_l2(inputs[:2], device)
    more = (feature_workloads.make_inputs(work, device) for _ in range(copies - 1))
    return Trial(
        errors,
        feature_parity.limits(contender, work, device),
        [step(own) for own in (inputs, *more)],
        feature_workloads.useful_flop(work),
        min_repeats=3,
        seconds=seconds / 2,
    )


def try_pooling(
    work: PoolingWorkload, contender: str, device: torch.device, seconds: float
) -> Trial:
    """One contender at one workload of the text-conditioned loss."""
    inputs = pooling_workloads.make_inputs(work, device)
    way = pooling_workloads.build(contender, work, inputs)
    errors = pooling_parity.measure(work, way, inputs)

    def step(own: PoolingInputs) -> Callable[[], Any]:
        return lambda: forward_backward(lambda: way(own), own.leaves)

    copies = copies_past_l2(inputs.leaves[:2], device)
    # One pool for all: it is small, and a compiled function is compiled anew for another.
    more = (
        pooling_workloads.make_inputs(work, device)._replace(pool=inputs.pool)
        for _ in range(copies - 1)
    )
    return Trial(
        errors,
        pooling_parity.limits(work, device),
        [step(own) for own in (inputs, *more)],
        pooling_workloads.useful_flop(work),
        min_repeats=3,
        seconds=seconds,
    )


def try_tokens(work: TokenWorkload, contender: str, device: torch.device, seconds: float) -> Trial:
    """One contender at one workload of the token ops."""
    inputs = token_workloads.make_inputs(work, device)
    way = token_workloads.build(contender, work, inputs)
    errors = token_parity.measure(work, way, inputs)
    copies = copies_past_l2(inputs.leaves, device)
    more = (token_workloads.make_inputs(work, device) for _ in range(copies - 1))
    return Trial(
        errors,
        token_parity.limits(work, device),
        [partial(way, own) for own in (inputs, *more)],
        None,
        min_repeats=5,
        seconds=seconds,
    )


def try_step(work: StepWorkload, contender: str, device: torch.device, seconds: float) -> Trial:
    """One contender at one whole training step; its activations are past any cache."""
    inputs = step_workloads.make_inputs(work, device)
    way = step_workloads.build(contender, work, inputs)
    return Trial(
        step_workloads.measure_errors(work, way, inputs),
        step_workloads.limits(work),
        [lambda: step_workloads.gradients(way(inputs), inputs)],
        None,
        min_repeats=3,
        seconds=seconds,
    )


def measure_row(
    work: AnyWorkload, contender: str, device: torch.device, gemm_tflop_s: float, seconds: float
) -> dict[str, Any]:
    """One workload by one contender. Raises whatever the contender raises."""
    if isinstance(work, Workload):
        trial = try_maxsim(work, contender, device, seconds)
    elif isinstance(work, FeatureWorkload):
        trial = try_features(work, contender, device, seconds)
    elif isinstance(work, PoolingWorkload):
        trial = try_pooling(work, contender, device, seconds)
    elif isinstance(work, StepWorkload):
        trial = try_step(work, contender, device, seconds)
    else:
        trial = try_tokens(work, contender, device, seconds)
    row: dict[str, Any] = {"parity": trial.errors}
    wrong = {key: error for key, error in trial.errors.items() if not error <= trial.limits[key]}
    if wrong:
        name, error = next(iter(wrong.items()))
        reason = f"relative error of {name} {error:.2g} is above {trial.limits[name]:g}"
        return {**row, "status": "wrong", "reason": reason}
    trial.steps[0]()
    row["extra_bytes"] = measure_memory(trial.steps[0], device)
    timing = measure_time(trial.steps, device, seconds=trial.seconds, min_repeats=trial.min_repeats)
    row.update(asdict(timing))
    if trial.flop is not None:
        row["tflop_s"] = trial.flop / timing.median_ms / 1e9
        row["share_of_gemm"] = row["tflop_s"] / gemm_tflop_s
    return {**row, "status": "ok"}


EMPTY_ROW = dict.fromkeys(
    ("status", "reason", "parity", "median_ms", "low_ms", "high_ms", "best_ms", "repeats",
     "extra_bytes", "tflop_s", "share_of_gemm")
)  # fmt: skip


def try_row(
    work: AnyWorkload, contender: str, device: torch.device, **options: Any
) -> dict[str, Any]:
    """`measure_row`, with every failure turned into a row that says what happened."""
    row = {**work.as_json(), "contender": contender, **EMPTY_ROW}
    try:
        row.update(measure_row(work, contender, device, **options))
    except Unavailable as error:
        row.update(status="unavailable", reason=str(error))
    except torch.OutOfMemoryError as error:
        row.update(status="out of memory", reason=parity.first_line(error))
    except Exception as error:  # a peer can fail in any way; the rest of the sweep goes on
        row.update(status="failed", reason=parity.first_line(error))
    if device.type == "cuda":  # a failure's traceback holds on to its tensors
        gc.collect()
        torch.cuda.empty_cache()
    return row


def device_is_lost(device: torch.device) -> bool:
    """After an illegal access every later call on the device fails: stop measuring then."""
    try:
        return bool((torch.ones(1, device=device) != 1).any())
    except RuntimeError:
        return True


def too_slow(work: AnyWorkload, contender: str, rows: list[dict[str, Any]]) -> str | None:
    """Why the next larger size of plain features is left out, going by the one before it."""
    if not isinstance(work, FeatureWorkload):
        return None
    for row in reversed(rows):
        same = all(row[key] == value for key, value in work.as_json().items() if key != "batch")
        if same and row["contender"] == contender and row["status"] == "ok":
            seconds = row["median_ms"] / 1e3 * (work.batch / row["batch"]) ** 2
            if seconds > SLOWEST_CALL:
                return f"a call would take about {seconds:.1f} s, going by B {row['batch']:,}"
            return None
    return None


def show(row: dict[str, Any], work: AnyWorkload, console: Console) -> None:
    """One line of progress."""
    if row["status"] == "ok":
        memory = f"{row['extra_bytes'] / 1e6:,.1f} MB"
        rate = f", {row['tflop_s']:.3g} TFLOP/s" if row["tflop_s"] else ""
        text = (
            f"{row['median_ms']:.3f} ms ({row['low_ms']:.3f}–{row['high_ms']:.3f}), {memory}{rate}"
        )
    else:
        text = f"{row['status']}: {row['reason']}"
    console.print(
        f"{row['contender']:>24}  {work.describe()}  {text}", markup=False, soft_wrap=True
    )


def write(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def default_path(device: torch.device) -> Path:
    """benchmarks/results/device-<name>.json."""
    name = facts.describe_device(device)["name"] if device.type == "cuda" else "cpu"
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return facts.ROOT / "benchmarks" / "results" / f"device-{slug}.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the sweep work?")
    parser.add_argument("--out", type=Path, help="the JSON (default: benchmarks/results/device-*)")
    parser.add_argument(
        "--budget", type=float, default=450, help="seconds after which no row starts"
    )
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--section", choices=SECTIONS, help="one of them (default: all)")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    return parser.parse_args(argv)


class Section(NamedTuple):
    """A part of the sweep that can be measured apart."""

    sweep: Callable[[bool, bool], Sequence[AnyWorkload]]  # of cuda and quick
    contenders: tuple[str, ...]
    checks: Callable[[torch.device], list[dict[str, Any]]]


SECTIONS = {
    "maxsim": Section(sweep, CONTENDERS, parity.run_checks),
    "features": Section(
        feature_workloads.sweep, feature_workloads.CONTENDERS, feature_parity.run_checks
    ),
    "pooling": Section(
        pooling_workloads.sweep, pooling_workloads.CONTENDERS, pooling_parity.run_checks
    ),
    "tokens": Section(token_workloads.sweep, token_workloads.CONTENDERS, token_parity.run_checks),
    "steps": Section(step_workloads.sweep, step_workloads.CONTENDERS, step_workloads.run_checks),
}


def sections(name: str | None) -> list[Section]:
    """The one of this name, or all."""
    return list(SECTIONS.values()) if name is None else [SECTIONS[name]]


def contenders() -> list[str]:
    """Those of all sections in turn, so that a spent budget hits all; last what is compiled."""
    in_turn = zip_longest(*(section.contenders for section in SECTIONS.values()))
    names = dict.fromkeys(name for name in chain.from_iterable(in_turn) if name is not None)
    return sorted(names, key=is_compiled)


def is_compiled(contender: str) -> bool:
    """Whether it has to be compiled for each workload, which takes longer than all the rest."""
    return contender.startswith("torch.compile")


def races_in(contender: str, work: AnyWorkload) -> bool:
    """Whether there is a row of this contender at this workload."""
    if isinstance(work, FeatureWorkload):
        if is_compiled(contender) and not feature_workloads.worth_compiling(work):
            return False
        known = contender in feature_workloads.CONTENDERS
        return known and feature_workloads.takes_part(contender, work)
    if isinstance(work, PoolingWorkload):
        if is_compiled(contender) and not pooling_workloads.worth_compiling(work):
            return False
        return contender in pooling_workloads.CONTENDERS
    if isinstance(work, TokenWorkload):
        known = contender in token_workloads.CONTENDERS
        return known and token_workloads.takes_part(contender, work)
    if isinstance(work, StepWorkload):
        return contender in step_workloads.CONTENDERS
    return contender in CONTENDERS and takes_part(contender, work)


def planned(
    cuda: bool, quick: bool, only: str = "", section: str | None = None
) -> list[tuple[str, AnyWorkload]]:
    """Contender and workload of every row, in the order in which they are measured.

    On a GPU one contender after the other, ours first: one that breaks the device ends the sweep.
    On a CPU rivals follow each other, so that a busy machine, and a spent budget, hit all alike,
    and training steps come first; last what has to be compiled, which takes longest.
    """
    works = [work for part in sections(section) for work in part.sweep(cuda, quick)]
    names = [name for name in contenders() if only in name]
    rows = [(name, work) for name in names for work in works if races_in(name, work)]
    if not cuda:
        trains = "forward+backward"
        rows.sort(
            key=lambda row: (is_compiled(row[0]), row[1].stage != trains, works.index(row[1]))
        )
    return rows


def measure_sweep(
    device: torch.device,
    path: Path,
    command: str,
    *,
    quick: bool,
    budget: float,
    only: str = "",
    section: str | None = None,
    say: Callable[[str], None],
    on_row: Callable[[dict[str, Any], AnyWorkload], None],
) -> dict[str, Any]:
    """The whole sweep: the document, which is also written to `path` again and again on the way.

    Ctrl-C ends it early; what was measured by then is returned and written, `finished` false.

    Args:
        command: what the document says of how it was made.
        budget: seconds after which no row starts.
        only: contenders whose name contains this.
        section: one of `SECTIONS`; None: all.
        say: is told what goes on, in words.
        on_row: is told of every row, also of those that are skipped.
    """
    start = time.monotonic()
    document: dict[str, Any] = {
        "schema": SCHEMA, "kind": "device", **facts.provenance(command, device), "finished": False,
    }  # fmt: skip
    document["versions"] |= {peer.package: peer.version() for peer in FEATURE_PEERS}
    say(f"{document['device']}\n{document['versions']}")
    document["ceilings"] = measure_ceilings(device, quick)
    say(f"ceilings: {document['ceilings']}")
    document["checks"] = [check for part in sections(section) for check in part.checks(device)]
    for check in document["checks"]:
        say(f"check {check['name']}: {check['status']} {check['reason'] or check['error']}")

    rows: list[dict[str, Any]] = []
    document["rows"] = rows
    stop: str | None = None
    options = {
        "gemm_tflop_s": document["ceilings"]["gemm_tflop_s"],
        "seconds": 0.02 if quick else 0.5,
    }
    try:
        for contender, work in planned(device.type == "cuda", quick, only, section):
            if rows and rows[-1]["contender"] != contender:
                write({**document, "seconds": time.monotonic() - start}, path)
            if stop is None and time.monotonic() - start > budget:
                stop = f"the time budget of {budget:.0f} s was used up"
                say(f"{stop}: the remaining rows are skipped")
            row = {**work.as_json(), "contender": contender, **EMPTY_ROW}
            if stop is not None:
                row.update(status="skipped", reason=stop)
            elif quick and is_compiled(contender):
                reason = "left out of --quick: compiling takes longer than all the rest"
                row.update(status="skipped", reason=reason)
            elif reason := too_slow(work, contender, rows):
                row.update(status="skipped", reason=reason)
            else:
                row = try_row(work, contender, device, **options)
                if row["status"] == "failed" and device_is_lost(device):
                    stop = f"the device stopped answering after {contender}, {work.describe()}"
                    say(stop)
            rows.append(row)
            on_row(row, work)
        document["finished"] = True
    except KeyboardInterrupt:
        say(f"interrupted after {len(rows)} rows")
    document["seconds"] = time.monotonic() - start
    write(document, path)
    return document


def wrong_or_failed(document: dict[str, Any]) -> bool:
    """Whether one of our own backends was."""
    own = [row for row in document["rows"] if row["contender"].startswith("fastgoal")]
    return any(entry["status"] in ("wrong", "failed") for entry in own + document["checks"])


def main(argv: list[str] | None = None) -> int:
    """The command; 1 when one of our own backends was wrong or failed, 130 after Ctrl-C."""
    arguments = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    path = arguments.out or default_path(device)
    console = Console(width=None if sys.stdout.isatty() else 200)
    flags = [f"--{name}" for name in ("quick", "cpu") if getattr(arguments, name)]
    if arguments.section:
        flags.append(f"--section {arguments.section}")

    def on_row(row: dict[str, Any], work: AnyWorkload) -> None:
        if row["status"] != "skipped":
            show(row, work, console)

    document = measure_sweep(
        device,
        path,
        " ".join(["python -m benchmarks.device", *flags]),
        quick=arguments.quick,
        budget=arguments.budget,
        only=arguments.only,
        section=arguments.section,
        say=lambda text: console.print(text, markup=False),
        on_row=on_row,
    )
    rows, seconds = document["rows"], document["seconds"]
    console.print(f"{len(rows)} rows in {seconds:.0f} s, written to {path}", markup=False)
    if not document["finished"]:
        return 130
    return 1 if wrong_or_failed(document) else 0


if __name__ == "__main__":
    sys.exit(main())

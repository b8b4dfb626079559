"""One command that measures this device: `python -m benchmarks.device`, under eight minutes.

    python -m benchmarks.device [--quick] [--out PATH] [--budget SECONDS] [--cpu] [--only TEXT]

Device facts and measured ceilings, correctness spot checks, then MaxSim and its contrastive loss
against plain PyTorch, torch.compile, the chunked torch backend and the fused peers. Parity is
asserted before anything is timed; what fails or is missing becomes a row that says why. On a CPU
the sizes are tiny (smaller still with --quick) and show that the sweep works, nothing else.

The JSON it writes:

    schema, kind "device", command, date, source {commit, modified}, versions, device {...}
    seconds, finished          finished is false in what an interrupted run leaves behind
    ceilings                   copy_gb_s, gemm_tflop_s and the gemm_dtype they were measured in
    checks                     [{name, status (ok, wrong, unavailable, failed), error, reason}]
    rows                       one per workload and contender:
        op direction stage images texts text_tokens image_tokens dim dtype layout fill contender
        status                 ok | unavailable | wrong | out of memory | failed | skipped
        reason                 why, when it is not ok
        parity                 largest relative error against float32: {scores | loss | gradients}
        median_ms low_ms high_ms best_ms repeats       with the 20th and 80th percentile
        extra_bytes            peak beyond the inputs and what the call returns
        tflop_s share_of_gemm  useful FLOP of the forward; null when a backward is included
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import facts, parity
from .measure import copies_past_l2, forward_backward, measure_memory, measure_time
from .peers import Unavailable
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


def measure_row(
    work: Workload, contender: str, device: torch.device, gemm_tflop_s: float, seconds: float
) -> dict[str, Any]:
    """One workload by one contender. Raises whatever the contender raises."""
    inputs = make_inputs(work, device)
    call = build(contender, work, inputs)
    errors = parity.measure(work, call, inputs)
    own_rounding = contender.startswith(("eager", "torch.compile"))
    limits = parity.ROUNDED if own_rounding else parity.EXACT
    row: dict[str, Any] = {"parity": errors}
    wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
    if wrong:
        name, error = next(iter(wrong.items()))
        reason = f"relative error of {name} {error:.2g} is above {limits[name]:g}"
        return {**row, "status": "wrong", "reason": reason}

    def step(own: Inputs) -> Callable[[], Any]:
        if work.stage == "forward+backward":
            return lambda: forward_backward(lambda: call(own), own.leaves)
        return lambda: call(own)

    copies = [inputs]
    for _ in range(copies_past_l2(inputs.leaves, device) - 1):
        copies.append(make_inputs(work, device))
    steps = [step(own) for own in copies]
    steps[0]()
    row["extra_bytes"] = measure_memory(steps[0], device)
    timing = measure_time(steps, device, seconds=seconds)
    row.update(asdict(timing))
    if work.stage != "forward+backward":
        row["tflop_s"] = useful_flop(work, inputs.captions) / timing.median_ms / 1e9
        row["share_of_gemm"] = row["tflop_s"] / gemm_tflop_s
    return {**row, "status": "ok"}


EMPTY_ROW = dict.fromkeys(
    ("status", "reason", "parity", "median_ms", "low_ms", "high_ms", "best_ms", "repeats",
     "extra_bytes", "tflop_s", "share_of_gemm")
)  # fmt: skip


def try_row(work: Workload, contender: str, device: torch.device, **options: Any) -> dict[str, Any]:
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


def show(row: dict[str, Any], work: Workload, console: Console) -> None:
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
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; 1 when one of our own backends was wrong or failed."""
    start = time.monotonic()
    arguments = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    path = arguments.out or default_path(device)
    console = Console(width=None if sys.stdout.isatty() else 200)
    flags = [name for name in ("quick", "cpu") if getattr(arguments, name)]
    command = " ".join(["python -m benchmarks.device", *(f"--{name}" for name in flags)])
    document: dict[str, Any] = {
        "schema": SCHEMA, "kind": "device", **facts.provenance(command, device), "finished": False,
    }  # fmt: skip
    console.print(f"{document['device']}\n{document['versions']}", markup=False)

    document["ceilings"] = measure_ceilings(device, arguments.quick)
    console.print(f"ceilings: {document['ceilings']}", markup=False)
    document["checks"] = parity.run_checks(device)
    for check in document["checks"]:
        console.print(
            f"check {check['name']}: {check['status']} {check['reason'] or check['error']}"
        )

    rows: list[dict[str, Any]] = []
    document["rows"] = rows
    stop: str | None = None
    options = {
        "gemm_tflop_s": document["ceilings"]["gemm_tflop_s"],
        "seconds": 0.02 if arguments.quick else 0.5,
    }
    works = sweep(device.type == "cuda", arguments.quick)
    for contender in CONTENDERS:
        if arguments.only not in contender:
            continue
        for work in works:
            if not takes_part(contender, work):
                continue
            if stop is None and time.monotonic() - start > arguments.budget:
                stop = f"the time budget of {arguments.budget:.0f} s was used up"
                console.print(f"{stop}: the remaining rows are skipped", style="yellow")
            row = {**work.as_json(), "contender": contender, **EMPTY_ROW}
            if stop is not None:
                row.update(status="skipped", reason=stop)
            elif arguments.quick and contender == "torch.compile":
                reason = "left out of --quick: compiling takes longer than all the rest"
                row.update(status="skipped", reason=reason)
            else:
                row = try_row(work, contender, device, **options)
                show(row, work, console)
                if row["status"] == "failed" and device_is_lost(device):
                    stop = f"the device stopped answering after {contender}, {work.describe()}"
                    console.print(stop, style="red")
            rows.append(row)
        document["seconds"] = time.monotonic() - start
        write(document, path)
    document["finished"] = True
    write(document, path)
    console.print(
        f"{len(rows)} rows in {document['seconds']:.0f} s, written to {path}", markup=False
    )
    own = [row for row in rows if row["contender"].startswith("fastgoal")] + document["checks"]
    return 1 if any(entry["status"] in ("wrong", "failed") for entry in own) else 0


if __name__ == "__main__":
    sys.exit(main())

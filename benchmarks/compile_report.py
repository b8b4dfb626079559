"""Compile every Triton kernel configuration ahead of time and report what it became; no GPU needed.

    python -m benchmarks.compile_report [--arch 80 90 …] [--only TEXT] [--json PATH] [--no-cache]
                                        [--new] [--record]

Every module of fastgoal_kernels/ops that has `compile_cases(arch)` is compiled with the Triton that
is installed. Exits with 1 when a configuration does not compile, spills, wants more shared memory
than a block may have, or (matrix kernels) misses its matrix instructions: wgmma on sm_90 for 16-bit
inputs, any elsewhere. Results are cached in .cache/compile_report by kernel source, Triton version
and configuration, so that only what changed is compiled again.

benchmarks/results/compiled.txt remembers, by the same digests, which configurations were found to
be right: `--record` writes it from a run over all of them, and `--new` compiles the others only,
as the tests do; both together add what is new and drop what there no longer is. A changed kernel,
configuration, compiler or reader has a new digest.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import platform
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastgoal_kernels.ops
from fastgoal_kernels.ops.compile_cases import CompileCase

from . import cubin
from .cubin import LIMITS, Compiled, compile_case

ARCHITECTURES = (80, 86, 90, 100)
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "compile_report"
RECORD = Path(__file__).resolve().parent / "results" / "compiled.txt"
WORKERS = 2


@dataclass(frozen=True)
class CaseAddress:
    """Where a worker process finds a case: JIT functions can not be pickled."""

    module: str
    arch: int
    index: int

    def case(self) -> CompileCase:
        return module_cases(self.module, self.arch)[self.index]


@cache
def module_cases(module: str, arch: int) -> list[CompileCase]:
    return importlib.import_module(module).compile_cases(arch)


def kernel_modules() -> Iterator[str]:
    """The modules of fastgoal_kernels.ops that expose compile cases."""
    for info in pkgutil.iter_modules(fastgoal_kernels.ops.__path__, "fastgoal_kernels.ops."):
        if hasattr(importlib.import_module(info.name), "compile_cases"):
            yield info.name


def case_key(case: CompileCase, arch: int) -> str:
    """A digest of all that decides the result: source, compiler, configuration and this reader."""
    reader = Path(cubin.__file__).read_bytes()
    parts = {
        "kernel": case.kernel.cache_key,
        "triton": triton.__version__,
        "environment": sorted((k, v) for k, v in os.environ.items() if k.startswith("TRITON_")),
        "machine": platform.machine(),
        "arch": arch,
        "case": [case.name, case.label, case.uses_matrix_unit],
        "options": [case.num_warps, case.num_stages, case.maxnreg],
        "signature": list(case.signature.items()),
        "constexprs": sorted((name, repr(value)) for name, value in case.constexprs.items()),
        "aligned": sorted(case.aligned),
        "reader": hashlib.sha256(reader).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compile_and_store(address: CaseAddress, path: Path) -> Compiled:
    row = compile_case(address.case(), address.arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(row.as_json()))
    partial.replace(path)  # a run that is stopped leaves no half-written result
    return row


def _compile_alone(address: CaseAddress, path: Path) -> Compiled:
    """Again in a process of its own, so that a compiler crash is put down to its own case."""
    case = address.case()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_compile_and_store, address, path).result()
    except BrokenProcessPool:
        row = Compiled(case.name, case.label, address.arch, case.num_warps, case.num_stages)
        row.problems.append("does not compile: the compiler crashed")
        return row


def compile_all(addresses: list[CaseAddress], use_cache: bool, console: Console) -> list[Compiled]:
    """The rows of all cases, in their order; compiles what the cache does not hold."""
    rows: dict[CaseAddress, Compiled] = {}
    missing: dict[CaseAddress, Path] = {}
    for address in addresses:
        path = CACHE / f"{case_key(address.case(), address.arch)}.json"
        if use_cache and path.exists():
            rows[address] = Compiled(**json.loads(path.read_text()))
        else:
            missing[address] = path
    if missing:
        console.print(f"compiling {len(missing)} configurations, {len(rows)} are cached …")
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            futures = {a: pool.submit(_compile_and_store, a, path) for a, path in missing.items()}
        for address, path in missing.items():
            try:
                rows[address] = futures[address].result()
            except BrokenProcessPool:
                rows[address] = _compile_alone(address, path)
    return [rows[address] for address in addresses]


def recorded() -> set[str]:
    """Digests of configurations that compiled without a problem, with this Triton."""
    return set(_record().get(triton.__version__, ()))


def record(keys: Iterable[str]) -> None:
    """Put these digests in the place of all that this Triton had."""
    versions = _record() | {triton.__version__: sorted(keys)}
    lines = [f"{version} {key}\n" for version in sorted(versions) for key in versions[version]]
    RECORD.write_text("".join(lines))


def _record() -> dict[str, list[str]]:
    versions: dict[str, list[str]] = {}
    for line in RECORD.read_text().splitlines() if RECORD.is_file() else ():
        version, key = line.split()
        versions.setdefault(version, []).append(key)
    return versions


def _table(rows: list[Compiled], arch: int) -> Table:
    table = Table(title=f"sm_{arch}, Triton {triton.__version__}")
    for column in ("kernel", "configuration", "matrix instr."):
        table.add_column(column, overflow="fold")
    for column in (
        "warps", "stages", "registers", "spill B", "shared B", "tmem", "shuffles", "instr.",
        "blocks/SM", "occupancy",
    ):  # fmt: skip
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        matrix = " ".join(f"{count} {name}" for name, count in sorted(row.matrix.items()))
        spilled = row.spill_stores + row.spill_loads
        table.add_row(
            row.name, escape(row.label), matrix or "–", str(row.num_warps), str(row.num_stages),
            str(row.registers), str(spilled), f"{row.shared:,}", str(row.tensor_memory_columns),
            str(row.shuffles), str(row.instructions), str(row.blocks_per_sm),
            f"{row.occupancy:.0%}",
            style="red" if row.problems else None,
        )  # fmt: skip
    return table


def report(rows: list[Compiled], console: Console) -> int:
    """Print the tables and what is wrong; returns the number of rows with problems."""
    for arch in dict.fromkeys(row.arch for row in rows):
        console.print(_table([row for row in rows if row.arch == arch], arch))
    for row in rows:
        for kind, lines in (("problem", row.problems), ("note", row.notes)):
            for line in lines:
                console.print(
                    f"{kind}: {row.name} ({row.label}) on sm_{row.arch}: {line}",
                    markup=False,
                    style="red" if kind == "problem" else "yellow",
                )
    bad = sum(bool(row.problems) for row in rows)
    console.print(f"{len(rows)} configurations compiled, {bad} with problems")
    return bad


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, choices=sorted(LIMITS)
    )
    parser.add_argument("--only", default="", help="kernels whose name or label contains this")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--no-cache", action="store_true", help="compile everything again")
    parser.add_argument("--new", action="store_true", help="only what is not on record")
    parser.add_argument("--record", action="store_true", help="put what is right on record")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")

    partial = arguments.only or set(arguments.arch) != set(ARCHITECTURES)
    if arguments.record and partial:
        parser.error("--record is for a run over everything: leave --arch and --only out")

    console = Console(width=None if sys.stdout.isatty() else 200)
    addresses = [
        CaseAddress(module, arch, index)
        for arch in arguments.arch
        for module in kernel_modules()
        for index, case in enumerate(module_cases(module, arch))
        if arguments.only in f"{case.name} {case.label}"
    ]
    exposed = bool(addresses)
    known: set[str] = set()
    if arguments.new:
        known = recorded() & {case_key(a.case(), a.arch) for a in addresses}
        addresses = [a for a in addresses if case_key(a.case(), a.arch) not in known]
        console.print(f"{len(known)} configurations are on record")
    rows = compile_all(addresses, not arguments.no_cache, console)
    bad = report(rows, console)
    if arguments.record:
        right = (a for a, row in zip(addresses, rows, strict=True) if not row.problems)
        record(known | {case_key(a.case(), a.arch) for a in right})
    if arguments.json:
        document = {
            "command": "python -m benchmarks.compile_report " + " ".join(argv or sys.argv[1:]),
            "triton": triton.__version__,
            "rows": [row.as_json() for row in rows],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if not exposed:
        console.print("no kernel exposes compile cases", style="red")
    return 1 if bad or not exposed else 0


if __name__ == "__main__":
    sys.exit(main())

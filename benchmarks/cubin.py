"""Compile a Triton kernel for a GPU that is not there, and read the machine code it became.

Everything reported was read: registers and stack from the cubin's resource usage, spills and matrix
instructions from its SASS, shared and tensor memory from the compiler's metadata, threads a block
from the PTX. Occupancy is arithmetic on those and on the published limits of the architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgoal_kernels.ops.compile_cases import CompileCase

KB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one compute capability; CUDA C++ Programming Guide, "Technical Specifications"."""

    shared_per_block: int  # bytes a block may opt in to
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65_536
    tensor_memory_columns: int = 0  # Blackwell's tensor memory, per SM


LIMITS = {
    80: Limits(163 * KB, 164 * KB, warps_per_sm=64, blocks_per_sm=32),
    86: Limits(99 * KB, 100 * KB, warps_per_sm=48, blocks_per_sm=16),
    89: Limits(99 * KB, 100 * KB, warps_per_sm=48, blocks_per_sm=24),
    90: Limits(227 * KB, 228 * KB, warps_per_sm=64, blocks_per_sm=32),
    100: Limits(227 * KB, 228 * KB, 64, 32, tensor_memory_columns=512),
    120: Limits(99 * KB, 100 * KB, warps_per_sm=48, blocks_per_sm=24),
}

# Warp-wide mma (HMMA, IMMA, DMMA, ...; the fp8 and fp4 ones of later generations are QMMA and
# OMMA), Hopper's warpgroup wgmma (HGMMA, QGMMA, ...) and Blackwell's tcgen05.mma (UTCHMMA, ...).
_MATRIX = re.compile(r"^(?:[BDHIQO]MMA|[BHIQ]GMMA|UTC[HIQO]MMA)\b")
_WGMMA = re.compile(r"^[BHIQ]GMMA\b")
_TCGEN05 = re.compile(r"^UTC[HIQO]MMA\b")

# "        /*0070*/              @!P0 LDL.64 R2, [R1+0x8] ;" -> LDL.64
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")


class CompileError(RuntimeError):
    """The kernel does not compile for this architecture."""


@dataclass
class Compiled:
    """One configuration on one architecture. Sizes in bytes, counts are static (not executed)."""

    name: str
    label: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory_columns: int = 0
    threads: int = 0
    instructions: int = 0
    shuffles: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{Path(command[0]).name} failed: {result.stderr.strip()[:400]}")
    return result.stdout


def _access_bytes(opcode: str) -> int:
    """Bytes a thread moves in one local load or store: LDL.64 -> 8, STL.U8 -> 1, LDL.LU -> 4."""
    for part in opcode.split(".")[1:]:
        if re.fullmatch(r"[US]?(8|16|32|64|128)", part):
            return int(part.lstrip("US")) // 8
    return 4


def opcodes(sass: str) -> Counter[str]:
    """How often each instruction stands in a disassembly."""
    return Counter(_INSTRUCTION.findall(sass))


def blocks_per_sm(
    limits: Limits, registers: int, shared: int, threads: int, columns: int = 0
) -> int:
    """Resident blocks an SM, as the CUDA occupancy calculator counts them.

    Registers are handed out to warps in units of 256, from four files of their own; each block
    takes 1 KB of shared memory for the system on top of its own.
    """
    warps = -(-threads // 32)
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    resident_warps = 4 * (limits.registers_per_sm // 4 // warp_registers)
    by_shared = limits.shared_per_sm // (shared + KB)
    counts = [resident_warps // warps, by_shared, limits.warps_per_sm // warps]
    counts.append(limits.blocks_per_sm)
    if columns:
        counts.append(limits.tensor_memory_columns // columns)
    return max(0, min(counts))


def compile_cubin(case: CompileCase, arch: int) -> Any:
    """triton.compile for a GPU of compute capability `arch` / 10, which need not exist."""
    if not hasattr(case.kernel, "cache_key"):
        raise CompileError(
            f"{case.name} is no compilable kernel but a {type(case.kernel).__name__}: unset "
            f"TRITON_INTERPRET for the compile report"
        )
    index = {name: i for i, name in enumerate(case.kernel.arg_names)}
    # Attributes go by the parameter's path, in Triton 3.6 and 3.9 alike: (index,) for a plain one.
    aligned = {(index[name],): [["tt.divisibility", 16]] for name in sorted(case.aligned)}
    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs), aligned)
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "maxnreg": case.maxnreg,
    }
    # A fresh folder, because Triton's own cache would hide whether it compiles today.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        try:
            return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        except Exception as error:  # Triton raises a dozen unrelated types; the reason is enough
            # Its message shows the source first and says what is wrong with it last.
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise CompileError(f"does not compile: {type(error).__name__}: {reason}") from error


def read_cubin(case: CompileCase, arch: int, kernel: Any) -> Compiled:
    """The figures of one compiled kernel (what `compile_cubin` returned)."""
    row = Compiled(case.name, case.label, arch, case.num_warps, case.num_stages)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(_tool("cuobjdump"), "-sass", file.name)
    resources = _RESOURCES.search(usage)
    threads = _THREADS.search(kernel.asm["ptx"])
    if resources is None or threads is None:
        raise CompileError(f"no resource usage in cuobjdump's answer or the PTX: {usage[:200]!r}")
    row.registers, row.stack = int(resources[1]), int(resources[2])
    row.threads = int(threads[1])
    row.shared = kernel.metadata.shared
    row.tensor_memory_columns = getattr(kernel.metadata, "tmem_size", None) or 0
    counts = opcodes(sass)
    row.instructions = sum(counts.values())
    for opcode, count in counts.items():
        family = opcode.split(".")[0]
        if family == "LDL":
            row.spill_loads += count * _access_bytes(opcode)
        elif family == "STL":
            row.spill_stores += count * _access_bytes(opcode)
        elif family == "SHFL":
            row.shuffles += count
        elif _MATRIX.match(opcode):
            row.matrix[family] = row.matrix.get(family, 0) + count
    limits = LIMITS[arch]
    row.blocks_per_sm = blocks_per_sm(
        limits, row.registers, row.shared, row.threads, row.tensor_memory_columns
    )
    row.occupancy = row.blocks_per_sm * (row.threads // 32) / limits.warps_per_sm
    return row


def _takes_16_bit(case: CompileCase) -> bool:
    return any(re.search(r"\b(?:bf16|fp16)\b", kind) for kind in case.signature.values())


def judge(case: CompileCase, row: Compiled) -> None:
    """Fill in the row's problems (which fail the report) and notes (which do not)."""
    limits = LIMITS[row.arch]
    if row.spill_stores or row.spill_loads:
        row.problems.append(
            f"spills: {row.spill_stores} B of local stores, {row.spill_loads} B of local loads"
        )
    if row.shared > limits.shared_per_block:
        row.problems.append(
            f"shared memory: {row.shared} B, a block may have {limits.shared_per_block} B"
        )
    if row.tensor_memory_columns > limits.tensor_memory_columns:
        row.problems.append(
            f"tensor memory: {row.tensor_memory_columns} columns of {limits.tensor_memory_columns}"
        )
    if not case.uses_matrix_unit:
        return
    if not row.matrix:
        row.problems.append("no matrix instruction")
    elif _takes_16_bit(case):
        if row.arch == 90 and not any(_WGMMA.match(name) for name in row.matrix):
            row.problems.append(f"no wgmma (HGMMA) on sm_90, only {', '.join(row.matrix)}")
        if row.arch == 100 and not any(_TCGEN05.match(name) for name in row.matrix):
            row.notes.append(f"no tcgen05.mma on sm_100, only {', '.join(row.matrix)}")


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compile one case, read it and judge it; a case that does not compile is a problem."""
    try:
        row = read_cubin(case, arch, compile_cubin(case, arch))
    except CompileError as error:
        row = Compiled(case.name, case.label, arch, case.num_warps, case.num_stages)
        row.problems.append(str(error))
        return row
    judge(case, row)
    return row

"""Every kernel configuration, compiled ahead of time: no spills, launchable, on the tensor cores.

The first half tests the harness on small kernels made to be wrong; the second runs the report on
the library's kernels with the Triton installed here and, in a side environment, Triton 3.6.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed (it is Linux only)")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402

from benchmarks import compile_report, cubin  # noqa: E402
from fastgoal_kernels.ops.compile_cases import CompileCase  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def matmul_max_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for n in range(0, N, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            a_ptrs = a_ptr + rows[:, None] * stride_a + ks[None, :]
            b_ptrs = b_ptr + cols[None, :] * stride_b + ks[:, None]
            a = tl.load(a_ptrs, mask=(rows < M)[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=(cols < N)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        best = tl.maximum(best, tl.max(tl.where((cols < N)[None, :], acc, float("-inf")), 1))
    tl.store(out_ptr + rows, best, mask=rows < M)


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * N + columns, mask=columns < N, other=0.0)
    tl.store(out_ptr + row, tl.sum(x))


def matmul_case(dtype="bf16", m=128, n=64, k=64, num_warps=4, num_stages=2) -> CompileCase:
    return CompileCase(
        name="matmul_max",
        label=f"{dtype} {m}x{n}x{k}",
        kernel=matmul_max_kernel,
        signature={
            "a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": "*fp32",
            "M": "i32", "N": "i32", "K": "i32", "stride_a": "i32", "stride_b": "i32",
            "BLOCK_M": "constexpr", "BLOCK_N": "constexpr", "BLOCK_K": "constexpr",
        },
        constexprs={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k},
        num_warps=num_warps,
        num_stages=num_stages,
        uses_matrix_unit=True,
        aligned=frozenset({"a_ptr", "b_ptr", "out_ptr", "K", "stride_a", "stride_b"}),
    )  # fmt: skip


ROW_SUM = CompileCase(
    name="row_sum",
    label="fp32",
    kernel=row_sum_kernel,
    signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32", "BLOCK": "constexpr"},
    constexprs={"BLOCK": 1024},
    num_warps=4,
    num_stages=1,
    uses_matrix_unit=False,
)


@pytest.mark.parametrize(
    "arch, instruction", [(80, "HMMA"), (86, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")]
)
def test_a_good_kernel_has_no_problem_and_its_generations_matrix_instruction(arch, instruction):
    row = cubin.compile_case(matmul_case(), arch)
    assert row.problems == [] and row.notes == []
    assert list(row.matrix) == [instruction] and row.matrix[instruction] > 0
    assert row.threads == 128
    assert 32 <= row.registers <= 255
    # Two stages of the a and b tiles lie in shared memory at least once, in 2-byte elements.
    assert row.shared >= (128 + 64) * 64 * 2
    assert 1 <= row.blocks_per_sm <= cubin.LIMITS[arch].blocks_per_sm
    assert (row.tensor_memory_columns > 0) == (arch == 100)


def test_a_spill_is_a_problem():
    # 128 x 256 float32 accumulators in four warps are 256 registers a thread; there are 255.
    row = cubin.compile_case(matmul_case(m=128, n=256, num_warps=4), 80)
    assert row.spill_stores > 0 and row.spill_loads > 0 and row.stack > 0
    assert any(problem.startswith("spills:") for problem in row.problems)


def test_too_much_shared_memory_is_a_problem_of_the_architecture_that_lacks_it():
    # Five stages of (128 + 128) x 128 bf16 are 320 KB; three are 192 KB, too much for sm_86 alone.
    over = cubin.compile_case(matmul_case(n=128, k=128, num_warps=8, num_stages=5), 90)
    assert any(problem.startswith("shared memory:") for problem in over.problems)
    assert over.blocks_per_sm == 0 and over.occupancy == 0
    case = matmul_case(n=128, k=128, num_warps=8, num_stages=3)
    assert cubin.compile_case(case, 90).problems == []
    small = cubin.compile_case(case, 86)
    assert any(problem.startswith("shared memory:") for problem in small.problems)


def test_a_matrix_kernel_without_matrix_instructions_is_a_problem():
    # IEEE float32 products never reach the tensor cores.
    row = cubin.compile_case(matmul_case("fp32", m=64, k=32), 90)
    assert row.problems == ["no matrix instruction"]
    assert cubin.compile_case(replace(ROW_SUM), 90).problems == []


def test_hopper_without_wgmma_is_a_problem_and_only_there():
    # wgmma multiplies 64 rows at a time, so a 32-row tile falls back to warp-wide mma.
    case = matmul_case(m=32)
    row = cubin.compile_case(case, 90)
    assert list(row.matrix) == ["HMMA"]
    assert any("wgmma" in problem for problem in row.problems)
    assert cubin.compile_case(case, 80).problems == []


def test_alignment_reaches_the_compiler():
    def loads(case):
        kernel = cubin.compile_cubin(case, 80)
        return kernel.asm["ptx"]

    aligned = replace(ROW_SUM, aligned=frozenset({"x_ptr", "out_ptr", "N"}))
    assert "v4" in loads(aligned) and "v4" not in loads(ROW_SUM)


def test_a_kernel_that_does_not_compile_is_a_problem_with_its_reason():
    row = cubin.compile_case(matmul_case(k=48), 80)  # tl.arange wants a power of two
    assert len(row.problems) == 1 and row.problems[0].startswith("does not compile: ")
    assert "power of 2" in row.problems[0]


def test_reading_sass():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x003fde0000000f00 */
        /*0010*/              @!P0 STL.64 [R1+0x8], R2 ;         /* 0x0 */
        /*0020*/               @P3 LDL.LU R4, [R1] ;             /* 0x0 */
        /*0030*/                   LDL.U8 R4, [R1] ;             /* 0x0 */
        /*fff0*/             @!UP0 UTCHMMA.2CTA gdesc[UR4] ;     /* 0x0 */
        /*10000*/                  STTM.x32 tmem[UR4], R8 ;      /* 0x0 */
    """
    assert dict(cubin.opcodes(sass)) == {
        "MOV": 1, "STL.64": 1, "LDL.LU": 1, "LDL.U8": 1, "UTCHMMA.2CTA": 1, "STTM.x32": 1,
    }  # fmt: skip
    assert [cubin._access_bytes(op) for op in ("STL.64", "LDL.LU", "LDL.U8")] == [8, 4, 1]


def test_occupancy_agrees_with_the_cuda_calculator():
    hopper, ampere = cubin.LIMITS[90], cubin.LIMITS[80]
    assert cubin.blocks_per_sm(hopper, registers=128, shared=0, threads=256) == 2
    assert cubin.blocks_per_sm(hopper, registers=168, shared=0, threads=128) == 3
    assert cubin.blocks_per_sm(hopper, registers=32, shared=100 * 1024, threads=128) == 2
    assert cubin.blocks_per_sm(ampere, registers=32, shared=0, threads=1024) == 2
    assert cubin.blocks_per_sm(ampere, registers=16, shared=0, threads=32) == 32


def test_the_cache_key_follows_the_configuration():
    case = matmul_case()
    others = [
        replace(case, num_stages=3),
        replace(case, num_warps=8),
        replace(case, aligned=frozenset()),
        replace(case, constexprs={**case.constexprs, "BLOCK_N": 128}),
        replace(case, signature={**case.signature, "M": "i64"}),
    ]
    keys = {compile_report.case_key(each, 90) for each in [case, *others]}
    keys |= {compile_report.case_key(case, 80)}
    assert len(keys) == 7
    assert compile_report.case_key(matmul_case(), 90) == compile_report.case_key(case, 90)


def test_a_case_that_contradicts_its_kernel_is_refused():
    case = matmul_case()
    with pytest.raises(ValueError, match="parameters in order"):
        replace(case, signature={**case.signature, "extra": "i32"})
    with pytest.raises(ValueError, match="must be the same"):
        replace(case, constexprs={"BLOCK_M": 128})
    with pytest.raises(ValueError, match="aligned names"):
        replace(case, aligned=frozenset({"BLOCK_M"}))


# ---------------------------------------------------------------------------------------------
# The library's kernels
# ---------------------------------------------------------------------------------------------


ARCHS = list(compile_report.ARCHITECTURES)
# A kernel and configuration that is compiled whatever is on record.
ONE = "maxsim_rows_kernel bf16 D=512 winners 128x256x64"


def run_report(python: str, path: Path, archs: list[int], *options: str) -> dict:
    """The report's rows as `python` (and its Triton) sees them; asserts that none has a problem."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = ["--json", str(path), "--arch", *map(str, archs), *options]
    result = subprocess.run(
        [python, "-m", "benchmarks.compile_report", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    return json.loads(path.read_text())


def check_rows(rows: list[dict]) -> None:
    for row in rows:
        assert row["registers"] > 0 and row["instructions"] > 0, row
        assert row["spill_stores"] == row["spill_loads"] == 0, row
        assert row["shared"] <= cubin.LIMITS[row["arch"]].shared_per_block, row
        assert row["problems"] == [], row


def check_kernels(python: str, version: str, folder: Path) -> None:
    """What is not on record compiles well, and one kernel does so in any case."""
    fresh = run_report(python, folder / "new.json", ARCHS, "--new")
    assert fresh["triton"].startswith(version)
    check_rows(fresh["rows"])
    one = run_report(python, folder / "one.json", [90], "--only", ONE, "--no-cache")
    check_rows(one["rows"])
    assert any("HGMMA" in row["matrix"] for row in one["rows"])


@pytest.mark.slow
def test_every_kernel_compiles_well_with_this_triton(tmp_path):
    check_kernels(sys.executable, triton.__version__, tmp_path)


@pytest.mark.slow
def test_every_kernel_compiles_well_with_triton_3_6(tmp_path):
    python = os.environ.get("FASTGOAL_TRITON36_PYTHON")
    if not python:
        pytest.skip("FASTGOAL_TRITON36_PYTHON names no interpreter with Triton 3.6")
    check_kernels(python, "3.6.", tmp_path)


def test_only_what_is_not_on_record_is_compiled(tmp_path, monkeypatch, capsys):
    cases = [ROW_SUM, replace(ROW_SUM, num_warps=8)]
    monkeypatch.setattr(compile_report, "RECORD", tmp_path / "compiled.txt")
    monkeypatch.setattr(compile_report, "kernel_modules", lambda: ["here"])
    monkeypatch.setattr(compile_report, "module_cases", lambda module, arch: cases)
    keys = [compile_report.case_key(case, 90) for case in cases]
    assert keys[0] != keys[1]
    compile_report.record(keys[1:])
    compile_report.record(keys[:1])
    assert compile_report.recorded() == {keys[0]}
    asked = []

    def compiled(addresses, use_cache, console):
        asked.extend(addresses)
        return [cubin.compile_case(address.case(), address.arch) for address in addresses]

    monkeypatch.setattr(compile_report, "compile_all", compiled)
    assert compile_report.main(["--arch", "90", "--new"]) == 0
    assert [address.index for address in asked] == [1]
    assert "1 configurations are on record" in capsys.readouterr().out
    monkeypatch.setattr(compile_report, "ARCHITECTURES", (90,))
    assert compile_report.main(["--record"]) == 0
    assert compile_report.recorded() == set(keys)
    asked.clear()
    compile_report.record(["gone", keys[1]])
    assert compile_report.main(["--new", "--record"]) == 0
    assert [address.index for address in asked] == [0]
    assert compile_report.recorded() == set(keys)
    with pytest.raises(SystemExit):
        compile_report.main(["--record", "--only", "row"])


def test_a_problem_is_never_recorded(tmp_path, monkeypatch):
    spills = matmul_case(m=128, n=256, num_warps=4)
    monkeypatch.setattr(compile_report, "RECORD", tmp_path / "compiled.txt")
    monkeypatch.setattr(compile_report, "ARCHITECTURES", (80,))
    monkeypatch.setattr(compile_report, "kernel_modules", lambda: ["here"])
    monkeypatch.setattr(compile_report, "module_cases", lambda module, arch: [ROW_SUM, spills])
    monkeypatch.setattr(
        compile_report,
        "compile_all",
        lambda addresses, use_cache, console: [
            cubin.compile_case(address.case(), address.arch) for address in addresses
        ],
    )
    assert compile_report.main(["--record"]) == 1
    assert compile_report.recorded() == {compile_report.case_key(ROW_SUM, 80)}

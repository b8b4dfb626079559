"""Pieces of every matrix kernel: its product, its maximum, its tile, and what it may run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from ..backends import INTERPRETED
from .compile_cases import CompileCase

# Triton's interpreter is NumPy: it would multiply the bits of bfloat16 as integers.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; PRECISION says how float32 factors are taken."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def product_tile(
    a_rows, a_row, b_rows, b_row,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32 dot products of the rows a_row with the rows b_row."""
    d = tl.arange(0, BLOCK_D)
    a_ptrs = a_rows + a_row.to(tl.int64)[:, None] * D + d[None, :]
    b_ptrs = b_rows + b_row.to(tl.int64)[None, :] * D + d[:, None]
    tile = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for d_start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = d_start + d < D
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        tile = dot(a, b, tile, PRECISION)
        a_ptrs += BLOCK_D
        b_ptrs += BLOCK_D
    return tile


@triton.jit
def nan_max(a, b):
    """The larger, or NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@dataclass(frozen=True)
class Config:
    """A tile: rows x columns x channels, and what works on it."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    # ptxas aims at an occupancy, and spills a few bytes to reach it. Naming a limit above what the
    # kernel wants makes it stop.
    maxnreg: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.maxnreg)


def architecture(device: torch.device) -> int:
    """The compute capability times ten; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# 89 and 120 have what 86 has.
_LIKE = {89: 86, 120: 86}

Tiles = TypeVar("Tiles")


def of_architecture(table: Mapping[int, Tiles], arch: int) -> Tiles:
    """table[arch]; an architecture nobody has seen is taken for the next below."""
    return table[_LIKE.get(arch) or max((known for known in table if known <= arch), default=80)]


# Triton 3.2 has no registers for a tile of 256 columns: on sm_90 it spills up to 2.5 KB, or wants
# more shared memory than a block may have.
_MOST_COLUMNS = 128 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3) else 256


def for_compiler(tiles: Iterable[Config]) -> list[Config]:
    """The tiles, as wide as the Triton that is installed can compile them; each once."""
    narrowed = (replace(tile, block_n=min(tile.block_n, _MOST_COLUMNS)) for tile in tiles)
    return list(dict.fromkeys(narrowed))


def float32_precision(dtype: torch.dtype) -> str:
    """PRECISION of a product of this dtype, as torch.set_float32_matmul_precision allows."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def tile_case(
    kernel: Any,
    label: str,
    dtype: torch.dtype,
    config: Config,
    constexprs: dict[str, object],
    pointer_type: Callable[[str], str | None],
    has_product: bool = True,
) -> CompileCase:
    """The compile case of a kernel on tokens of `dtype`.

    `pointer_type` tells what a parameter points at: "tokens", another pointer type, or None for a
    size or a stride. Without a product it needs no matrix unit.
    """
    signature = {}
    for name in kernel.arg_names:
        kind = pointer_type(name)
        if name in constexprs:
            kind = "constexpr"
        signature[name] = f"*{_TYPE_NAMES[dtype]}" if kind == "tokens" else kind or "i32"
    tf32 = dtype == torch.float32 and constexprs.get("PRECISION") == "tf32"
    shape = f"{config.block_m}x{config.block_n}x{config.block_d}"
    return CompileCase(
        name=kernel.__name__,
        label=f"{'tf32' if tf32 else _TYPE_NAMES[dtype]} {label} {shape}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        uses_matrix_unit=has_product and (tf32 or dtype != torch.float32),
        aligned=frozenset(name for name, kind in signature.items() if kind.startswith("*")),
    )

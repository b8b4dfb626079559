"""One kernel configuration to compile ahead of time, described without a GPU or a tensor.

An op file that holds Triton kernels exposes `compile_cases(arch: int) -> list[CompileCase]`: every
configuration its launcher can pick on that architecture (80, 90, 100, ...: the compute capability
times ten). `benchmarks.compile_report` compiles them and reads the cubins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """What `kernel[grid](...)` would compile at run time, as the launcher would ask for it.

    Attributes:
        name: the kernel's name in the report ("maxsim_forward").
        label: what tells this configuration from its siblings ("bf16 both D=512 128x128x64").
        kernel: the `@triton.jit` function itself.
        signature: the Triton type of every parameter, by name and in the kernel's order: "*bf16",
            "*i64", "i32", "fp32", and "constexpr" for each name in `constexprs`.
        constexprs: the value of every constexpr parameter. Arguments that are None at run time are
            constexprs of value None: Triton specialises on that.
        aligned: the parameters known to be multiples of 16: pointers as torch allocates them, and
            sizes or strides that are in the case described. Without it loads are scalar and the
            kernel that is compiled is not the one that runs.
        num_warps, num_stages, maxnreg: launch options; maxnreg None = the assembler's own choice.
        uses_matrix_unit: the kernel multiplies matrices in a dtype that the tensor cores take, so
            that a cubin without matrix instructions is a failure.
    """

    name: str
    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    uses_matrix_unit: bool
    aligned: frozenset[str] = field(default_factory=frozenset)
    maxnreg: int | None = None

    def __post_init__(self) -> None:
        parameters = list(self.kernel.arg_names)
        if list(self.signature) != parameters:
            raise ValueError(
                f"{self.name} ({self.label}): the signature must name the kernel's parameters in "
                f"order, {parameters}; got {list(self.signature)}"
            )
        marked = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if marked != set(self.constexprs):
            raise ValueError(
                f"{self.name} ({self.label}): parameters marked constexpr {sorted(marked)} and "
                f"constexprs given {sorted(self.constexprs)} must be the same"
            )
        unknown = self.aligned - (set(parameters) - marked)
        if unknown:
            raise ValueError(
                f"{self.name} ({self.label}): aligned names {sorted(unknown)} are no run-time "
                f"parameters of the kernel"
            )

"""What the CPU benchmark compares with what, what it promises, and how its tables read.

Three sections: the training step; the scores alone, where those who have no gradients take part;
captions that fill about half of their context. A row compares with the first row of ours in its
section that multiplies in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .workloads import Workload

Row = dict[str, Any]

# Times faster than each rival, and the share of its extra memory: what each size promises of a
# training step. Of everything else that takes part, only that we are ahead.
TARGETS = {
    64: {"eager amax": 3.5, "eager max": 2.5, "memory": 1 / 10},
    128: {"eager amax": 5.0, "eager max": 3.0, "memory": 1 / 20},
}
AHEAD = 1.0


@dataclass(frozen=True)
class Entrant:
    """A row to be: its name in the table, and who does what.

    Attributes:
        contender: as `workloads.build` knows it.
        bfloat16: float32 tokens may be multiplied in bfloat16, not in float32 as IEEE has it.
    """

    label: str
    contender: str
    work: Workload
    bfloat16: bool = False

    @property
    def ours(self) -> bool:
        return self.contender.startswith("fastgoal ")


@dataclass(frozen=True)
class Section:
    """Entrants that are timed in turns."""

    name: str
    entrants: tuple[Entrant, ...]


# Label and contender of those who compute gradients, ours first.
DIFFERENTIABLE = {
    "fastgoal torch": "fastgoal torch",
    "eager amax": "eager amax",
    "eager max": "eager max",
    "torch.compile of amax": "torch.compile",
    "torch.compile of max": "torch.compile max",
    "late-interaction-kernels": "late-interaction-kernels",
    "flash-maxsim": "flash-maxsim",
}
BFLOAT16 = {
    "fastgoal torch, bf16 products": "fastgoal torch",
    "eager amax, bf16 products": "eager amax",
}
FORWARD_ONLY = {"maxsim-cpu": "maxsim-cpu", "fast-maxsim": "fast-maxsim"}


def sections(
    size: int,
    *,
    text_tokens: int = 77,
    long_text: int = 248,
    image_tokens: int = 196,
    dim: int = 512,
) -> tuple[Section, ...]:
    """All that is measured for size × size pairs."""

    def work(op: str, stage: str, tokens: int = text_tokens, **more: Any) -> Workload:
        return Workload(op, "both", stage, size, size, tokens, image_tokens, dim, "float32", **more)

    step = ("maxsim_contrastive_loss", "forward+backward")
    training, scores = work(*step), work("maxsim_scores", "inference")
    packed = work(*step, long_text, layout="packed", fill=0.55)
    padded = work(*step, long_text, layout="padded", fill=0.55)

    def entrants(names: dict[str, str], of: Workload, **more: Any) -> tuple[Entrant, ...]:
        return tuple(Entrant(label, name, of, **more) for label, name in names.items())

    return (
        Section(
            "training",
            entrants(DIFFERENTIABLE, training) + entrants(BFLOAT16, training, bfloat16=True),
        ),
        Section(
            "forward",
            entrants(DIFFERENTIABLE | FORWARD_ONLY, scores)
            + entrants(BFLOAT16, scores, bfloat16=True),
        ),
        Section(
            "ragged",
            (
                Entrant("fastgoal torch, packed", "fastgoal torch", packed),
                Entrant("fastgoal torch, padded", "fastgoal torch", padded),
                Entrant("eager amax, padded", "eager amax", padded),
                Entrant("eager max, padded", "eager max", padded),
            ),
        ),
    )


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------

HEAD = (
    "", "ms (20–80 %)", "ours is faster ×", "best ms", "by best times ×", "extra MB",
    "ours needs, of it", "error",
)  # fmt: skip


def by_section(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each section, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["section"], []).append(row)
    return found


def title(rows: list[Row]) -> str:
    """What the rows of one section measure, in one line."""
    what = {
        "training": "loss, forward and backward",
        "forward": "scores, no gradients",
        "ragged": f"loss, forward and backward, captions {rows[0]['fill']:.0%} full",
    }[rows[0]["section"]]
    row = rows[0]
    return (
        f"{what}: {row['images']} × {row['texts']}, T {row['text_tokens']}, "
        f"R {row['image_tokens']}, D {row['dim']}, {row['dtype']}, both directions"
    )


def is_ours(row: Row) -> bool:
    return row["contender"].startswith("fastgoal ")


def compared_with(row: Row, rows: list[Row]) -> Row | None:
    """The row of ours beside which this one stands, if that was measured."""
    own = [other for other in rows if is_ours(other) and other["status"] == "ok"]
    if not is_ours(row):
        own = [other for other in own if other["bfloat16"] == row["bfloat16"]]
    return next(iter(own), None)


def speed_target(row: Row) -> float | None:
    """How many times faster than this row ours is to be; None: nothing is promised."""
    targets = TARGETS.get(row["images"])
    if targets is None or is_ours(row):
        return None
    return targets.get(row["contender"], AHEAD) if row["section"] == "training" else AHEAD


def memory_target(row: Row) -> float | None:
    """The share of this row's extra memory that ours may need; None: nothing is promised."""
    promised = row["section"] == "training" and row["contender"] in ("eager amax", "eager max")
    return TARGETS.get(row["images"], {}).get("memory") if promised else None


def verdict(value: float, target: float | None, at_least: bool) -> str:
    """The value beside what was promised, and whether it holds."""
    if target is None:
        return f"{value:.3g}"
    holds = value >= target if at_least else value <= target
    sign = "≥" if at_least else "≤"
    return f"{value:.3g} ({sign} {target:.3g}: {'holds' if holds else 'MISSED'})"


def cells(row: Row, rows: list[Row]) -> list[str]:
    """One measured row of the table."""
    ours = compared_with(row, rows)
    speed = best = memory = share = ""
    if ours is not None:
        speed = verdict(row["median_ms"] / ours["median_ms"], speed_target(row), at_least=True)
        best = f"{row['best_ms'] / ours['best_ms']:.3g}"
    if row["extra_bytes"] is None:
        memory = "not seen"
    else:
        memory = f"{row['extra_bytes'] / 1e6:,.1f}"
        if ours is not None and row["extra_bytes"]:
            used = ours["extra_bytes"] / row["extra_bytes"]
            share = verdict(used, memory_target(row), at_least=False)
    return [
        row["contender"], f"{row['median_ms']:.1f} ({row['low_ms']:.1f}–{row['high_ms']:.1f})",
        speed, f"{row['best_ms']:.1f}", best, memory, share, f"{max(row['parity'].values()):.1e}",
    ]  # fmt: skip


def table(rows: list[Row]) -> list[list[str]]:
    """The cells of every row that was measured."""
    return [cells(row, rows) for row in rows if row["status"] == "ok"]


NOTES = {
    "late-interaction-kernels": "runs its eager reference on a CPU, once for each direction",
    "maxsim-cpu": "scores one query a call, in parts of so few tokens that its wheel is right",
    "fast-maxsim": "a fork of maxsim-cpu, scores one query a call",
    "eager amax, bf16 products": 'torch.set_float32_matmul_precision("medium")',
    "fastgoal torch, bf16 products": 'torch.set_float32_matmul_precision("medium"), close '
    "maxima may swap",
}


def footer(rows: list[Row]) -> list[str]:
    """What must be known of the rows, and who is missing, and why."""
    return remarks(rows, NOTES, lambda row: row["contender"])


def remarks(rows: list[Row], notes: Mapping[str, str], called: Callable[[Row], str]) -> list[str]:
    """The notes of the contenders that were measured, and why others were not; each line once."""
    lines = []
    for row in rows:
        name, status = row["contender"], row["status"]
        if status == "ok" and name in notes:
            lines.append(f"{name}: {notes[name]}")
        elif status != "ok":
            why = row["reason"] if status == "unavailable" else f"{status}: {row['reason']}"
            lines.append(f"left out: {called(row)}: {why}")
    return list(dict.fromkeys(lines))

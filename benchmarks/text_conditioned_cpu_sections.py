"""The text-conditioned loss on a CPU: who takes part, what is promised, how the table reads.

One table for all negatives and for sampled ones. A row compares with our row of the same negatives;
what the sampled losses hold compares with our loss of all negatives, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .cpu_sections import remarks, verdict
from .pooling_workloads import (
    ALL,
    COMPILED,
    EAGER,
    NOTES,
    PUBLISHED,
    SAMPLE,
    PoolingWorkload,
)

Row = dict[str, Any]

OURS = "fastgoal torch"
CONTENDERS = (OURS, EAGER, COMPILED, PUBLISHED)

# At this size, all negatives: times faster than plain PyTorch, the share of its extra memory, and
# that of the published loss of sampled negatives.
PROMISED = {"images": 64, "captions_per_image": 8, "tokens": 64, "dim": 512}
SPEED, MEMORY, MEMORY_OF_SAMPLED = 2.0, 1 / 10, 1.0


def entrants(
    images: int, captions_per_image: int, *, tokens: int = 64, dim: int = 512, heads: int = 8
) -> list[tuple[str, PoolingWorkload]]:
    """Contender and workload of every row."""
    works = [
        PoolingWorkload(negatives, images, captions_per_image, tokens, dim, heads, "float32")
        for negatives in (ALL, SAMPLE)
    ]
    return [(name, work) for work in works for name in CONTENDERS]


# ---------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------

HEAD = (
    "", "negatives", "ms (20–80 %)", "ours is faster ×", "best ms", "by best times ×", "extra MB",
    "ours needs, of it", "ours with all needs, of it", "error",
)  # fmt: skip

NEGATIVES = {ALL: "all", SAMPLE: "sampled"}


def title(rows: list[Row]) -> str:
    """What the rows measure, in one line."""
    row = rows[0]
    return (
        f"text-conditioned loss, forward and backward: {row['images']} images × "
        f"{row['images'] * row['captions_per_image']} captions, {row['tokens']} tokens, "
        f"D {row['dim']}, {row['heads']} heads, {row['dtype']}"
    )


def by_negatives(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows with all negatives, and those with sampled ones, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["negatives"], []).append(row)
    return found


def cells(row: Row, ours: Row, ours_of_all: Row | None) -> list[str]:
    """One measured row of the table."""
    promised = all(row[key] == value for key, value in PROMISED.items())
    beside_eager = promised and row["negatives"] == ALL and row["contender"] == EAGER
    speed = verdict(
        row["median_ms"] / ours["median_ms"], SPEED if beside_eager else None, at_least=True
    )
    share = verdict(
        ours["extra_bytes"] / row["extra_bytes"], MEMORY if beside_eager else None, at_least=False
    )
    share_of_all = ""
    if row["negatives"] == SAMPLE and ours_of_all is not None:
        target = MEMORY_OF_SAMPLED if promised and row["contender"] == PUBLISHED else None
        share_of_all = verdict(
            ours_of_all["extra_bytes"] / row["extra_bytes"], target, at_least=False
        )
    return [
        row["contender"], NEGATIVES[row["negatives"]],
        f"{row['median_ms']:.1f} ({row['low_ms']:.1f}–{row['high_ms']:.1f})", speed,
        f"{row['best_ms']:.1f}", f"{row['best_ms'] / ours['best_ms']:.3g}",
        f"{row['extra_bytes'] / 1e6:,.1f}", share, share_of_all,
        f"{max(row['parity'].values()):.1e}",
    ]  # fmt: skip


def tables(rows: list[Row]) -> list[list[list[str]]]:
    """The cells of every row that was measured, all negatives and sampled ones apart."""
    measured = by_negatives(row for row in rows if row["status"] == "ok")
    ours = {
        negatives: next(row for row in group if row["contender"] == OURS)
        for negatives, group in measured.items()
    }
    return [
        [cells(row, ours[negatives], ours.get(ALL)) for row in group]
        for negatives, group in measured.items()
    ]


def footer(rows: list[Row]) -> list[str]:
    """What must be known of the rows, and who is missing, and why."""
    return remarks(rows, NOTES, lambda row: f"{row['contender']}, {NEGATIVES[row['negatives']]}")

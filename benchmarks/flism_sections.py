"""The benchmark of local pairs: who takes part, what is promised, how the table reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

OURS, BFLOAT16 = "fastgoal prepare", "with --precision bf16"
SCRIPT, OUR_PIXELS = "one at a time", "one at a time, our pixels"
TIMED = ("detector", "image_tower", "text_tower")
STAGES = (*TIMED, "rest")  # of `split_ms`
PROMISED = 5.0  # times as fast as the script

HEAD = (
    "", "images/s", "ms an image (20–80 %)", "× the script", "CPU ms", "by CPU time ×",
    "detector", "image tower", "text tower", "rest",
)  # fmt: skip


def cells(row: Row, script: Row) -> list[str]:
    """A row of the table."""
    split = row.get("split_ms", {})  # some results have none
    stages = [f"{split[stage]:.1f}" if stage in split else "–" for stage in STAGES]
    return [
        row["contender"],
        f"{row['images_per_second']:.1f}",
        f"{row['median_ms']:.1f} ({row['low_ms']:.1f}–{row['high_ms']:.1f})",
        f"{script['median_ms'] / row['median_ms']:.1f}",
        f"{row['cpu_ms']:.1f}",
        f"{script['cpu_ms'] / row['cpu_ms']:.1f}",
        *stages,
    ]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of every row."""
    script = next(row for row in rows if row["contender"] == SCRIPT)
    return [cells(row, script) for row in rows]


def title(rows: Sequence[Row]) -> str:
    """What the rows measure, in one line."""
    row = rows[0]
    regions, sentences = row["regions"] / row["images"], row["sentences"] / row["images"]
    detector = f", {row['detector']}" if row["detector"] else ""
    return (
        f"local pairs of {row['images']} images{detector}: {regions:.1f} regions and "
        f"{sentences:.1f} sentences each, float32"
    )


def footer(rows: Sequence[Row]) -> list[str]:
    """Whether the promise is kept, and how to read the columns."""
    of = {row["contender"]: row for row in rows}
    ours, script = of[OURS], of[SCRIPT]
    times, processor = (script[key] / ours[key] for key in ("median_ms", "cpu_ms"))
    kept = "kept" if times >= PROMISED else "not kept"
    others = [_parity(name, of[name]) for name in (BFLOAT16, SCRIPT)]
    return [
        f"Promised: {PROMISED:g} × the script's images a second. {kept}: {times:.1f} ×, and "
        f"{processor:.1f} × by processor time.",
        f"Of {ours['sentences']} sentences' regions, against {OUR_PIXELS!r}: "
        f"{_parity('ours', ours)}; {'; '.join(others)}.",
        "Last columns: ms an image in a run of its own, in one thread; rest is reading, cropping, "
        "tokenising and writing.",
    ]


def _parity(name: str, row: Row) -> str:
    parity = row["parity"]
    return f"{name} {parity['other_regions']} others, scores to {parity['scores']:.1g}"

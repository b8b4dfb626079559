"""The losses of plain features on a CPU: who takes part, what is promised, how the table reads.

One table for both losses. A row compares with our row of the same loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .cpu_sections import remarks, verdict
from .feature_peers import CLIP, FEATURE_PEERS, SIGMOID
from .feature_workloads import COMPILED, FeatureWorkload, takes_part

Row = dict[str, Any]

OURS = "fastgoal torch"
CONTENDERS = (OURS, "open_clip", COMPILED + "open_clip", "eager",
              *(peer.name for peer in FEATURE_PEERS if peer.name != "open_clip"))  # fmt: skip

# At this batch and dim: times faster than open_clip's ClipLoss, and the share of its extra memory.
TARGETS = {(8192, 512): {"speed": 1.0, "memory": 1 / 20}}


def entrants(batch: int, dim: int = 512) -> list[tuple[str, FeatureWorkload]]:
    """Contender and workload of every row."""
    works = [
        FeatureWorkload(op, "forward+backward", batch, dim, "float32") for op in (CLIP, SIGMOID)
    ]
    return [(name, work) for work in works for name in CONTENDERS if takes_part(name, work)]


# ---------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------

HEAD = (
    "", "loss", "ms (20–80 %)", "ours is faster ×", "best ms", "by best times ×", "extra MB",
    "ours needs, of it", "error",
)  # fmt: skip

LOSSES = {CLIP: "softmax (CLIP)", SIGMOID: "sigmoid (SigLIP)"}


def title(rows: list[Row]) -> str:
    """What the rows measure, in one line."""
    row = rows[0]
    return (
        f"contrastive losses of plain features, forward and backward: B {row['batch']:,}, "
        f"D {row['dim']}, {row['dtype']}"
    )


def by_loss(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each loss, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def cells(row: Row, ours: Row) -> list[str]:
    """One measured row of the table."""
    promised = row["op"] == CLIP and row["contender"] == "open_clip"
    targets = TARGETS.get((row["batch"], row["dim"]), {}) if promised else {}
    speed = verdict(row["median_ms"] / ours["median_ms"], targets.get("speed"), at_least=True)
    share = ""
    if row["extra_bytes"]:
        used = ours["extra_bytes"] / row["extra_bytes"]
        share = verdict(used, targets.get("memory"), at_least=False)
    return [
        row["contender"], LOSSES[row["op"]],
        f"{row['median_ms']:.1f} ({row['low_ms']:.1f}–{row['high_ms']:.1f})", speed,
        f"{row['best_ms']:.1f}", f"{row['best_ms'] / ours['best_ms']:.3g}",
        f"{row['extra_bytes'] / 1e6:,.1f}", share, f"{max(row['parity'].values()):.1e}",
    ]  # fmt: skip


def table(rows: list[Row]) -> list[list[str]]:
    """The cells of every row that was measured."""
    found = []
    for group in by_loss(rows).values():
        measured = [row for row in group if row["status"] == "ok"]
        ours = next(row for row in measured if row["contender"] == OURS)
        found += [cells(row, ours) for row in measured]
    return found


NOTES = {peer.name: peer.note for peer in FEATURE_PEERS if peer.note}


def footer(rows: list[Row]) -> list[str]:
    """What must be known of the rows, and who is missing, and why."""
    return remarks(rows, NOTES, lambda row: f"{row['contender']}, {LOSSES[row['op']]}")

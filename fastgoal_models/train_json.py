"""What `fastgoal train --json` says of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .training import TrainResult, best_checkpoint, read_evaluations, read_log


def run_document(
    method: str, out: Path, result: TrainResult, seconds: float, command: str
) -> dict[str, Any]:
    """How far a run is and what it left below `out`, as plain JSON values.

    Args:
        method: "fast-goal" or "caft".
        seconds: that this call took; a resumed run had others before.
    """
    steps, evaluations, best = read_log(out), read_evaluations(out), best_checkpoint(out)
    return {
        "schema": 1,
        "kind": f"train {method}",
        "command": command,
        "checkpoint": str(result.checkpoint),
        "best_checkpoint": None if best is None else str(best),
        "steps": result.step,
        "total_steps": result.total_steps,
        "interrupted": result.interrupted,
        "losses": steps[-1].losses if steps else None,
        "seconds": seconds,
        "evaluation": evaluations[-1]._asdict() if evaluations else None,
    }

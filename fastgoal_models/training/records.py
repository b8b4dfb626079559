"""What a run writes beside its checkpoints: `log.jsonl`, `eval.jsonl`, `best.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic_files import TEMPORARY, write_text_atomically
from ..checkpoints import checkpoint_path, complete_checkpoints


class StepRecord(NamedTuple):
    """One optimizer step, as `on_step` gets it and as `log.jsonl` keeps it."""

    step: int  # from 1
    total_steps: int
    losses: dict[str, float]  # "loss", then the weighted parts it is the sum of
    gradient_norm: float  # before clipping
    logit_scale: float  # the multiplier, after the step
    learning_rate: float
    seconds: float
    images_per_second: float = 0.0
    peak_bytes: int | None = None  # of the CUDA device's memory since the run began
    skipped_steps: int = 0  # so far, for gradients that overflowed fp16: no weight moved in those


class EvalRecord(NamedTuple):
    """One evaluation, as `on_eval` gets it and as `eval.jsonl` keeps it."""

    step: int  # steps done
    total_steps: int
    of: str  # what it was measured on: records of other sets are not compared
    score: float  # decides which is best
    values: dict[str, float]  # all that was measured, by name
    seconds: float
    averaged: bool = False  # of the moving average of the weights; not compared with the others


def read_log(out: Path) -> list[StepRecord]:
    """The steps that `train` logged in `out/log.jsonl`, in order; a half-written line ends it."""
    return _read_records(Path(out) / "log.jsonl", StepRecord)


def read_evaluations(out: Path) -> list[EvalRecord]:
    """The evaluations in `out/eval.jsonl`, in order; a half-written line ends it."""
    return _read_records(Path(out) / "eval.jsonl", EvalRecord)


def best_checkpoint(out: Path) -> Path | None:
    """The checkpoint that `out/best.json` names; None where there is none."""
    step = _best_step(out)
    path = None if step is None else checkpoint_path(Path(out) / "checkpoints", step)
    return path if path in complete_checkpoints(Path(out) / "checkpoints") else None


def forget_after(out: Path, step: int) -> None:
    """Drop what was written of later steps, which are about to be made again, and what a run that
    was killed did not finish writing.
    """
    for unfinished in out.glob(f"{TEMPORARY}*"):
        unfinished.unlink(missing_ok=True)
    _write_records(out / "log.jsonl", [r for r in read_log(out) if r.step <= step])
    if (out / "eval.jsonl").is_file():
        _write_records(out / "eval.jsonl", [r for r in read_evaluations(out) if r.step <= step])
    best = _best_step(out)
    if best is None or best > step or best_checkpoint(out) is None:
        (out / "best.json").unlink(missing_ok=True)


def _best_step(out: Path) -> int | None:
    try:
        return int(json.loads((Path(out) / "best.json").read_text("utf-8"))["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _read_records(path: Path, kind: Callable[..., Any]) -> list[Any]:
    records = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return records


def _write_records(path: Path, records: Sequence[StepRecord] | Sequence[EvalRecord]) -> None:
    lines = "".join(json.dumps(record._asdict()) + "\n" for record in records)
    write_text_atomically(path, lines)

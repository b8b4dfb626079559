"""Evaluations during a run, and which checkpoint they found best."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..atomic_files import write_text_atomically
from ..checkpoints import checkpoint_path, complete_checkpoints
from .config import TrainConfig
from .records import EvalRecord, read_evaluations


@dataclass(frozen=True)
class Evaluation:
    """How a model is judged during training."""

    of: str
    """what it is measured on, e.g. a digest of the data"""
    measure: Callable[[Any], tuple[float, dict[str, float]]]
    """from the model the score, of which more is better, and all values by name"""


class Judge:
    """Evaluations of a run, and which of them was the best.

    `eval.jsonl` has them all; which is best follows from it, also after a kill at any moment.
    """

    def __init__(self, evaluation: Evaluation, config: TrainConfig) -> None:
        self.evaluation, self.config = evaluation, config
        self.averaged = config.ema is not None
        self.folder = config.out / "checkpoints"
        self.best: EvalRecord | None = None
        if config.keep_best:
            saved = set(complete_checkpoints(self.folder))
            for record in read_evaluations(config.out):
                if checkpoint_path(self.folder, record.step) in saved:
                    self._compare(record)
            self.note_best()

    def look(
        self,
        model: nn.Module,
        step: int,
        total: int,
        tell: Callable[[EvalRecord], None] | None,
    ) -> bool:
        """Evaluate and write it down; whether its checkpoint is the best, and to be kept."""
        began = time.perf_counter()
        score, values = self.evaluation.measure(model)
        seconds = time.perf_counter() - began
        record = EvalRecord(step, total, self.evaluation.of, score, values, seconds, self.averaged)
        with (self.config.out / "eval.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if tell is not None:
            tell(record)
        return self.config.keep_best and self._compare(record)

    def note_best(self) -> None:
        """Write `best.json`, once the checkpoint that it names is there."""
        if self.best is None:
            return
        told = {"checkpoint": f"checkpoints/{checkpoint_path(self.folder, self.best.step).name}"}
        told |= {name: getattr(self.best, name) for name in ("step", "score", "of")}
        write_text_atomically(self.config.out / "best.json", json.dumps(told, indent=1) + "\n")

    def _compare(self, record: EvalRecord) -> bool:
        comparable = (record.of, record.averaged) == (self.evaluation.of, self.averaged)
        is_best = comparable and (self.best is None or record.score > self.best.score)
        if is_best:
            self.best = record
        return is_best

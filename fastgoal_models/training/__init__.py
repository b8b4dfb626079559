"""Training: one loop for every method, exactly resumable.

Everything that decides the next step is either a pure function of the step's number (which records
it reads, its learning rate) or part of the checkpoint (weights, AdamW's moments, random-number
states). So a run that was stopped anywhere and resumed walks the same path as one that never was:
on a CPU, with as many threads, to the same bits.
"""

from .batches import BatchOrder, Records
from .config import (
    TrainConfig,
    TrainingError,
    learning_rate,
    precision_name,
    total_steps,
)
from .judge import Evaluation
from .loop import TrainResult, train
from .records import EvalRecord, StepRecord, best_checkpoint, read_evaluations, read_log
from .state import Adapters

__all__ = [
    "Adapters",
    "BatchOrder",
    "EvalRecord",
    "Evaluation",
    "Records",
    "StepRecord",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "best_checkpoint",
    "learning_rate",
    "precision_name",
    "read_evaluations",
    "read_log",
    "total_steps",
    "train",
]

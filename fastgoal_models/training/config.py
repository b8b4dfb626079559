"""What a run is asked to do: `TrainConfig`, and what follows from it and the number of records."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import bfloat16_by_default
from ..errors import ConfigError, UserError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class TrainingError(UserError, RuntimeError):
    """Training can not start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class TrainConfig(ABC):
    """Everything a run depends on besides its model and its data; a subclass for each method.

    `steps` or `epochs`, exactly one of them. An epoch is ⌊records / batch_size⌋ steps over a fresh
    permutation; the records left over sit out that epoch. Raises ConfigError for values that make
    no sense.
    """

    out: Path  # checkpoints/ and log.jsonl go here
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    micro_batch: int | None = None  # records encoded at a time; the loss sees the whole batch
    learning_rate: float = 1e-5  # the peak
    weight_decay: float = 0.05
    decay_all: bool = False  # also norms, biases and the logit scale, as published code does
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.05  # while the rate rises from zero: below 1 a share of the steps, else steps
    clip_norm: float | None = 1.0  # largest norm of the whole gradient; None: no clipping
    ema: float | None = None  # decay of a moving average of the weights, kept beside them
    precision: str = "auto"  # bf16 autocast where a CUDA device has it, else float32
    seed: int = 0
    save_every: int | None = None  # steps between checkpoints; None: only at the end
    keep: int | None = 2  # newest checkpoints to keep; None: all
    num_workers: int = 0  # processes that read images
    eval_every: int | None = None  # steps between evaluations; None: only at the end
    keep_best: bool = False  # also the checkpoint that the evaluation found best

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "betas", tuple(self.betas))
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give steps or epochs, one of the two")
        at_least_one = (
            "steps",
            "epochs",
            "batch_size",
            "micro_batch",
            "save_every",
            "keep",
            "eval_every",
        )
        not_negative = ("learning_rate", "weight_decay", "num_workers", "seed")
        for names, is_good, wanted in (
            (at_least_one, lambda value: value >= 1, "at least 1"),
            (not_negative, lambda value: value >= 0, "0 or more"),
            (("eps", "clip_norm"), lambda value: value > 0, "above 0"),
            (("ema",), lambda value: 0 < value < 1, "between 0 and 1"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_good(value):
                    raise ConfigError(f"{name} must be {wanted}; got {value}")
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise ConfigError(
                "warmup is a share of the steps, in [0, 1), or a whole number of steps; got "
                f"{self.warmup}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {PRECISIONS}; got {self.precision!r}")
        if self.micro_batch is not None and type(self).encode is TrainConfig.encode:
            raise ConfigError(
                f"micro_batch: {type(self).__name__} can not cut a batch. Fix: leave it out"
            )

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> Any:
        """Items of the dataset as one batch, which has a `to(device)`."""

    @abstractmethod
    def losses(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """The weighted parts of the loss, by name; their sum is what is minimised."""

    # These two together are `losses`, for a method that can cut a batch (`cached_backward`).

    def encode(self, model: Any, batch: Any) -> Any:
        """What the loss reads of each record: tensors with the records as first dimension."""
        raise NotImplementedError

    def losses_of(self, encoded: Any) -> dict[str, Tensor]:
        """`losses` from what `encode` made of a whole batch."""
        raise NotImplementedError

    @abstractmethod
    def log_scale(self, model: Any) -> Tensor:
        """The logarithm of the logit scale that the log shows."""

    @abstractmethod
    def after_step(self, model: Any) -> None:
        """What keeps the weights in bounds, after each optimizer step."""


def total_steps(config: TrainConfig, records: int) -> int:
    """The steps of a run on so many records. Raises TrainingError where they fill no batch."""
    if records == 0:
        raise TrainingError("there is no usable record to train on")
    if records < config.batch_size:
        fix = f"a batch size of at most {records}" if records > 1 else "give more than one"
        raise TrainingError(
            f"{records} usable records do not fill one batch of {config.batch_size}. Fix: {fix}"
        )
    return config.steps or (config.epochs or 0) * (records // config.batch_size)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step 1 ... total: a linear rise over the warm-up, then half a cosine to zero.

    Without warm-up, step s uses the cosine at (s - 1) / total, as PyTorch's CosineAnnealingLR
    stepped once a step: the first step has the whole rate, the last almost none.
    """
    share = config.warmup < 1
    warmup = math.ceil(config.warmup * total) if share else min(int(config.warmup), total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def precision_name(config: TrainConfig, device: torch.device) -> str:
    """What the forward pass runs in: "bf16", "fp16" or "float32"."""
    if config.precision == "auto":
        return "bf16" if bfloat16_by_default(device) else "float32"
    return "float32" if config.precision == "fp32" else config.precision


def autocast_options(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    name = precision_name(config, device)
    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    return {"dtype": dtype, "enabled": name != "float32"}

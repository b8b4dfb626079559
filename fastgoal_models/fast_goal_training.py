"""How FAST-GOAL trains: its loss, its batches, its published recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgoal_kernels import FastGoalLoss

from .errors import ConfigError
from .fast_goal import FastGoalBatch, FastGoalModel
from .glit_dataset import collate
from .training import TrainConfig

_PUBLISHED: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 256,
    "learning_rate": 5e-6,
    "weight_decay": 0.05,
    "decay_all": True,
    "betas": (0.9, 0.999),
    "warmup": 0.0,
    "clip_norm": None,
    "max_logit_scale": None,
}

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "published": _PUBLISHED,
    # arXiv 2605.26615, on OpenAI's weights.
    "fast-goal-b16": {"model": "ViT-B-16", "pretrained": "openai", **_PUBLISHED},
    "fast-goal-l14": {"model": "ViT-L-14", "pretrained": "openai", **_PUBLISHED},
    # arXiv 2503.17782: the defaults of its code, whose loss has the same parts and weights.
    "goal-b16": {"model": "ViT-B-16", "pretrained": "openai", **_PUBLISHED, "batch_size": 16},
}
"""What each `--preset` sets: fields of FastGoalTrainConfig, and of the model to start from."""


@dataclass(frozen=True)
class FastGoalTrainConfig(TrainConfig):
    """`TrainConfig` with the weights of FAST-GOAL's loss and CLIP's clamp."""

    max_logit_scale: float | None = 100.0  # CLIP's clamp; None: no clamp
    global_weight: float = 1.0
    local_weight: float = 0.5
    tsl_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_logit_scale is not None and self.max_logit_scale <= 0:
            raise ConfigError(f"max_logit_scale must be above 0; got {self.max_logit_scale}")

    @classmethod
    def published(cls, out: Path, **changes: Any) -> FastGoalTrainConfig:
        """The published recipe (arXiv 2605.26615 and GOAL's code); `changes` override fields.

        AdamW at 5e-6 with weight decay 0.05 on every parameter, cosine to zero without warm-up, no
        clipping, no clamp on the scale, ten epochs of batches of 256.
        """
        recipe = dict(_PUBLISHED)
        if changes.get("steps") is not None:
            recipe["epochs"] = None
        return cls(out=out, **(recipe | changes))

    def collate(self, items: Sequence[FastGoalBatch]) -> FastGoalBatch:
        """Items of a FastGoalDataset as one batch, its texts cut after their longest."""
        return _without_padding(collate(items))

    def losses(self, model: FastGoalModel, batch: FastGoalBatch) -> dict[str, Tensor]:
        """The four weighted parts of `FastGoalLoss`."""
        return self.losses_of(self.encode(model, batch))

    def encode(self, model: FastGoalModel, batch: FastGoalBatch) -> dict[str, Tensor]:
        """The features that `FastGoalLoss` compares."""
        return model(batch)

    def losses_of(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """`losses` from the features of a whole batch."""
        loss = FastGoalLoss(self.global_weight, self.local_weight, self.tsl_weight)
        return loss(**encoded, output_dict=True)

    def log_scale(self, model: FastGoalModel) -> Tensor:
        """The model's one log-scale."""
        return model.clip.logit_scale

    @torch.no_grad()
    def after_step(self, model: FastGoalModel) -> None:
        """CLIP's clamp on the scale."""
        if self.max_logit_scale is not None:
            model.clip.logit_scale.clamp_(max=math.log(self.max_logit_scale))


def _without_padding(batch: FastGoalBatch) -> FastGoalBatch:
    """The batch with its texts cut after their longest, which changes no result.

    The text tower is causal: what stands behind the end token (the highest id) is never read.
    """
    longest = int(batch.lengths.max())
    local = int(batch.local_texts.argmax(dim=1).max()) + 1
    return batch._replace(texts=batch.texts[:, :longest], local_texts=batch.local_texts[:, :local])

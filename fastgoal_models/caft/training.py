"""How CAFT trains: its loss, its batches, its published recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgoal_kernels import HierarchicalAlignmentLoss

from ..errors import ConfigError
from ..training import TrainConfig
from .data import CaftBatch, collate
from .model import Caft

TERMS = ("text_conditioned_loss", "fine_loss", "whole_loss")

# AdamW at 5e-4, betas 0.9 and 0.98, weight decay 0.5, warm-up 2,000 steps, cosine over 32 epochs,
# fp16 with a scaler, no clipping, 8 GPUs with 256 images each. What a recipe names differs from it.
_PUBLISHED: dict[str, Any] = {
    "epochs": 32,
    "batch_size": 2048,
    "learning_rate": 5e-4,
    "weight_decay": 0.5,
    "betas": (0.9, 0.98),
    "eps": 1e-8,
    "warmup": 2000,
    "clip_norm": None,
    "precision": "fp16",
    "negatives": "sample",
}
RECIPES: dict[str, dict[str, Any]] = {
    "caft-b-3m": _PUBLISHED,
    "caft-b-12m": {**_PUBLISHED, "clip_norm": 1.0},
    "caft-b-15m": {**_PUBLISHED, "learning_rate": 1.67e-4, "eps": 1e-6, "clip_norm": 1.0},
    "caft-b-30m": {**_PUBLISHED, "weight_decay": 0.2, "eps": 1e-6},
}
"""fields of CaftTrainConfig by the name of the model and of its data, in images"""


@dataclass(frozen=True)
class CaftTrainConfig(TrainConfig):
    """`TrainConfig` with what the hierarchical alignment loss is made of."""

    learning_rate: float = 5e-4
    weight_decay: float = 0.2
    negatives: str = "all"  # of the text-conditioned term; "sample" as published
    terms: tuple[str, ...] = TERMS  # of the loss; without one there is no gradient through it

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "terms", tuple(self.terms))
        if self.negatives not in ("all", "sample"):
            raise ConfigError(f"negatives must be 'all' or 'sample'; got {self.negatives!r}")
        if not self.terms or not set(self.terms) <= set(TERMS):
            raise ConfigError(f"terms must be some of {TERMS}; got {self.terms}")

    @classmethod
    def published(cls, out: Path, recipe: str = "caft-b-3m", **changes: Any) -> CaftTrainConfig:
        """A published recipe (arXiv 2602.02977) by its name in RECIPES: 3 to 30 million images.

        `changes` override fields. The batch is that of all eight GPUs; which parameters weight
        decay leaves out was not published, and is here what open_clip leaves out: gains, biases and
        scalars.

        Raises ConfigError for an unknown recipe.
        """
        if recipe not in RECIPES:
            raise ConfigError(f"recipe must be one of {tuple(RECIPES)}; got {recipe!r}")
        values = dict(RECIPES[recipe])
        if changes.get("steps") is not None:
            values["epochs"] = None
        return cls(out=out, **(values | changes))

    def collate(self, items: Sequence[CaftBatch]) -> CaftBatch:
        """Items of a CAFT data set as one batch, its texts cut after their longest."""
        batch = collate(items)
        longest = int(batch.texts.argmax(dim=2).max()) + 1  # the end token has the highest id
        return batch._replace(texts=batch.texts[:, :, :longest])

    def losses(self, model: Caft, batch: CaftBatch) -> dict[str, Tensor]:
        """The chosen terms of `HierarchicalAlignmentLoss`."""
        loss = HierarchicalAlignmentLoss(batch.texts.shape[1], self.negatives)
        parts = loss(**model(batch.images, batch.texts), output_dict=True)
        return {name: parts[name] for name in self.terms}

    def log_scale(self, model: Caft) -> Tensor:
        """That of the fine terms."""
        return model.logit_scale

    def after_step(self, model: Caft) -> None:
        """The clamps on both log-scales."""
        with torch.no_grad():
            model.clamp_scales_()

"""A tiny CLIP and plain coloured pictures for the tests of what is built on models."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastgoal_models import FastGoalModel, GlitRecord
from fastgoal_models.glit import LocalPair

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16
    },
    "text_cfg": {"context_length": 24, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip


def small_clip(seed: int = 0) -> FastGoalModel:
    torch.manual_seed(seed)
    return FastGoalModel.create(CONFIG, context_length=24).eval()


def coloured_records(folder: Path, size: tuple[int, int] = (48, 32)) -> list[GlitRecord]:
    """One picture a colour, each with two sentences and a pair of the second."""
    found = []
    for colour in ("red", "green", "blue"):
        path = folder / f"{colour}.png"
        Image.new("RGB", size, colour).save(path)
        sentences = (f"A {colour} rectangle.", "It is plain.")
        pair = LocalPair(1, (0.0, 0.0, size[0] / 2, size[1] / 2), "upper left", 0.5)
        found.append(GlitRecord(colour, path, *size, " ".join(sentences), sentences, (pair,)))
    return found

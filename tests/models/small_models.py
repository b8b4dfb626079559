"""A tiny CLIP and plain coloured pictures for the tests of what is built on models."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastgoal_models import FastGoalBatch, FastGoalModel, GlitRecord
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


def deep_clip(layers: int, context: int = 12, custom_text: bool = False) -> FastGoalModel:
    """Towers of several blocks, with a narrow text tower."""
    config = CONFIG | {
        "vision_cfg": CONFIG["vision_cfg"] | {"layers": layers},
        "text_cfg": {"context_length": context, "width": 8, "heads": 2, "layers": layers},
        "custom_text": custom_text,
    }
    torch.manual_seed(3)
    return FastGoalModel.create(config, context_length=context)


def random_items(count: int = 6, context: int = 12) -> list[FastGoalBatch]:
    """Noise for pictures, captions of four other tokens each, for models of `deep_clip`."""
    generator = torch.Generator().manual_seed(4)
    items = []
    for number in range(count):
        text = torch.zeros(context, dtype=torch.long)
        text[:6] = torch.tensor([49406, *range(320 + number, 324 + number), 49407])
        items.append(
            FastGoalBatch(
                images=torch.randn(3, 32, 32, generator=generator),
                texts=text,
                local_images=torch.randn(3, 32, 32, generator=generator),
                local_texts=text,
                boxes=torch.tensor([0.0, 0.0, 20.0, 10.0]),
                image_sizes=torch.tensor([40, 20]),
                spans=torch.tensor([1, 3]),
                lengths=torch.tensor(6),
            )
        )
    return items

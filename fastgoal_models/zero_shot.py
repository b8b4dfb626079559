"""Zero-shot classification, to see what fine-tuning has made a model forget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip import SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from .encoding import Progress, encode_captions, encode_pictures
from .errors import ConfigError
from .fast_goal import FastGoalModel

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


class Classified(NamedTuple):
    """Shares of pictures, in [0, 1]."""

    top1: float
    top5: float | None
    """None for five classes or fewer, of which it takes every one, whatever the model"""
    classes: int
    pictures: int
    unread: dict[str, str]
    """pictures that could not be read, by path, and why; they count nowhere"""


def picture_files(folder: Path) -> list[Path]:
    """The pictures below a folder, by name; links out of it are left out."""
    root = folder.resolve()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES
        and path.is_file()
        and path.resolve().is_relative_to(root)
    )


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, which is called what its folder is, with spaces for `_`.

    Raises ConfigError for a folder without at least two classes.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder")
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    classes: dict[str, list[Path]] = {}
    for path in folders:  # "a_b" and "a b" are one class
        if pictures := picture_files(path):
            classes.setdefault(path.name.replace("_", " "), []).extend(pictures)
    if len(classes) < 2:
        raise ConfigError(
            f"{folder} has {len(classes)} classes. Fix: a folder for each class, with its pictures"
        )
    return classes


def class_features(model: FastGoalModel, names: Sequence[str]) -> Tensor:
    """(classes, E): the mean of what CLIP's seven short templates say of each class, normalised."""
    prompts = [template(name) for name in names for template in SIMPLE_IMAGENET_TEMPLATES]
    features, _ = encode_captions(model, prompts)
    means = features.unflatten(0, (len(names), -1)).mean(dim=1)
    return F.normalize(means, dim=-1)


def classify(
    model: FastGoalModel,
    classes: dict[str, list[Path]],
    *,
    resize: str = "own",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Classified:
    """Accuracy of the class whose prompts are most similar; ties count against the model.

    Raises ConfigError where none of the pictures can be read.
    """
    was_training = model.training
    model.eval()
    try:
        prompts = class_features(model, list(classes))
        paths = [path for pictures in classes.values() for path in pictures]
        owners = torch.tensor(
            [number for number, pictures in enumerate(classes.values()) for _ in pictures]
        )
        features, found = encode_pictures(
            model, paths, resize=resize, batch_size=batch_size, progress=progress
        )
    finally:
        model.train(was_training)
    scores = features @ prompts.T
    right = scores.gather(1, owners[found.kept][:, None])
    ranks = (~(scores < right)).sum(dim=1)  # its own class is one of those not below itself
    top1, top5 = (float((ranks <= k).double().mean()) for k in (1, 5))
    unread = {str(paths[place]): why for place, why in found.lost.items()}
    told = top5 if len(classes) > 5 else None
    return Classified(top1, told, len(classes), len(features), unread)

"""Pictures and captions to features, in batches, with pictures decoded ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from .caft.captions import evaluation_parts, merge_published, split_published
from .caft.data import text_rows
from .caft.model import Caft
from .captions import split_sentences
from .errors import ConfigError, GlitError
from .fast_goal import FastGoalModel
from .pictures import image_tensor, load_image

RESIZES = ("own", "squash")
_BLOCK_BYTES = 1 << 28  # of patches at once; as much as retrieval takes to the device at once

Transform = Callable[[Image.Image], Tensor]
Progress = Callable[[int], None]
"""is called with how many more are done"""


def pixels_for(preprocess: PreprocessCfg, resize: str = "own") -> Transform:
    """From a picture to (3, S, S) float32, normalised as the model wants it.

    "own" is what open_clip does to evaluate such a model, and published figures are made with: for
    CLIP it scales the shorter side and cuts out the centre. "squash" is what our training does.
    Raises ConfigError.
    """
    if resize not in RESIZES:
        raise ConfigError(f"resize must be one of {RESIZES}; got {resize!r}")
    if resize == "squash":
        size, mean, std = preprocess.size, preprocess.mean, preprocess.std
        return lambda image: image_tensor(image, size, mean, std)
    own: Any = image_transform_v2(preprocess, is_train=False)
    return own


@dataclass
class Pictures:
    """What was read of some pictures: which could be, and why the others could not."""

    kept: list[int] = field(default_factory=list)
    """places of those that were read"""
    lost: dict[int, str] = field(default_factory=dict)
    """reasons, by place"""


def batches_of_pictures(
    paths: Sequence[Path],
    transform: Transform,
    batch_size: int,
    found: Pictures,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Batches (N, 3, S, S) of the pictures that can be read, in order; `found` says which.

    `progress` is told of a batch once it has been dealt with.
    """
    workers = min(8, cpu_count() or 1)

    def read(path: Path) -> Tensor:
        return transform(load_image(path))

    depth = 2 * batch_size  # decoded ahead of the model, and no more: pictures are large
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(read, path) for path in paths[:depth])
        batch: list[Tensor] = []
        for place in range(len(paths)):
            future = ahead.popleft()
            if place + depth < len(paths):
                ahead.append(pool.submit(read, paths[place + depth]))
            try:
                batch.append(future.result())
                found.kept.append(place)
            except GlitError as error:
                found.lost[place] = str(error)
            if batch and (len(batch) == batch_size or place + 1 == len(paths)):
                yield torch.stack(batch)
                if progress is not None:
                    progress(len(batch))
                batch = []


@torch.no_grad()
def encode_pictures(
    model: FastGoalModel,
    paths: Sequence[Path],
    *,
    resize: str = "own",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    tokens: bool = False,
    progress: Progress | None = None,
) -> tuple[Tensor, Pictures]:
    """Features (N, E), L2-normalised, on the CPU; with `tokens` those of every patch (N, h·w, E).

    Pictures that can not be read are left out, and named in the second result.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    found, parts = Pictures(), []
    transform = pixels_for(model.preprocess, resize)
    for batch in batches_of_pictures(paths, transform, batch_size, found, progress):
        encoded = _patches(model, batch, device) if tokens else model.encode_image(batch.to(device))
        parts.append(encoded.float().cpu())
    _require_some(found)
    return torch.cat(parts), found


@torch.no_grad()
def blocks_of_patches(
    model: FastGoalModel,
    paths: Sequence[Path],
    found: Pictures,
    *,
    resize: str = "own",
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Features of every patch (N, h·w, E) as of `encode_pictures`, of so many pictures at once.

    On the model's device, in blocks of 256 MB, or of one batch where that is more. A block is good
    until the next one is asked for, which overwrites it. `found` says which pictures were read.

    Raises ConfigError where none can be.
    """
    device = next(model.parameters()).device
    transform = pixels_for(model.preprocess, resize)
    block, held = torch.empty(0), 0
    for batch in batches_of_pictures(paths, transform, batch_size, found, progress):
        patches = _patches(model, batch, device).float()
        if not len(block):
            size = patches[0].numel() * patches.element_size()
            most = max(_BLOCK_BYTES // size, batch_size)
            block = patches.new_empty(min(most, len(paths)), *patches.shape[1:])
        if held + len(patches) > len(block):
            yield block[:held]
            held = 0
        block[held : held + len(patches)] = patches
        held += len(patches)
    _require_some(found)
    yield block[:held]


def _patches(model: FastGoalModel, batch: Tensor, device: torch.device) -> Tensor:
    _, patches = model.image_tokens(batch.to(device))
    return torch.nn.functional.normalize(model.project_patches(patches), dim=-1)


def _require_some(found: Pictures) -> None:
    if not found.kept:
        why = next(iter(found.lost.values()), "there are none")
        raise ConfigError(f"none of {len(found.lost)} pictures can be read: {why}")


@torch.no_grad()
def encode_captions(
    model: FastGoalModel,
    captions: Sequence[str],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, int]:
    """Features (M, E), L2-normalised, on the CPU, and how many captions ran past the context."""
    device = next(model.parameters()).device if device is None else torch.device(device)
    rows, lengths, truncated = caption_rows(model, captions)
    order = lengths.argsort(stable=True)  # short ones with short ones: padding is never read
    parts = []
    for part in order.split(batch_size):
        batch = rows[part, : int(lengths[part].max())]
        parts.append(model.encode_text(batch.to(device)).float().cpu())
        if progress is not None:
            progress(len(part))
    if not parts:
        raise ConfigError("there are no captions to encode")
    return torch.cat(parts)[order.argsort()], int(truncated.sum())


def caption_rows(model: FastGoalModel, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Captions as a CLIP's tokens (M, L), how many each has with start and end, and whether it
    ran past the context."""
    rows = model.tokenizer(list(captions))
    lengths = rows.argmax(dim=1) + 1
    truncated = torch.zeros(len(rows), dtype=torch.bool)
    # Of rows that are full, those that would have been longer.
    for at in (lengths == rows.shape[1]).nonzero().flatten().tolist():
        truncated[at] = len(model.tokenizer.encode(captions[at])) > rows.shape[1] - 2
    return rows, lengths, truncated


def caft_rows(
    model: Caft, captions: Sequence[str], published: bool = False
) -> tuple[Tensor, Tensor]:
    """Captions as a CAFT's parts (M, parts, L), and whether a part of each ran past the context.

    `published`: cut and joined as the published code does, which its released scores need.
    """
    count = model.config.text.parts
    parts = [
        evaluation_parts(split_published(caption), count, merge_published)
        if published and split_published(caption)
        else evaluation_parts(split_sentences(caption) or [caption], count)
        for caption in captions
    ]
    rows = torch.stack([text_rows(some, model.tokenizer) for some in parts])
    room = rows.shape[-1] - 2
    full = (rows.argmax(dim=-1) == rows.shape[-1] - 1).nonzero().tolist()
    truncated = torch.zeros(len(rows), dtype=torch.bool)
    for i, j in full:
        truncated[i] |= len(model.tokenizer.encode(parts[i][j])) > room
    return rows, truncated

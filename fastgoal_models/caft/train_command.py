"""`fastgoal train caft`: from images and their captions to a CAFT, step by step on the screen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..devices import parse_device
from ..errors import ConfigError
from ..glit import SkipReport
from ..trackers import trackers, watched
from ..training import TrainingError, TrainResult, train
from .config import CaftConfig
from .data import CaftDataset, CaftRecord, CaftSamples, Splitting, read_caft
from .model import Caft
from .shards import read_shards
from .training import CaftTrainConfig


@dataclass(frozen=True)
class CaftTrainOptions:
    """The options of `fastgoal train caft`; `changes` are the ones that override the preset."""

    data: Path
    out: Path
    root: Path | None = None
    model: str = "caft-b"
    checkpoint: Path | None = None
    superpixels: str = "slic"
    preset: str = "default"
    published: bool = False
    changes: dict[str, Any] | None = None
    save_every: int | None = None
    num_workers: int = 0
    compile: bool = False
    seed: int = 0
    resume: bool = False
    device: str | None = None
    precision: str | None = None
    tensorboard: bool = False
    wandb: bool = False


def run_caft_training(options: CaftTrainOptions, console: Console) -> TrainResult:
    """Read, build, train. Raises what a user can mend (see `cli`)."""
    config = _config(options)  # first: a mistyped option should not wait for the data
    device = parse_device(options.device)
    others = trackers(
        options.out,
        asdict(options) | asdict(config),
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        resume=options.resume,
    )
    splitting = Splitting.published() if options.published else Splitting()
    records, skipped, digest = _read(options, splitting)
    console.print(escape(str(skipped)), highlight=False, soft_wrap=True)
    if not records:
        raise TrainingError(f"{options.data} has no usable sample")
    model = _create(options, config.batch_size).to(device)
    if options.compile:
        model.visual.compile()
        model.transformer.compile()
    dataset = CaftDataset(
        records, model.tokenizer, model.config.image_size, seed=options.seed, splitting=splitting
    )
    start = options.checkpoint or "random weights"
    console.print(
        f"{len(records)} samples, {escape(options.model)} from {escape(str(start))}, "
        f"{options.superpixels} superpixels, {device}"
    )
    if options.superpixels == "sfcn" and options.checkpoint is None:
        console.print(
            "[yellow]The superpixel network's weights are random: its segments are arbitrary. "
            "Give --checkpoint, or --superpixels slic.[/]"
        )
    identity = {
        "model": model.config.as_json(),
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
        "superpixels": options.superpixels,
        "published": options.published,
        "data": digest,
    }
    with watched(console, others) as on_step:
        result = train(
            model,
            dataset,
            config,
            device=device,
            resume=options.resume,
            identity=identity,
            on_step=on_step,
        )
    console.print(f"{result.step} of {result.total_steps} steps done: {result.checkpoint}")
    return result


def _read(options: CaftTrainOptions, splitting: Splitting) -> tuple[CaftSamples, SkipReport, str]:
    """Usable samples, what was skipped, and sixteen hex digits that change with the samples."""
    if options.data.suffix == ".tar":
        if options.root is not None:
            raise ConfigError("--root is the folder of a JSONL file's images; shards hold theirs")
        samples, skipped = read_shards(options.data, splitting)
        return samples, skipped, samples.digest
    records, skipped = read_caft(options.data, options.root, splitting)
    return records, skipped, _digest(records)


def _create(options: CaftTrainOptions, batch_size: int) -> Caft:
    config = CaftConfig.load(options.model)
    torch.manual_seed(options.seed)
    how: dict[str, Any] = {"superpixels": options.superpixels, "published": options.published}
    if options.checkpoint is not None:
        return Caft.from_checkpoint(options.checkpoint, config, **how)
    model = Caft.create(config, **how)
    if options.preset == "default":
        _start_biases(model, batch_size)
    return model


@torch.no_grad()
def _start_biases(model: Caft, batch_size: int) -> None:
    """Begin where a batch's positives and negatives weigh the same.

    The published start, -10, suits batches of thousands; with a few dozen images it takes hundreds
    of steps to climb back from it.
    """
    for bias in (model.logit_bias, model.logit_bias_coarse):
        bias.fill_(max(-math.log(max(batch_size - 1, 1)), float(bias)))


def _config(options: CaftTrainOptions) -> CaftTrainConfig:
    changes: dict[str, Any] = {
        "seed": options.seed,
        "save_every": options.save_every,
        "num_workers": options.num_workers,
        **(options.changes or {}),
    }
    if options.precision is not None:
        changes["precision"] = options.precision
    if options.preset != "default":
        return CaftTrainConfig.published(options.out, options.preset, **changes)
    if "steps" not in changes:
        changes.setdefault("epochs", 10)
    return CaftTrainConfig(out=options.out, **changes)


def _digest(records: Sequence[CaftRecord]) -> str:
    """Sixteen hex digits that change when an image's name or a caption does."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.image.name, sorted(record.captions.items()))).encode())
    return digest.hexdigest()[:16]

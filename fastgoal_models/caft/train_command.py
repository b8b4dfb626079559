"""`fastgoal train caft`: from images and their captions to a CAFT, step by step on the screen."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..devices import parse_device, warn_of_emulated_bfloat16
from ..errors import need_file
from ..json_output import write_json
from ..picture_check import PictureCheck, lines_in
from ..run_config import Method, check_data, fit_batch
from ..skips import SkipReport
from ..trackers import trackers, watched
from ..train_evaluation import check_evaluation, retrieval_evaluation
from ..train_json import run_document
from ..trained import is_trained, load_trained
from ..training import TrainingError, TrainResult, precision_name, train
from .config import CaftConfig
from .data import CaftDataset, CaftRecord, CaftSamples, Splitting, read_caft
from .model import Caft
from .shards import read_shards
from .training import RECIPES, CaftTrainConfig


@dataclass(frozen=True)
class CaftTrainOptions:
    """The options of `fastgoal train caft`, besides those of the recipe."""

    data: Path
    root: Path | None = None
    model: str = "caft-b"
    checkpoint: Path | None = None
    superpixels: str = "slic"
    preset: str = "default"
    published: bool = False
    eval_data: Path | None = None
    eval_root: Path | None = None
    fit_batch: bool = False  # a batch of all samples where they do not fill one
    compile: bool = False
    device: str | None = None
    tensorboard: bool = False
    wandb: bool = False


METHOD = Method(
    "caft",
    CaftTrainOptions,
    CaftTrainConfig,
    {"default": {}} | {name: {"model": "caft-b", **recipe} for name, recipe in RECIPES.items()},
)


def run_caft_training(
    options: CaftTrainOptions,
    config: CaftTrainConfig,
    console: Console,
    *,
    resume: bool = False,
    json_path: Path | None = None,
    command: str = "",
) -> TrainResult:
    """Read, build, train. Raises what a user can mend (see `cli`)."""
    began = time.perf_counter()
    # First: a mistyped option should not wait for the data.
    device = parse_device(options.device)
    check_evaluation(options.eval_data, options.eval_root, config)
    if options.checkpoint is not None and not is_trained(options.checkpoint):
        need_file(options.checkpoint, "--checkpoint")
    check_data(options.data, options.root)
    noted = asdict(options) | asdict(config)
    others = trackers(
        config.out, noted, tensorboard=options.tensorboard, wandb=options.wandb, resume=resume
    )
    splitting = Splitting.published() if options.published else Splitting()
    check = PictureCheck.of_run(config.out, options.data, options.root, resume)
    with check.watch(console):
        records, skipped, digest = _read(options, splitting, check)
    console.print(escape(str(skipped)), highlight=False, soft_wrap=True)
    if not records:
        raise TrainingError(f"--data: {options.data} has no usable sample")
    options, config = fit_batch(options, config, len(records), console)
    noted |= asdict(options) | asdict(config)
    evaluation = None
    if options.eval_data is not None:
        evaluation = retrieval_evaluation(
            options.eval_data, options.eval_root, console, published=options.published
        )
    model, start = _create(options, config)
    model.to(device)
    if options.compile:
        model.visual.compile()
        model.transformer.compile()
    dataset = CaftDataset(
        records, model.tokenizer, model.config.image_size, seed=config.seed, splitting=splitting
    )
    console.print(
        f"{len(records)} samples, {escape(options.model)} from {escape(start)}, "
        f"{options.superpixels} superpixels, {device}, {precision_name(config, device)}"
    )
    if config.precision == "bf16":
        warn_of_emulated_bfloat16(console, device)
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

    def start() -> None:
        METHOD.save(options, config)
        check.save()

    with watched(console, others) as tell:
        result = train(
            model,
            dataset,
            config,
            device=device,
            resume=resume,
            identity=identity,
            evaluation=evaluation,
            on_start=start,
            on_step=tell,
            on_eval=tell,
        )
    console.print(f"{result.step} of {result.total_steps} steps done: {result.checkpoint}")
    seconds = time.perf_counter() - began
    document = run_document(METHOD.name, config.out, result, seconds, command)
    write_json(document, json_path, console)
    return result


def _read(
    options: CaftTrainOptions, splitting: Splitting, check: PictureCheck
) -> tuple[CaftSamples, SkipReport, str]:
    """Usable samples, what was skipped, and sixteen hex digits that change with the samples."""
    if options.data.suffix == ".tar":
        samples, skipped = read_shards(options.data, splitting, check)
        return samples, skipped, samples.digest
    check.expect(lines_in(options.data))
    records, skipped = read_caft(options.data, options.root, splitting, check)
    return records, skipped, _digest(records)


def _create(options: CaftTrainOptions, train_config: CaftTrainConfig) -> tuple[Caft, str]:
    """The model to start from, and what its weights are."""
    config = CaftConfig.load(options.model)
    torch.manual_seed(train_config.seed)
    how: dict[str, Any] = {"superpixels": options.superpixels, "published": options.published}
    if options.checkpoint is not None:
        if options.checkpoint.is_dir():
            trained = load_trained(options.checkpoint)
            return Caft.from_checkpoint(trained.weights, config, **how), trained.name
        return Caft.from_checkpoint(options.checkpoint, config, **how), str(options.checkpoint)
    model = Caft.create(config, **how)
    if options.preset == "default":
        _start_biases(model, train_config.batch_size)
    return model, "random weights"


@torch.no_grad()
def _start_biases(model: Caft, batch_size: int) -> None:
    """Begin where a batch's positives and negatives weigh the same.

    The published start, -10, suits batches of thousands; with a few dozen images it takes hundreds
    of steps to climb back from it.
    """
    for bias in (model.logit_bias, model.logit_bias_coarse):
        bias.fill_(max(-math.log(max(batch_size - 1, 1)), float(bias)))


def _digest(records: Sequence[CaftRecord]) -> str:
    """Sixteen hex digits that change when an image's name or a caption does."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.image.name, sorted(record.captions.items()))).encode())
    return digest.hexdigest()[:16]

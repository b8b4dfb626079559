"""`fastgoal train`: from an annotation file to a fine-tuned model, step by step on the screen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .devices import parse_device
from .fast_goal import FastGoalModel
from .fast_goal_training import FastGoalTrainConfig
from .flism import match_pairs
from .glit import FastGoalDataset, GlitRecord, read_glit
from .loading import architecture
from .options import create_model, records_digest
from .trackers import trackers, watched
from .training import TrainingError, TrainResult, train, uses_bf16


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fastgoal train`; `changes` are the ones that override the preset."""

    data: Path
    out: Path
    root: Path | None = None
    model: str = "ViT-B-16"
    pretrained: str | None = None
    context_length: int = 248
    preset: str = "default"
    changes: dict[str, Any] | None = None
    save_every: int | None = None
    num_workers: int = 0
    strict: bool = False
    seed: int = 0
    resume: bool = False
    device: str | None = None
    precision: str = "auto"
    tensorboard: bool = False
    wandb: bool = False


def run_training(options: TrainOptions, console: Console) -> TrainResult:
    """Read, match where pairs are missing, train. Raises what a user can mend (see `cli`)."""
    config = _config(options)  # first: a mistyped option should not wait for the data
    device = parse_device(options.device)
    others = trackers(
        options.out,
        asdict(options) | asdict(config),
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        resume=options.resume,
    )
    records, skipped = read_glit(options.data, root=options.root, strict=options.strict)
    console.print(escape(str(skipped)), highlight=False, soft_wrap=True)
    if not records:
        raise TrainingError(f"{options.data} has no usable record")
    model = create_model(
        options.model, options.pretrained, options.seed, options.context_length
    ).to(device)
    records = _match_where_missing(model, records, options.pretrained is not None, console)
    dataset = FastGoalDataset(records, model.tokenizer, model.image_size, model.context_length)
    console.print(
        f"{len(records)} records, {options.model} with "
        f"{escape(options.pretrained or 'random weights')}, {device}, "
        f"{'bf16' if uses_bf16(config, device) else 'float32'}"
    )
    identity = {
        "model": options.model,
        "pretrained": options.pretrained,
        "architecture": architecture(options.model, options.pretrained),
        "context_length": options.context_length,
        "data": records_digest(records),
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


def _match_where_missing(
    model: FastGoalModel, records: list[GlitRecord], has_weights: bool, console: Console
) -> list[GlitRecord]:
    """FLISM's pairs for the records that come without any, by the model as it is now."""
    unmatched = [record for record in records if not record.pairs]
    if not unmatched:
        return records
    console.print(f"{len(unmatched)} records have no local pairs: matching regions and sentences")
    if not has_weights:
        console.print("[yellow]The weights are random, so which pairs they match is arbitrary.[/]")
    matched = {record.id: record for record in match_pairs(model, unmatched)}
    return [matched.get(record.id, record) for record in records]


def _config(options: TrainOptions) -> FastGoalTrainConfig:
    changes: dict[str, Any] = {
        "seed": options.seed,
        "precision": options.precision,
        "save_every": options.save_every,
        "num_workers": options.num_workers,
        **(options.changes or {}),
    }
    if options.preset == "published":
        return FastGoalTrainConfig.published(options.out, **changes)
    if "steps" not in changes:
        changes.setdefault("epochs", 10)
    return FastGoalTrainConfig(out=options.out, **changes)

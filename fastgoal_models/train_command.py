"""`fastgoal train`: from an annotation file to a fine-tuned model, step by step on the screen."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .devices import parse_device, warn_of_emulated_bfloat16
from .errors import ConfigError
from .fast_goal import FastGoalModel
from .fast_goal_training import RECIPES, FastGoalTrainConfig
from .flism import match_pairs
from .frozen import lock_towers
from .glit import GlitRecord, read_glit
from .glit_dataset import FastGoalDataset
from .glit_shards import ShardRecord, load_from_shard, read_glit_shards
from .json_output import write_json
from .loading import LoadedFastGoal, load_fast_goal, noted_architecture
from .lora import LoraAdapters, check_lora
from .options import records_digest, tensors_digest
from .picture_check import PictureCheck, lines_in
from .random_weights import warn_of_random_weights
from .run_config import Method, check_data, fit_batch
from .skips import SkipReport
from .trackers import trackers, watched
from .train_evaluation import check_evaluation, retrieval_evaluation
from .train_json import run_document
from .training import TrainingError, TrainResult, precision_name, train

_CONTEXT_LENGTH = 248  # of a model that is not a run's


@dataclass(frozen=True)
class TrainOptions:
    """The options of `fastgoal train fast-goal`, besides those of the recipe."""

    data: Path
    root: Path | None = None
    model: str = "ViT-B-16"  # or the folder of a run, to start from what it left
    pretrained: str | None = None
    context_length: int | None = None  # None: that of the run in `model`, else 248
    preset: str = "default"
    unlocked_image_blocks: int | None = None  # None: the whole tower trains
    unlocked_text_blocks: int | None = None
    lora: int | None = None  # the rank
    pairs: str = "best"
    top_k: int = 3
    long_captions: str = "cut"
    eval_data: Path | None = None
    eval_root: Path | None = None
    strict: bool = False
    fit_batch: bool = False  # a batch of all records where they do not fill one
    device: str | None = None
    tensorboard: bool = False
    wandb: bool = False


METHOD = Method("fast-goal", TrainOptions, FastGoalTrainConfig, RECIPES)


def run_training(
    options: TrainOptions,
    config: FastGoalTrainConfig,
    console: Console,
    *,
    resume: bool = False,
    json_path: Path | None = None,
    command: str = "",
) -> TrainResult:
    """Read, match where pairs are missing, train. Raises what a user can mend (see `cli`)."""
    began = time.perf_counter()
    # First: a mistyped option should not wait for the data.
    device = parse_device(options.device)
    _check_what_trains(options)
    check_evaluation(options.eval_data, options.eval_root, config)
    noted = asdict(options) | asdict(config)
    check_data(options.data, options.root)
    others = trackers(
        config.out,
        noted,
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        resume=resume,
    )
    check = PictureCheck.of_run(config.out, options.data, options.root, resume)
    with check.watch(console):
        records, skipped = _read(options, check)
    console.print(escape(str(skipped)), highlight=False, soft_wrap=True)
    if not records:
        raise TrainingError(f"--data: {options.data} has no usable record")
    if options.long_captions == "cut":  # else it takes the model to count what is trained on
        options, config = fit_batch(options, config, len(records), console)
    evaluation = None
    if options.eval_data is not None:
        evaluation = retrieval_evaluation(
            options.eval_data, options.eval_root, console, strict=options.strict
        )
    loaded = _load(options, config.seed)
    model = loaded.model.to(device)
    options = replace(options, context_length=model.context_length)
    identity = _identity(loaded, options)
    records = _match_where_missing(model, records, not loaded.random, console)
    dataset = _dataset(model, records, options, config, console)
    options, config = fit_batch(options, config, len(dataset), console)
    noted |= asdict(options) | asdict(config)
    console.print(
        f"{len(records)} records, {escape(loaded.name)}, {device}, {precision_name(config, device)}"
    )
    if config.precision == "bf16":
        warn_of_emulated_bfloat16(console, device)
    if loaded.random:
        warn_of_random_weights(
            console, "this trains from nothing. --pretrained TAG starts from what is known"
        )
    adapters = _choose_what_trains(model, options, config, console)
    identity |= {"data": records_digest(records), **_unusual(options)}

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
            adapters=adapters,
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


def _read(options: TrainOptions, check: PictureCheck) -> tuple[list[GlitRecord], SkipReport]:
    if options.data.suffix == ".tar":
        samples, skipped = read_glit_shards(options.data, options.strict, check)
        return list[GlitRecord](samples), skipped
    check.expect(lines_in(options.data))
    return read_glit(options.data, options.root, options.strict, judge=check.judge)


def _load(options: TrainOptions, seed: int) -> LoadedFastGoal:
    """The model to start from. Raises what `load_fast_goal` does, and for a context not its own."""
    asked = options.context_length
    loaded = load_fast_goal(
        options.model, options.pretrained, context_length=asked or _CONTEXT_LENGTH, seed=seed
    )
    own = loaded.model.context_length
    if asked not in (None, own):
        raise ConfigError(
            f"--context-length {asked}: the run in {options.model} has texts of {own} tokens. "
            f"Fix: --context-length {own}"
        )
    return loaded


def _identity(loaded: LoadedFastGoal, options: TrainOptions) -> dict[str, Any]:
    """What a resumed run must agree on of the model it starts from."""
    context = {"context_length": loaded.model.context_length}
    if not loaded.notes:
        return {
            "model": options.model,
            "pretrained": options.pretrained,
            "architecture": noted_architecture(loaded.model, options.model, options.pretrained),
            **context,
        }
    # The run may have gone on since, or its folder been moved: what counts is what was in it.
    return {
        "model": loaded.notes.get("model"),
        "pretrained": None,
        "architecture": loaded.notes["architecture"],
        "initial_weights": tensors_digest(loaded.model.state_dict()),
        **context,
    }


def _match_where_missing(
    model: FastGoalModel, records: list[GlitRecord], has_weights: bool, console: Console
) -> list[GlitRecord]:
    """FLISM's pairs for the records that come without any, by the model as it is now."""
    unmatched = [record for record in records if not record.pairs]
    if not unmatched:
        return records
    if isinstance(unmatched[0], ShardRecord):
        raise ConfigError(
            f"--data: {len(unmatched)} of {len(records)} samples have no local pair, e.g. "
            f"{unmatched[0].id}. Fix: make the shards from what fastgoal prepare wrote"
        )
    console.print(f"{len(unmatched)} records have no local pairs: matching regions and sentences")
    if not has_weights:
        warn_of_random_weights(console, "which pairs they match is arbitrary")
    matched = {record.id: record for record in match_pairs(model, unmatched)}
    return [matched.get(record.id, record) for record in records]


def _dataset(
    model: FastGoalModel,
    records: list[GlitRecord],
    options: TrainOptions,
    config: FastGoalTrainConfig,
    console: Console,
) -> FastGoalDataset:
    with warnings.catch_warnings():
        # The console says it in more words.
        warnings.filterwarnings("ignore", ".* and lose their end", UserWarning)
        dataset = FastGoalDataset(
            records,
            model.tokenizer,
            model.image_size,
            model.context_length,
            model.normalisation,
            sampling=options.pairs,
            top_k=options.top_k,
            seed=config.seed,
            long_captions=options.long_captions,
            load=load_from_shard if isinstance(records[0], ShardRecord) else None,
        )
    if dataset.long:
        said = f"{dataset.long} of {len(records)} captions are longer than "
        said += f"{dataset.context_length} tokens: "
        if options.long_captions == "cut":
            said += "they lose their end (--long-captions chunk keeps it, as items of their own)"
        else:
            runs = len(dataset) - (len(records) - dataset.long)
            said += (
                f"{runs} runs of whole sentences take their place, {dataset.truncated} of which "
                f"lose the end of a sentence that is too long alone; {dataset.left_out} more have "
                "no local pair and are left out"
            )
        console.print(f"[yellow]{said}[/]", highlight=False, soft_wrap=True)
    if options.pairs != "best" and dataset.single:
        console.print(
            f"[yellow]{dataset.single} of {len(dataset)} items have one local pair to draw from, "
            "which they always get[/]",
            highlight=False,
            soft_wrap=True,
        )
    return dataset


def _check_what_trains(options: TrainOptions) -> None:
    if options.lora is None:
        return
    check_lora(options.lora)
    if (options.unlocked_image_blocks, options.unlocked_text_blocks) != (None, None):
        raise ConfigError(
            "--lora keeps both towers' own weights as they are. Fix: leave "
            "--unlocked-image-blocks and --unlocked-text-blocks out"
        )


def _choose_what_trains(
    model: FastGoalModel, options: TrainOptions, config: FastGoalTrainConfig, console: Console
) -> LoraAdapters | None:
    adapters = None
    if options.lora is not None:
        adapters = LoraAdapters(model, options.lora, config.seed)
    else:
        lock_towers(model, options.unlocked_image_blocks, options.unlocked_text_blocks)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    if not all(trains for _, trains in sizes):
        training = sum(size for size, trains in sizes if trains)
        total = sum(size for size, _ in sizes)
        console.print(f"{training:,} of {total:,} parameters train", highlight=False)
    return adapters


def _unusual(options: TrainOptions) -> dict[str, Any]:
    """Options that a resumed run must agree on, where they are not as they are by default.

    Runs from before these options have no word of them, and can be resumed.
    """
    names = ["unlocked_image_blocks", "unlocked_text_blocks", "lora", "pairs", "long_captions"]
    if options.pairs != "best":
        names.append("top_k")
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(TrainOptions, name)}

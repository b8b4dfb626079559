"""`fastgoal train`: from an annotation file to a fine-tuned model, step by step on the screen."""

from __future__ import annotations

import difflib
import types
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from rich.console import Console
from rich.markup import escape

from .checkpoints import write_text_atomically
from .devices import parse_device
from .errors import ConfigError
from .fast_goal import FastGoalModel
from .fast_goal_training import RECIPES, FastGoalTrainConfig
from .flism import match_pairs
from .frozen import lock_towers
from .glit import FastGoalDataset, GlitRecord, SkipReport, read_glit
from .glit_shards import ShardRecord, load_from_shard, read_glit_shards
from .loading import LoadedFastGoal, architecture, load_fast_goal
from .lora import LoraAdapters, check_lora
from .options import records_digest, tensors_digest
from .preprocessing import unlike_clip
from .trackers import trackers, watched
from .train_evaluation import retrieval_evaluation
from .training import TrainingError, TrainResult, train, uses_bf16

CONFIG_FILE = "config.yaml"

_HEADER = """\
# All options of this run. The same again: fastgoal train fast-goal --config THIS_FILE --out FOLDER
# Options on the command line win over these. Paths start at the folder the command is given in.
"""

_CONTEXT_LENGTH = 248  # of a model that is not a run's

# As they are typed, and as they are called here.
_ALIASES = {"lr": "learning_rate"}


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
    device: str | None = None
    tensorboard: bool = False
    wandb: bool = False


def resolve_options(
    given: Mapping[str, Any], config_file: Path | None = None
) -> tuple[TrainOptions, FastGoalTrainConfig]:
    """All options of a run, from those that were given.

    What is given wins over the configuration file, which wins over its own preset; a preset that is
    given wins over the file. Fields are those of TrainOptions and FastGoalTrainConfig. `steps` and
    `epochs` stand for each other: the one that wins leaves the other out. A `model` that is a run's
    folder leaves out what was said of another model's weights and text positions.

    Args:
        given: by name; values of the fields' own types. `lr` means `learning_rate`.
        config_file: YAML or JSON, as `save_options` writes it; it need not have all fields.

    Raises ConfigError, naming the option, for one that is unknown, missing, or has a value that
    makes no sense; OSError for a file that can not be read.
    """
    given = {_ALIASES.get(name, name): value for name, value in given.items()}
    from_file = {} if config_file is None else _read_config(config_file)
    preset = given.get("preset", from_file.get("preset", "default"))
    if preset not in RECIPES:
        raise ConfigError(f"--preset must be one of {', '.join(RECIPES)}; got {preset!r}")
    recipe = RECIPES[preset]
    layers = [from_file, recipe, given] if "preset" in given else [recipe, from_file, given]
    values: dict[str, Any] = {"epochs": 10}
    for layer in layers:
        if any(layer.get(name) is not None for name in ("steps", "epochs")):
            values |= {"steps": None, "epochs": None}
        if "model" in layer and Path(layer["model"]).is_dir():
            values |= {"pretrained": None, "context_length": None}
        values |= layer
    missing = [f"--{name}" for name in ("data", "out") if values.get(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing. Fix: give it, or a --config with it")
    own = {field.name for field in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in values.items() if name in own})
    rest = {name: value for name, value in values.items() if name not in own}
    return options, FastGoalTrainConfig(**rest)


def save_options(options: TrainOptions, config: FastGoalTrainConfig) -> Path:
    """Write `config.yaml` into the run's folder, whole or not at all; returns its path."""
    path = config.out / CONFIG_FILE
    values = asdict(options) | asdict(config)
    plain = {name: _plain(value) for name, value in values.items()}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    write_text_atomically(path, _HEADER + text)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def run_training(
    options: TrainOptions, config: FastGoalTrainConfig, console: Console, *, resume: bool = False
) -> TrainResult:
    """Read, match where pairs are missing, train. Raises what a user can mend (see `cli`)."""
    # First: a mistyped option should not wait for the data.
    device = parse_device(options.device)
    _check_what_trains(options)
    _check_evaluation(options, config)
    others = trackers(
        config.out,
        asdict(options) | asdict(config),
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        resume=resume,
    )
    records, skipped = _read(options)
    console.print(escape(str(skipped)), highlight=False, soft_wrap=True)
    if not records:
        raise TrainingError(f"{options.data} has no usable record")
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
    console.print(
        f"{len(records)} records, {escape(loaded.name)}"
        f"{' with random weights' if loaded.random else ''}, {device}, "
        f"{'bf16' if uses_bf16(config, device) else 'float32'}"
    )
    adapters = _choose_what_trains(model, options, config, console)
    identity |= {"data": records_digest(records), **_unusual(options)}
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
            on_start=lambda: save_options(options, config),
            on_step=tell,
            on_eval=tell,
        )
    console.print(f"{result.step} of {result.total_steps} steps done: {result.checkpoint}")
    return result


def _read(options: TrainOptions) -> tuple[list[GlitRecord], SkipReport]:
    if options.data.suffix != ".tar":
        return read_glit(options.data, root=options.root, strict=options.strict)
    if options.root is not None:
        raise ConfigError(
            "--root is the folder of a JSONL file's images; shards hold theirs. Fix: leave it out"
        )
    samples, skipped = read_glit_shards(options.data, options.strict)
    return list[GlitRecord](samples), skipped


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
            "architecture": _architecture(loaded.model, options),
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


def _architecture(model: FastGoalModel, options: TrainOptions) -> dict[str, Any]:
    """The model's configuration, and how it wants its pictures, where that is not as CLIP's."""
    config = architecture(options.model, options.pretrained)
    unlike = unlike_clip(model.preprocess)
    return config | ({"preprocess_cfg": unlike} if unlike else {})


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
        console.print("[yellow]The weights are random, so which pairs they match is arbitrary.[/]")
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


def _check_evaluation(options: TrainOptions, config: FastGoalTrainConfig) -> None:
    if options.eval_data is not None:
        return
    asked = {
        "--eval-root": options.eval_root is not None,
        "--eval-every": config.eval_every is not None,
        "--keep-best": config.keep_best,
    }
    for name, given in asked.items():
        if given:
            raise ConfigError(f"{name} needs something to evaluate on. Fix: --eval-data FILE")


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


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold options, one a line, as name: value")
    hints = get_type_hints(TrainOptions) | get_type_hints(FastGoalTrainConfig)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = _ALIASES.get(name, name)
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            meant = f". Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--config: {path} has an unknown option {key!r}{meant}")
        try:
            values[name] = _as_type(hints[name], value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"--config: {path}: {key} can not be {value!r}. Fix: {_in_words(hints[name])}"
            ) from None
    return values


def _as_type(hint: Any, value: Any) -> Any:
    """A value of a YAML file as the type of its field. Raises TypeError or ValueError."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if types.NoneType in kinds:
            return None
        raise TypeError
    kind = kinds[0]
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) != len(get_args(kind)):
            raise TypeError
        return tuple(_as_type(k, v) for k, v in zip(get_args(kind), value, strict=True))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        return float(value)  # YAML takes 5e-6, which has no dot, for a word
    if type(value) is not kind:
        raise TypeError
    return value


def _in_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_in_words, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    names = {
        int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null",
        str: "text", Path: "a path",
    }  # fmt: skip
    return names[hint]

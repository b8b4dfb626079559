"""The options of a training run: those typed, of a file, of a preset; and `config.yaml` of all.

One code for every method, so that any run can be made again with `--config`.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import yaml
from rich.console import Console

from .atomic_files import write_text_atomically
from .errors import ConfigError, need_file
from .training import TrainConfig, total_steps

CONFIG_FILE = "config.yaml"

_HEADER = """\
# All options of this run. The same again: fastgoal train {method} --config THIS_FILE --out FOLDER
# Options on the command line win over these. Paths start at the folder the command is given in.
"""

# As they are typed, and as they are called here.
_ALIASES = {"lr": "learning_rate"}

# What is said of another model's weights does not count where `model` is the folder of a run.
_OF_OTHER_WEIGHTS = ("pretrained", "context_length")

Options = TypeVar("Options", bound=Any)
Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True)
class Method(Generic[Options, Config]):
    """What a method's runs are described by: two dataclasses, with a `preset` among the options.

    The options have a field `fit_batch` as well: whether a batch that the records do not fill is
    made smaller (`fit_batch`), which is so where nobody named its size.
    """

    name: str  # as `fastgoal train` has it
    options: type[Options]
    config: type[Config]
    recipes: Mapping[str, Mapping[str, Any]]  # what each preset sets, "default" among them

    def resolve(
        self, given: Mapping[str, Any], config_file: Path | None = None
    ) -> tuple[Options, Config]:
        """All options of a run, from those that were given.

        What is given wins over the configuration file, which wins over its own preset; a preset
        that is given wins over the file. `steps` and `epochs` stand for each other: the one that
        wins leaves the other out. A `model` that is a run's folder leaves out what was said of
        another model's weights and text positions.

        Args:
            given: by name; values of the fields' own types. `lr` means `learning_rate`.
            config_file: YAML or JSON, as `save` writes it; it need not have all fields.

        Raises ConfigError, naming the option, for one that is unknown, missing, or has a value that
        makes no sense, and for a file that can not be read.
        """
        given = {_ALIASES.get(name, name): value for name, value in given.items()}
        from_file = {} if config_file is None else self._read(config_file)
        preset = given.get("preset", from_file.get("preset", "default"))
        if preset not in self.recipes:
            raise ConfigError(f"--preset must be one of {', '.join(self.recipes)}; got {preset!r}")
        recipe = self.recipes[preset]
        layers = [from_file, recipe, given] if "preset" in given else [recipe, from_file, given]
        own = {field.name for field in fields(self.options)}
        values: dict[str, Any] = {"epochs": 10, "fit_batch": True}
        for layer in layers:
            if any(layer.get(name) is not None for name in ("steps", "epochs")):
                values |= {"steps": None, "epochs": None}
            if "model" in layer and Path(layer["model"]).is_dir():
                values |= {name: None for name in _OF_OTHER_WEIGHTS if name in own}
            if "batch_size" in layer:
                values["fit_batch"] = layer is recipe
            values |= layer
        missing = [f"--{name}" for name in ("data", "out") if values.get(name) is None]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} missing. Fix: give it, or a --config with it"
            )
        options = self.options(**{name: values[name] for name in values if name in own})
        return options, self.config(**{name: values[name] for name in values if name not in own})

    def save(self, options: Options, config: Config) -> Path:
        """Write `config.yaml` into the run's folder, whole or not at all; returns its path."""
        path = config.out / CONFIG_FILE
        values = asdict(options) | asdict(config)
        plain = {name: _plain(value) for name, value in values.items()}
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        write_text_atomically(path, _HEADER.format(method=self.name) + text)
        return path

    def _read(self, path: Path) -> dict[str, Any]:
        need_file(path, "--config")
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config: {path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"--config: {path} must hold options, one a line, as name: value")
        hints = get_type_hints(self.options) | get_type_hints(self.config)
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


def check_data(data: Path, root: Path | None) -> None:
    """Raises ConfigError where --data is no file, nor shards, or they do not go with --root."""
    if data.suffix != ".tar":
        need_file(data, "--data")
    elif root is not None:
        raise ConfigError(
            f"--root {root} is the folder of a JSONL file's images; shards hold theirs. Fix: leave "
            "it out"
        )


def fit_batch(options: Any, config: Config, records: int, console: Console) -> tuple[Any, Config]:
    """Both with a batch that so many records fill: where nobody named its size, a smaller one.

    Raises TrainingError where they do not fill one.
    """
    if options.fit_batch and 2 <= records < config.batch_size:
        console.print(
            f"[yellow]{records} records do not fill a batch of {config.batch_size}: it is "
            f"{records}, all of them in each step. --batch-size sets it[/]",
            highlight=False,
            soft_wrap=True,
        )
        config = replace(config, batch_size=records)
        options = replace(options, fit_batch=False)
    total_steps(config, records)
    return options, config


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _as_type(hint: Any, value: Any) -> Any:
    """A value of a YAML file as the type of its field. Raises TypeError or ValueError."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if types.NoneType in kinds:
            return None
        raise TypeError
    kind = kinds[0]
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError
        each = get_args(kind)
        if each[-1] is ...:
            each = each[:1] * len(value)
        return tuple(_as_type(k, v) for k, v in zip(each, value, strict=True))
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
        each = get_args(hint)
        return "a list of words" if each[-1] is ... else f"a list of {len(each)} numbers"
    names = {
        int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null",
        str: "text", Path: "a path",
    }  # fmt: skip
    return names[hint]

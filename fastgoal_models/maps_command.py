"""`fastgoal maps`: where sentences and the class token look, before and after training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from .attention import class_attention, has_class_attention
from .devices import parse_device
from .errors import ConfigError, GlitError, need_file
from .fast_goal import FastGoalModel
from .fonts import save_figure
from .glit import GlitRecord, read_glit
from .loading import Loaded, load_model
from .localisation import sentence_maps
from .map_pictures import ModelMaps, draw_maps, shown_sentences
from .pictures import image_tensor, load_image
from .progress import counting
from .random_weights import warn_of_random_weights

_NAME_LENGTH = 60  # of a record's id in a file name


@dataclass(frozen=True)
class MapsOptions:
    """The options of `fastgoal maps`."""

    model: str
    data: Path
    out: Path
    pretrained: str | None = None
    root: Path | None = None
    before: str | None = None
    before_pretrained: str | None = None
    limit: int = 8
    context_length: int | None = None
    device: str | None = None


class _Model(NamedTuple):
    name: str
    when: str
    """as `ModelMaps` has it"""
    model: FastGoalModel


def run_maps(options: MapsOptions, console: Console) -> list[Path]:
    """Draw the first records of a file; the pictures' paths. Raises what a user can mend."""
    need_file(options.data, "--data")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out: {options.out} is a file. Fix: name a folder")
    if options.before is None and options.before_pretrained is not None:
        raise ConfigError(
            f"--before-pretrained {options.before_pretrained} without its model. Fix: --before NAME"
        )
    records, report = read_glit(options.data, root=options.root, verify_images=False)
    console.print(escape(str(report)), highlight=False, soft_wrap=True)
    if not records:
        raise ConfigError(f"--data: {options.data} has no usable record. Fix: see why above")
    models = _models(options, console)
    paths: list[Path] = []
    count = min(options.limit, len(records))
    with counting(console, "pictures") as bar:
        task = bar.add_task("drawing", total=count)
        for number, record in enumerate(records[:count], start=1):
            try:
                figure = draw_maps(record, [_maps(model, record) for model in models])
            except GlitError as error:
                console.print(f"[yellow]left out: {escape(str(error))}[/]", soft_wrap=True)
            else:
                paths.append(options.out / f"{number:04d}-{_file_name(record.id)}.png")
                save_figure(figure, paths[-1], dpi=100)
            bar.advance(task)
    if not paths:
        raise ConfigError(
            f"--data: not one of its first {count} pictures can be read. Fix: see why above"
        )
    console.print(f"{len(paths)} pictures in {escape(str(options.out))}", soft_wrap=True)
    return paths


def _models(options: MapsOptions, console: Console) -> list[_Model]:
    """The models that were asked for, the one before training first."""
    asked = [("--model", options.model, options.pretrained, "")]
    if options.before is not None:
        asked = [
            ("--before", options.before, options.before_pretrained, "before training"),
            ("--model", options.model, options.pretrained, "after training"),
        ]
    device = parse_device(options.device)
    found = []
    for option, name, pretrained, when in asked:
        loaded: Loaded = load_model(name, pretrained, context_length=options.context_length)
        if not isinstance(loaded.model, FastGoalModel):
            weights = pretrained or (name if Path(name).is_dir() else "FILE")
            raise ConfigError(
                f"{option}: {name} is a CAFT, whose segments and attention another command draws. "
                f"Fix: fastgoal hierarchy PHOTOGRAPH CAPTION --checkpoint {weights}"
            )
        if loaded.random:
            warn_of_random_weights(console, f"the maps of {escape(loaded.name)} mean nothing")
        if not has_class_attention(loaded.model):
            console.print(
                f"[yellow]{escape(loaded.name)}: no attention is drawn, since its features are not "
                "the class token's, or its blocks tell no weights[/]",
                soft_wrap=True,
            )
        found.append(_Model(loaded.name, when, loaded.model.to(device).eval()))
    return found


def _maps(of: _Model, record: GlitRecord) -> ModelMaps:
    model = of.model
    sentences = sentence_maps(model, record, shown_sentences(record))
    attention = None
    if has_class_attention(model):
        pixels = image_tensor(load_image(record.image), model.image_size, *model.normalisation)
        device = next(model.parameters()).device
        attention = class_attention(model, pixels[None].to(device))[0].cpu()
    return ModelMaps(of.name, of.when, [heat.cpu() for heat in sentences], attention)


def _file_name(name: str) -> str:
    """A record's id as a part of a file's name, on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-_NAME_LENGTH:].strip(".-") or "record"

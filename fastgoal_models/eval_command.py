"""`fastgoal eval`: one model, or two side by side, on a set; a table, and the same as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .caft.model import Caft
from .devices import parse_device
from .errors import ConfigError, need_file
from .eval_screen import show_evaluation
from .evaluation import (
    Evaluated,
    caption_set,
    evaluate_set,
    joint_precision,
    scores_of,
)
from .fast_goal import FastGoalModel
from .glit import GlitRecord, read_glit
from .json_output import write_json
from .loading import Loaded, load_model
from .localisation import pointing
from .overlap_report import check_overlap
from .positional import KEPT_POSITIONS, stretched_length
from .progress import counting
from .published_results import published_rows
from .search import Hit
from .sets import SETS, CaptionSet, read_set
from .zero_shot import class_folders, classify

_SHOWN, _SHEETS = 8, 6  # images a sheet; sheets of the worst captions, and of others


@dataclass(frozen=True)
class EvalOptions:
    """The options of `fastgoal eval`."""

    model: str
    pretrained: str | None = None
    before: str | None = None
    before_pretrained: str | None = None
    data: Path | None = None
    set_name: str | None = None
    root: Path | None = None
    classes: Path | None = None
    trained_on: tuple[Path, ...] = ()
    """none: what the runs behind `model` note"""
    score: str | None = None
    resize: str = "own"
    published: bool | None = None
    """cut a CAFT's captions as the published code does; None: as it was trained"""
    context_length: int | None = None
    """None: as many as `model` has, for `before` too, whose positions are stretched"""
    batch_size: int = 64
    device: str | None = None
    sheets: Path | None = None
    json_path: Path | None = None
    command: str = "fastgoal eval"


@dataclass
class _Column:
    """What was measured of one model."""

    loaded: Loaded
    published: bool | None = None
    """whether a CAFT's captions are cut as the published code does; None for a CLIP"""
    stretched_from: int | None = None
    """the text positions that it had; None: as many as now"""
    overlap: dict[str, Any] | None = None
    retrieval: Evaluated | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def context_length(self) -> int:
        model = self.loaded.model
        return model.config.text.context_length if isinstance(model, Caft) else model.context_length

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.loaded.name,
            "random_weights": self.loaded.random,
            "context_length": self.context_length,
            "stretched_from": self.stretched_from,
            "published_captions": self.published,
            "overlap": self.overlap,
            "retrieval": None if self.retrieval is None else self.retrieval.as_json(),
            **self.more,
        }


def run_eval(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Evaluate, show, return what `--json` writes. Raises what a user can mend (see `cli`)."""
    _check(options)
    captioned, records = _read(options, console)
    classes = None if options.classes is None else class_folders(options.classes)
    device = parse_device(options.device)
    columns = _columns(options, console)  # all of them: what does not fit is said before the work
    if captioned is not None:
        _overlaps(columns, captioned, options, console)
    for column in columns:
        column.loaded.model.to(device).eval()
        if captioned is not None:
            _retrieval(column, captioned, options, console)
            _with_boxes(column, records, options)
        if classes is not None:
            _classes(column, classes, options, console)
        column.loaded.model.cpu()
    if options.sheets is not None and captioned is not None:
        _draw_sheets(columns[-1], captioned, options.sheets, console)
    document = _document(options, captioned, columns)
    show_evaluation(document, console)
    write_json(document, options.json_path, console)
    return document


def _check(options: EvalOptions) -> None:
    """Raises ConfigError for options that do not go together, before anything is read."""
    if options.before_pretrained is not None and options.before is None:
        raise ConfigError(
            f"--before-pretrained {options.before_pretrained} is of a second model. "
            "Fix: --before NAME, or --pretrained for the first"
        )
    if options.data is not None and options.set_name is not None:
        raise ConfigError("give --data or --set, not both")
    if options.set_name is not None and options.root is None:
        raise ConfigError("--set needs --root, the folder that holds the set")
    if options.data is not None or options.set_name is not None:
        return
    if options.classes is None:
        raise ConfigError("nothing to evaluate on. Fix: --data, --set with --root, or --classes")
    of_captions = {
        "--root": options.root,
        "--trained-on": options.trained_on or None,
        "--score": options.score,
        "--sheets": options.sheets,
    }
    for name, given in of_captions.items():
        if given is not None:
            raise ConfigError(
                f"{name} does nothing with --classes alone: it is of pictures with captions. "
                "Fix: leave it out, or --data, or --set"
            )


def _columns(options: EvalOptions, console: Console) -> list[_Column]:
    """The models, `before` first, each checked against what is asked of it."""
    asked = [(options.model, options.pretrained)]
    if options.before is not None:
        asked.append((options.before, options.before_pretrained))
    columns: list[_Column] = []
    for name, pretrained in asked:
        loaded = load_model(name, pretrained, context_length=options.context_length)
        if options.score is not None and options.score not in scores_of(loaded.model):
            raise ConfigError(
                f"--score {options.score}: {loaded.name} has {', '.join(scores_of(loaded.model))}"
            )
        published = None
        if isinstance(loaded.model, Caft):
            if options.classes is not None:
                raise ConfigError("--classes is for CLIP models: a CAFT was not made to classify")
            trained = loaded.model.visual.published
            published = trained if options.published is None else options.published
        if loaded.random:
            console.print(f"[yellow]{escape(loaded.name)} has random weights.[/]")
        columns.append(_Column(loaded, published))
    if options.published is not None and all(column.published is None for column in columns):
        word = "--published" if options.published else "--no-published"
        raise ConfigError(
            f"{word} is how captions are cut for a CAFT, and {columns[0].loaded.name} is a CLIP, "
            "which reads them whole. Fix: leave it out"
        )
    if options.sheets is not None and isinstance(columns[0].loaded.model, Caft):
        raise ConfigError("--sheets draws what a CLIP found: a CAFT's scores keep no images")
    if options.before is not None and options.context_length is None:
        _stretch(columns[1], columns[0].context_length)
    return columns[::-1]


def _stretch(column: _Column, context: int) -> None:
    """Let a model read as much of a caption as the one beside it, as papers compare them.

    One that was trained stays as it was.
    """
    loaded, own = column.loaded, column.context_length
    if isinstance(loaded.model, Caft) or loaded.notes:
        return
    if KEPT_POSITIONS + 2 <= own < context <= stretched_length(own):
        column.loaded = loaded._replace(model=FastGoalModel(loaded.model.clip, context))
        column.stretched_from = own


def _read(options: EvalOptions, console: Console) -> tuple[CaptionSet | None, list[GlitRecord]]:
    records: list[GlitRecord] = []
    if options.set_name is not None and options.root is not None:
        captioned = read_set(options.set_name, options.root)
    elif options.data is not None:
        need_file(options.data, "--data")
        records, report = read_glit(options.data, root=options.root, verify_images=False)
        if not records:
            file = options.data.name
            sets = [
                s for s, layout in SETS.items() if file in layout.holds.replace(",", "").split()
            ]
            hint = f". Fix: --set {' or '.join(sets)} --root {options.data.parent}" if sets else ""
            raise ConfigError(f"--data {options.data} has no usable record: {report}{hint}")
        captioned = caption_set(records, options.data.stem)
        captioned.report = report
    else:
        return None, []
    console.print(escape(str(captioned.report)), highlight=False, soft_wrap=True)
    if captioned.note is not None:
        console.print(f"[yellow]{escape(captioned.note)}[/]", soft_wrap=True)
    return captioned, records


def _overlaps(
    columns: list[_Column], captioned: CaptionSet, options: EvalOptions, console: Console
) -> None:
    """Which test images each of the models was trained on."""
    model = (options.model, options.pretrained)
    columns[-1].overlap = check_overlap(captioned, model, options.trained_on, console)
    if options.before is not None:
        before = (options.before, options.before_pretrained)
        columns[0].overlap = check_overlap(captioned, before, None, console)


def _retrieval(
    column: _Column, captioned: CaptionSet, options: EvalOptions, console: Console
) -> None:
    with counting(console, "items") as bar:
        task = bar.add_task("encoding", total=len(captioned.images) + captioned.num_captions)
        column.retrieval = evaluate_set(
            column.loaded.model,
            captioned,
            score=options.score,
            resize=options.resize,
            published=bool(column.published),
            batch_size=options.batch_size,
            show=_SHOWN if options.sheets is not None else 0,
            progress=lambda more: bar.advance(task, more),
        )


def _with_boxes(column: _Column, records: list[GlitRecord], options: EvalOptions) -> None:
    """What only pictures with local pairs can tell."""
    model = column.loaded.model
    unread = {} if column.retrieval is None else column.retrieval.unread
    records = [record for record in records if record.pairs and record.id not in unread]
    if not records:
        return
    if isinstance(model, FastGoalModel):
        column.more["joint"] = joint_precision(
            model, records, batch_size=options.batch_size, resize=options.resize
        )._asdict()
    column.more["pointing"] = pointing(model, records)._asdict()


def _classes(
    column: _Column, classes: dict[str, list[Path]], options: EvalOptions, console: Console
) -> None:
    model = column.loaded.model
    assert isinstance(model, FastGoalModel)
    with counting(console, "items") as bar:
        task = bar.add_task("classifying", total=sum(map(len, classes.values())))
        column.more["classes"] = classify(
            model,
            classes,
            resize=options.resize,
            batch_size=options.batch_size,
            progress=lambda more: bar.advance(task, more),
        )._asdict()


def _draw_sheets(column: _Column, captioned: CaptionSet, folder: Path, console: Console) -> None:
    """What was found for some captions: those whose image came last, and a few others."""
    found = None if column.retrieval is None else column.retrieval.found
    assert found is not None  # asked for, and of a CLIP
    from .sheets import draw_sheet

    worst = sorted(range(len(found.ranks)), key=lambda text: -found.ranks[text])
    every = range(0, len(found.ranks), max(len(found.ranks) // _SHEETS, 1))
    chosen = list(dict.fromkeys([*worst[:_SHEETS], *every]))[: 2 * _SHEETS]
    for text in chosen:
        hits = [
            Hit(captioned.images[place].image, score)
            for place, score in zip(found.images[text], found.scores[text], strict=True)
        ]
        right = [place == found.owners[text] for place in found.images[text]]
        path = folder / f"rank-{found.ranks[text]:05d}-caption-{text:05d}.png"
        draw_sheet(f"{found.captions[text]} (rank {found.ranks[text]})", hits, path, right)
    console.print(f"{len(chosen)} sheets in {escape(str(folder))}", soft_wrap=True)


def _document(
    options: EvalOptions, captioned: CaptionSet | None, columns: list[_Column]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "evaluation",
        "command": options.command,
        "set": None if captioned is None else captioned.name,
        "ks": [] if captioned is None else list(captioned.ks),
        "resize": options.resize,
        "note": _note(captioned, columns),
        "skipped": {} if captioned is None else captioned.report.counts,
        "models": [column.as_json() for column in columns],
        "published": []
        if options.set_name is None  # a file of one's own may be called like a set
        else [row._asdict() for row in published_rows(options.set_name)],
    }


def _note(captioned: CaptionSet | None, columns: list[_Column]) -> str | None:
    """Why results do not compare with others."""
    notes = [] if captioned is None or captioned.note is None else [captioned.note]
    lost = 0 if columns[0].retrieval is None else len(columns[0].retrieval.unread)
    if lost:
        notes.append(
            f"{lost} images could not be read and are left out with their captions, which makes "
            "retrieval easier"
        )
    return "; ".join(notes) or None

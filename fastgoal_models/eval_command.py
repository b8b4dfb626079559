"""`fastgoal eval`: one model, or two side by side, on a set; a table, and the same as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .caft.model import Caft
from .devices import parse_device
from .errors import ConfigError, need_file
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
from .overlap import noted_data, trained_on, training_images
from .positional import KEPT_POSITIONS, stretched_length
from .progress import counting
from .published_results import published_rows
from .search import Hit
from .sets import SETS, CaptionSet, read_set
from .zero_shot import class_folders, classify

_NAMES_SHOWN = 5
_NOTHING = "–"
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
    """none: what `model` notes, if it is a run"""
    score: str | None = None
    resize: str = "own"
    published: bool = False
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
    stretched_from: int | None = None
    """the text positions that it had; None: as many as now"""
    retrieval: Evaluated | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def context_length(self) -> int:
        model = self.loaded.model
        return model.config.text.context_length if isinstance(model, Caft) else model.context_length


def run_eval(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Evaluate, show, return what `--json` writes. Raises what a user can mend (see `cli`)."""
    captioned, records = _read(options, console)
    classes = None if options.classes is None else class_folders(options.classes)
    if captioned is None and classes is None:
        raise ConfigError("nothing to evaluate on. Fix: --data, --set with --root, or --classes")
    device = parse_device(options.device)
    seen = _seen(captioned, options, console)
    columns = _columns(options, console)  # all of them: what does not fit is said before the work
    for column in columns:
        loaded = column.loaded
        loaded.model.to(device).eval()
        if captioned is not None:
            _retrieval(column, captioned, options, console)
            _with_boxes(column, records, options)
        if classes is not None:
            _classes(column, classes, options, console)
        loaded.model.cpu()
    if options.sheets is not None and captioned is not None:
        _draw_sheets(columns[-1], captioned, options.sheets, console)
    document = _document(options, captioned, columns, seen)
    _show(document, captioned, columns, console)
    write_json(document, options.json_path, console)
    return document


def _columns(options: EvalOptions, console: Console) -> list[_Column]:
    """The models, each checked against what is asked of it."""
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
        if isinstance(loaded.model, Caft) and options.classes is not None:
            raise ConfigError("--classes is for CLIP models: a CAFT was not made to classify")
        if loaded.random:
            console.print(f"[yellow]{escape(loaded.name)} has random weights.[/]")
        columns.append(_Column(loaded))
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
    if options.data is not None and options.set_name is not None:
        raise ConfigError("give --data or --set, not both")
    if options.set_name is not None:
        if options.root is None:
            raise ConfigError("--set needs --root, the folder that holds the set")
        captioned, records = read_set(options.set_name, options.root), []
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
            published=options.published,
            batch_size=options.batch_size,
            show=_SHOWN if options.sheets is not None else 0,
            progress=lambda more: bar.advance(task, more),
        )


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


def _seen(captioned: CaptionSet | None, options: EvalOptions, console: Console) -> list[str]:
    """Test images that were trained on."""
    if captioned is None:
        return []
    images = [image for path in options.trained_on for image in training_images(path)]
    noted = None if options.trained_on else noted_data(options.model)
    if noted is not None:
        says = f"trained on {noted.data}, says {noted.note}"
        try:
            images = training_images(noted.data, noted.root)
            console.print(f"{escape(says)}: are test images among its images?", soft_wrap=True)
        except ConfigError:
            console.print(
                f"[yellow]{escape(says)}, and no image can be read from that: whether test images "
                "were trained on is not known. Fix: --trained-on FILE[/]",
                soft_wrap=True,
            )
    found = trained_on(captioned, images)
    if images and not found:
        console.print("No test image is among the training images.")
    return found


def _document(
    options: EvalOptions, captioned: CaptionSet | None, columns: list[_Column], seen: list[str]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "evaluation",
        "command": options.command,
        "set": None if captioned is None else captioned.name,
        "resize": options.resize,
        "note": _note(captioned, columns),
        "skipped": {} if captioned is None else captioned.report.counts,
        "trained_on": seen,
        "models": [
            {
                "name": column.loaded.name,
                "random_weights": column.loaded.random,
                "context_length": column.context_length,
                "stretched_from": column.stretched_from,
                "retrieval": None if column.retrieval is None else column.retrieval.as_json(),
                **column.more,
            }
            for column in columns
        ],
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


def _show(
    document: dict[str, Any],
    captioned: CaptionSet | None,
    columns: list[_Column],
    console: Console,
) -> None:
    title = "evaluation"
    found = columns[0].retrieval
    if captioned is not None and found is not None:
        images, texts = found.retrieval.num_images, found.retrieval.num_texts
        title = f"{captioned.name}: {images:,} images, {texts:,} captions"
    table = Table(title=escape(title))
    table.add_column("%")
    for column in columns:
        score = "" if column.retrieval is None else f"\nby {column.retrieval.score} score"
        context = f"\ntexts of {column.context_length} tokens"
        if column.stretched_from is not None:
            context += f",\npositions stretched from {column.stretched_from}"
        table.add_column(escape(f"{column.loaded.name}{score}{context}"), justify="right")
    for label, cells in _rows(columns):
        table.add_row(label, *cells)
    console.print(table)
    if found is not None and max(found.retrieval.text_to_image) >= found.retrieval.num_images:
        console.print(
            "R@K is left out where K takes every candidate, and so finds the right one whatever "
            "the model",
            soft_wrap=True,
        )
    for column in columns:
        _say_what_is_missing(column, console)
    if document["trained_on"]:
        names = document["trained_on"]
        more = ", …" if len(names) > _NAMES_SHOWN else ""
        console.print(
            f"[bold red]{len(names)} test images are among the training images: "
            f"{escape(', '.join(names[:_NAMES_SHOWN]))}{more}[/]",
            soft_wrap=True,
        )
    if document["published"]:
        _show_published(document["published"], console)


def _rows(columns: list[_Column]) -> list[tuple[str, list[str]]]:
    rows: list[tuple[str, list[str]]] = []
    first = columns[0].retrieval
    if first is not None:
        for name, words in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
            for k in getattr(first.retrieval, name):
                cells = [_recall(column, name, k) for column in columns]
                if any(cell != _NOTHING for cell in cells):
                    rows.append((f"R@{k} {words}", cells))
    for key, label, parts in (
        ("joint", "mAP@10, pictures and regions", ("text_to_image", "image_to_text")),
        ("pointing", "pointing accuracy (chance)", ("hits", "chance")),
        ("classes", "zero-shot top-1, top-5", ("top1", "top5")),
    ):
        if any(key in column.more for column in columns):
            cells = [
                " / ".join(f"{100 * column.more[key][part]:.1f}" for part in parts)
                if key in column.more
                else _NOTHING
                for column in columns
            ]
            rows.append((label, cells))
    return rows


def _recall(column: _Column, direction: str, k: int) -> str:
    if column.retrieval is None:
        return _NOTHING
    recall = column.retrieval.recalls(direction).get(k)
    if recall is None:
        return _NOTHING
    low, high = getattr(column.retrieval.intervals, direction)[k]
    return f"{100 * recall:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _say_what_is_missing(column: _Column, console: Console) -> None:
    if column.retrieval is None:
        return
    name = escape(column.loaded.name)
    if column.retrieval.truncated:
        console.print(
            f"{name}: {column.retrieval.truncated} captions ran past the context", soft_wrap=True
        )
    unread = column.retrieval.unread
    if unread:
        shown = "; ".join(list(unread.values())[:_NAMES_SHOWN])
        console.print(
            f"[yellow]{name}: {len(unread)} images could not be read and are left out with their "
            f"captions, which makes retrieval easier: {escape(shown)}[/]",
            soft_wrap=True,
        )


def _show_published(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="what papers report: R@1, %")
    for word in ("model", "text → image", "image → text"):
        table.add_column(word, justify="left" if word == "model" else "right")
    for row in rows:
        table.add_row(row["model"], f"{row['text_to_image']}", f"{row['image_to_text']}")
    console.print(table)

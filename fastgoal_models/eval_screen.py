"""What a person sees of an evaluation: the document that `--json` writes, as tables and notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .overlap_report import show_overlap

_NAMES_SHOWN = 5
_NOTHING = "–"
_WAYS = (("text_to_image", "text → image"), ("image_to_text", "image → text"))

Model = dict[str, Any]
"""one of the document's `models`"""


def show_evaluation(document: dict[str, Any], console: Console) -> None:
    """Print the document of `fastgoal eval`."""
    models: Sequence[Model] = document["models"]
    found = models[0]["retrieval"]
    title = "evaluation"
    if found is not None:
        title = f"{document['set']}: {found['images']:,} images, {found['texts']:,} captions"
    table = Table(title=escape(title))
    table.add_column("%")
    for model in models:
        table.add_column(escape(_head(model)), justify="right")
    for label, cells in _rows(models, document["ks"]):
        table.add_row(label, *cells)
    console.print(table)
    if found is not None and max(document["ks"]) >= found["images"]:
        console.print(
            "R@K is left out where K takes every candidate, and so finds the right one whatever "
            "the model",
            soft_wrap=True,
        )
    for model in models:
        _say_what_is_missing(model, console)
    for model in models:
        if model["overlap"] is not None:
            show_overlap(model["name"], model["overlap"], console)
    if document["published"]:
        _show_published(document["published"], console)


def _head(model: Model) -> str:
    lines = [model["name"]]
    if model["retrieval"] is not None:
        lines.append(f"by {model['retrieval']['score']} score")
    lines.append(f"texts of {model['context_length']} tokens")
    if model["stretched_from"] is not None:
        lines[-1] += ","
        lines.append(f"positions stretched from {model['stretched_from']}")
    if model["published_captions"]:
        lines.append("captions cut as published")
    return "\n".join(lines)


def _rows(models: Sequence[Model], ks: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Labels and cells; without rows that have no number."""
    rows = [
        (f"R@{k} {words}", [_recall(model, way, k) for model in models])
        for way, words in _WAYS
        for k in ks
    ]
    for key, label, parts in (
        ("joint", "mAP@10, pictures and regions", ("text_to_image", "image_to_text")),
        ("pointing", "pointing accuracy (chance)", ("hits", "chance")),
        ("classes", "zero-shot top-1", ("top1",)),
        ("classes", "zero-shot top-5", ("top5",)),
    ):
        rows.append((label, [_shares(model.get(key, {}), parts) for model in models]))
    return [(label, cells) for label, cells in rows if set(cells) != {_NOTHING}]


def _recall(model: Model, way: str, k: int) -> str:
    found = None if model["retrieval"] is None else model["retrieval"][way].get(str(k))
    if found is None:
        return _NOTHING
    low, high = found["interval"]
    return f"{100 * found['recall']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _shares(found: dict[str, Any], parts: Sequence[str]) -> str:
    values = [found[part] for part in parts if found.get(part) is not None]
    return " / ".join(f"{100 * value:.1f}" for value in values) or _NOTHING


def _say_what_is_missing(model: Model, console: Console) -> None:
    name, found = escape(model["name"]), model["retrieval"]
    if found is not None and found["truncated"]:
        console.print(f"{name}: {found['truncated']} captions ran past the context", soft_wrap=True)
    if found is not None and found["unread"]:
        _say_unread(
            name, "images", found["unread"], "left out with their captions, which makes retrieval "
            "easier", console,
        )  # fmt: skip
    classes = model.get("classes")
    if classes is not None and classes["unread"]:
        _say_unread(name, "pictures of --classes", classes["unread"], "counted nowhere", console)
    if classes is not None and classes["top5"] is None:
        console.print(
            f"top-5 is left out: it takes all of {classes['classes']} classes", soft_wrap=True
        )


def _say_unread(
    name: str, what: str, unread: dict[str, str], and_so: str, console: Console
) -> None:
    shown = escape("; ".join(list(unread.values())[:_NAMES_SHOWN]))
    console.print(
        f"[yellow]{name}: {len(unread)} {what} could not be read and are {and_so}: {shown}[/]",
        soft_wrap=True,
    )


def _show_published(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="what papers report: R@1, %")
    for word in ("model", *(words for _, words in _WAYS)):
        table.add_column(word, justify="left" if word == "model" else "right")
    for row in rows:
        table.add_row(row["model"], f"{row['text_to_image']}", f"{row['image_to_text']}")
    console.print(table)

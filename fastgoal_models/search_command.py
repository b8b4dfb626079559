"""`fastgoal embed` and `fastgoal search`: a folder of images, found by long texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .caft.model import Caft
from .devices import parse_device
from .errors import ConfigError
from .fast_goal import FastGoalModel
from .json_output import write_json
from .loading import Loaded, load_fast_goal, load_model
from .progress import counting
from .random_weights import warn_of_random_weights
from .search import Hit, Index, files_below, make_index, search_index, search_with_caft


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where."""

    model: str
    pretrained: str | None = None
    context_length: int | None = None
    batch_size: int = 64
    device: str | None = None


def run_embed(
    images: Path,
    out: Path,
    options: ModelOptions,
    force: bool,
    json_path: Path | None,
    command: str,
    console: Console,
) -> None:
    """Write the index of a folder's images. Raises what a user can mend (see `cli`)."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: {out} must end in .safetensors")
    if out.exists() and not force:
        raise ConfigError(f"--out: {out} exists already. Fix: --force replaces it")
    files_below(images)  # what is not there is said before the model is loaded
    loaded = load_fast_goal(
        options.model, options.pretrained, context_length=options.context_length
    )
    model = loaded.model.to(parse_device(options.device)).eval()
    if loaded.random:
        warn_of_random_weights(console, "so is the order of what is found")
    index, lost = _index(model, images, options.batch_size, console)
    index.save(out)
    console.print(f"{len(index.names)} images: {escape(str(out))} written", soft_wrap=True)
    document = {
        "schema": 1,
        "kind": "embed",
        "command": command,
        "model": loaded.name,
        "random_weights": loaded.random,
        "out": str(out),
        "count": len(index.names),
        "width": index.features.shape[1],
        "skipped": lost,
    }
    write_json(document, json_path, console)


def run_search(
    query: str,
    source: Path,
    k: int,
    score: str | None,
    published: bool | None,
    options: ModelOptions,
    sheet: Path | None,
    json_path: Path | None,
    command: str,
    console: Console,
) -> list[Hit]:
    """Find, show and draw. `source`: a folder of images, or an index of one.

    `published`: cut a CAFT's query as the published code does; None: as it was trained.
    """
    if sheet is not None:
        from .drawing import check_ending

        check_ending(sheet)  # before the search, not after it
    stored = Index.load(source) if source.is_file() else None
    source = source.resolve()  # so that a CAFT's hits are named as an index names them
    paths = [] if stored is not None else files_below(source)
    loaded: Loaded = load_model(
        options.model, options.pretrained, context_length=options.context_length
    )
    model = loaded.model.to(parse_device(options.device)).eval()
    if loaded.random:
        warn_of_random_weights(console, "so is the order of what is found")
    if isinstance(model, Caft):
        if score not in (None, "blended") or stored is not None:
            raise ConfigError("a CAFT searches a folder, by its blended score alone")
        score = "blended"
        with counting(console, "images") as bar:
            task = bar.add_task("encoding", total=len(paths))
            hits, lost = search_with_caft(
                model, paths, query, k, published=published, batch_size=options.batch_size,
                progress=lambda more: bar.advance(task, more),
            )  # fmt: skip
        _say_lost(lost, console)
    else:
        if published is not None:
            raise ConfigError(
                f"--published is how texts are cut for a CAFT, and {loaded.name} is a CLIP. "
                "Fix: leave it out"
            )
        score = score or "reranked"
        index = stored or _index(model, source, options.batch_size, console)[0]
        hits = search_index(model, index, query, k, score=score, batch_size=options.batch_size)
    console.print(f"by {score} score of {escape(loaded.name)}:", highlight=False, soft_wrap=True)
    for place, hit in enumerate(hits, start=1):
        console.print(f"{place:>3}  {hit.score:.4f}  {escape(str(hit.image))}", soft_wrap=True)
    document = {
        "schema": 1,
        "kind": "search",
        "command": command,
        "model": loaded.name,
        "random_weights": loaded.random,
        "query": query,
        "score": score,
        "images": [{"image": str(hit.image), "score": hit.score} for hit in hits],
    }
    write_json(document, json_path, console)
    if sheet is not None:
        from .sheets import draw_sheet

        draw_sheet(query, hits, sheet)
        console.print(f"{escape(str(sheet))} written", soft_wrap=True)
    return hits


def _index(
    model: FastGoalModel, folder: Path, batch_size: int, console: Console
) -> tuple[Index, dict[str, str]]:
    """The index, and why images are not in it, by their names."""
    with counting(console, "images") as bar:
        task = bar.add_task("encoding", total=len(files_below(folder)))
        index, lost = make_index(
            model, folder, batch_size=batch_size, progress=lambda more: bar.advance(task, more)
        )
    _say_lost(lost, console)
    return index, lost


def _say_lost(lost: dict[str, str], console: Console) -> None:
    if lost:
        names = "; ".join(list(lost.values())[:5])
        console.print(
            f"[yellow]{len(lost)} images could not be read: {escape(names)}[/]", soft_wrap=True
        )

"""`fastgoal unpack`: a dataset or shards as what the other commands read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..errors import ConfigError
from ..json_output import write_json
from ..progress import counting
from .folder import Unpacked, write_folder
from .hugging_face import HuggingFaceSource
from .samples import Columns, Source
from .shards import ShardSource

_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class UnpackOptions:
    """What is taken of a source, and what it is called there."""

    columns: Columns = field(default_factory=Columns)
    split: str | None = None
    subset: str | None = None
    limit: int | None = None


def unpack(source: str, out: str | Path, options: UnpackOptions | None = None) -> Unpacked:
    """Write a dataset's pictures to `out/images` and their captions to `out/captions.jsonl`.

    The same call goes on where another was interrupted. What can not be used is in the `report`.

    Args:
        source: shards, "shards/part-*.tar"; a folder of `Dataset.save_to_disk`, of parquet files
            or of images; or the name of a dataset on the hub.

    Raises:
        ConfigError: an option that makes no sense here; the message names the command's argument.
        UnpackError: a source that can not be read, or of which nothing can be used; an `out` that
            holds something else.
    """
    options, out = options or UnpackOptions(), Path(out)
    return write_folder(_open(source, out, options), out, options.limit)


def _open(
    source: str,
    out: Path,
    options: UnpackOptions,
    on_shard: Callable[[int, int], None] = lambda done, of: None,
) -> Source:
    columns = options.columns
    if source.endswith(_COMPRESSED):
        raise ConfigError(f"SOURCE {source}: shards must be plain tar files. Fix: decompress them")
    if source.endswith(".tar"):
        of_datasets = {
            "--split": options.split,
            "--subset": options.subset,
            "--image-column": None if columns.image == Columns.image else columns.image,
            "--keep-column": columns.keep or None,
        }
        for argument, value in of_datasets.items():
            if value is not None:
                raise ConfigError(
                    f"{argument} is for datasets: a shard has neither splits nor columns, and all "
                    "keys of its JSON are kept. Fix: leave it out"
                )
        return ShardSource(source, columns, on_shard)
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(f"--out {out} lies in SOURCE, and would change it. Fix: another folder")
    return HuggingFaceSource(source, columns, options.split, options.subset)


def run_unpack(
    source: str,
    out: Path,
    options: UnpackOptions,
    json_path: Path | None,
    command: str,
    console: Console,
) -> Unpacked:
    """Unpack, with what a person wants to see. Raises what a user can mend (see `cli`)."""
    with counting(console, "shards") as shards:
        found = _open(source, out, options, _shown_in(shards, "looking"))
    with counting(console, "samples") as samples:
        done = write_folder(found, out, options.limit, _shown_in(samples, "unpacking"))
    console.print(escape(str(done.report)), highlight=False, soft_wrap=True)
    if done.samples:
        rate = done.samples / max(done.seconds, 1e-9)
        console.print(
            f"{done.samples} samples in {done.seconds:.1f} s, {rate:.1f} samples/s", highlight=False
        )
    console.print(f"{escape(str(done.jsonl))} written", soft_wrap=True)
    document = {
        "schema": 1,
        "kind": "unpack",
        "command": command,
        "source": source,
        "captions": str(done.jsonl),
        "read": done.report.read,
        "skipped": done.report.counts,
        "names": done.report.names,
        "samples": done.samples,
        "seconds": done.seconds,
    }
    write_json(document, json_path, console)
    return done


def _shown_in(bar: Progress, what: str) -> Callable[[int, int | None], None]:
    def show(done: int, of: int | None) -> None:
        if not bar.tasks:  # what an earlier run did is no part of the pace
            bar.add_task(what, total=of, completed=done)
        bar.update(bar.tasks[0].id, completed=done)

    return show

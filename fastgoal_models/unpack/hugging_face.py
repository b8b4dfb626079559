"""Samples of a dataset that the `datasets` library reads: from a folder, or from the hub.

Rows stay Arrow's until a value is asked for. So pictures are not decoded, and their files' own
bytes are there; and a text that is not UTF-8 is that row's fault alone.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigError
from ..glit import inside
from ..skips import SkipReport, Unusable
from .folder import UnpackError
from .samples import Columns, Sample, caption_fields, id_text

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OWN_KEYS = ("id", "image", "caption", "captions")
_SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves in its folder
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class HuggingFaceSource:
    """One split of a dataset.

    A folder of `Dataset.save_to_disk` is read where it lies; anything else is streamed, so that
    nothing is copied or kept but what is being unpacked. Code of a dataset is never run.

    Args:
        source: a folder, or the name of a dataset on the hub.
        split: its name; None: the only one.
        subset: a dataset's configuration, where it has several.

    Raises ConfigError for a folder, split or column that is not there, UnpackError where `datasets`
    is missing or too old, or can not read it.
    """

    def __init__(
        self, source: str, columns: Columns, split: str | None = None, subset: str | None = None
    ) -> None:
        self.source, self.columns, self.report = source, columns, SkipReport()
        self.folder = Path(source).resolve() if Path(source).exists() else None
        if self.folder is None and not _HUB_NAME.fullmatch(source):
            raise ConfigError(
                f"SOURCE {source}: there is no such folder. Fix: a folder that is there, "
                "owner/name of a dataset on the hub, or shards whose names end in .tar"
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"SOURCE {source} is a file. Fix: name the folder that it lies in")
        try:
            self.dataset, digest, split, self.total = _open(
                source, self.folder, _package(), split, subset
            )
            there = _column_names(self.dataset)
        except (ConfigError, UnpackError):
            raise
        except Exception as error:  # each of its readers has errors of its own
            raise UnpackError(
                f"SOURCE {source} can not be read as a dataset: {error}\nFix: name a folder of "
                "Dataset.save_to_disk, of parquet files or of images, or a dataset on the hub; "
                "--subset where it has several"
            ) from error
        asked = [("--image-column", columns.image)]
        asked += [("--caption-column", name) for name in columns.captions]
        asked += [("--id-column", columns.id)] if columns.id is not None else []
        asked += [("--keep-column", name) for name in columns.keep]
        for argument, name in asked:
            if argument == "--keep-column" and name in _OWN_KEYS:
                raise ConfigError(
                    f"{argument} {name}: every line has its own {name}. Fix: leave it out, or name "
                    "it with --id-column or --caption-column"
                )
            if name not in there:
                raise ConfigError(
                    f"{argument} {name}: the dataset has no such column, only {', '.join(there)}"
                )
        self.wanted = list(dict.fromkeys(name for _, name in asked))
        self.identity: dict[str, Any] = {
            "SOURCE": digest,
            "--split": split,
            "--subset": subset,
            "--image-column": columns.image,
            "--caption-column": list(columns.captions),
            "--id-column": columns.id,
            "--keep-column": list(columns.keep),
        }

    def samples(self, start: int, state: Any) -> Iterator[Sample | Unusable]:
        rows = self.rows = self.dataset.select_columns(self.wanted).with_format("arrow")
        if state is not None:
            rows.load_state_dict(state)
        elif start:
            rows = rows.skip(start)
        number, rows = start, iter(rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network, a damaged file: no row behind it is reached
                raise UnpackError(
                    f"SOURCE {self.source} can not be read past row {number}: {error}\n"
                    "The same command goes on there"
                ) from error
            try:
                yield self._sample(row, number)
            except Unusable as skip:
                yield skip
            number += 1

    def state(self) -> Any:
        # A stream would read all rows again to come to a number; a dataset on the disk would not.
        return self.rows.state_dict() if hasattr(self.rows, "state_dict") else None

    def _sample(self, row: Any, number: int) -> Sample:
        name = f"row {number}"
        values = {}
        for column in self.wanted:
            try:
                values[column] = row[column][0].as_py()
            except UnicodeDecodeError:
                raise Unusable(f"{column} is not UTF-8", name) from None
        identity = str(number)
        if self.columns.id is not None:
            identity = id_text(values[self.columns.id], name)
        fields = caption_fields(values, self.columns.captions, name)
        kept = {key: values[key] for key in self.columns.keep}
        value = values[self.columns.image]
        if not isinstance(value, dict):
            value = {"bytes": value} if isinstance(value, bytes) else {"path": value}
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            image = partial(bytes, data)
        elif isinstance(path, str) and path:
            image = partial(self._read, path, name)
        else:
            raise Unusable("image is missing", name)
        stem = PurePosixPath(path.partition("::")[0]).stem if isinstance(path, str) else ""
        return Sample(name, stem, {**kept, "id": identity, **fields}, image)

    def _read(self, path: str, name: str) -> bytes:
        """A file of the dataset's own, also in a zip file of its; others are not ours to copy."""
        member, _, place = path.rpartition("::")  # "zip://cat.jpg::train.zip"
        if member and not member.startswith("zip://"):
            raise Unusable("image leaves the dataset", name)
        if self.folder is None:
            return self._read_from_hub(path, place, name)
        if Path(place).is_relative_to(self.folder):
            place = str(Path(place).relative_to(self.folder))
        file = inside(self.folder, place, name)
        if not file.is_file():
            raise Unusable("image is missing", name)
        if not member:
            return file.read_bytes()
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.read(member.removeprefix("zip://"))
        except (KeyError, zipfile.BadZipFile):
            raise Unusable("image is missing", name) from None

    def _read_from_hub(self, path: str, place: str, name: str) -> bytes:
        own = f"hf://datasets/{self.source}"
        if not place.startswith((f"{own}@", f"{own}/")):
            raise Unusable("image leaves the dataset", name)
        import fsspec

        try:
            opened: Any = fsspec.open(path, "rb")
            with opened as file:
                return file.read()
        except (FileNotFoundError, KeyError):  # KeyError: not in the zip file
            raise Unusable("image is missing", name) from None
        except Exception as error:  # the network: it may be there next time
            raise UnpackError(
                f"{path} can not be read ({error}). The same command goes on there"
            ) from error


def _package() -> Any:
    try:
        import datasets  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UnpackError(
            "reading a Hugging Face dataset needs the package `datasets`. Fix: pip install datasets"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise UnpackError(
            f"datasets {datasets.__version__} runs code that comes with a dataset. "
            "Fix: pip install 'datasets>=4'"
        )
    return datasets


def _open(
    source: str, folder: Path | None, datasets: Any, split: str | None, subset: str | None
) -> tuple[Any, str, str, int | None]:
    """One split, a digest of the dataset, the split's name and its number of rows if known."""
    if folder is not None and any((folder / file).is_file() for file in _SAVED):
        splits = datasets.load_from_disk(source)
        if not isinstance(splits, dict):
            splits = {str(splits.split or "train"): splits}  # what a folder's only split is called
        split = _only(splits, split)
        return splits[split], splits[split]._fingerprint, split, len(splits[split])
    builder = datasets.load_dataset_builder(source, subset)
    splits = builder.as_streaming_dataset()
    split = _only(splits, split)
    return splits[split], builder.hash, split, _rows_in(builder, split)


def _only(splits: dict[str, Any], split: str | None) -> str:
    """The split that is meant. Raises ConfigError."""
    there = [str(name) for name in splits]
    if split is None and len(there) > 1:
        raise ConfigError(f"the dataset has several splits. Fix: --split {' or '.join(there)}")
    if split is not None and split not in there:
        raise ConfigError(
            f"--split {split}: the dataset has no such split, only {', '.join(there)}"
        )
    return there[0] if split is None else split


def _column_names(dataset: Any) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset.with_format("arrow")), None)  # a stream may only know from a row
    return [] if first is None else list(first.column_names)


def _rows_in(builder: Any, split: str) -> int | None:
    """How many rows a stream has, where that is told or easily counted: only the bar needs it."""
    told = (builder.info.splits or {}).get(split)
    if told is not None and told.num_examples:
        return told.num_examples
    files = [str(name) for name in (builder.config.data_files or {}).get(split, [])]
    if files and all(Path(name).suffix == ".parquet" and Path(name).is_file() for name in files):
        from pyarrow import parquet  # pyrefly: ignore[missing-import]

        return sum(parquet.read_metadata(name).num_rows for name in files)
    return sum(Path(name).suffix.lower() in _IMAGES for name in files) or None

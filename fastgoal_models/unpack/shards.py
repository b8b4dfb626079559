"""Samples of webdataset shards: an image with a `.json`, a `.txt`, or both."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..caft.data import IMAGE_ENDINGS, json_object
from ..caft.shards import Piece, samples_in
from ..errors import ConfigError
from ..shard_names import shard_paths
from ..skips import SkipReport, Unusable
from .samples import Columns, Sample, caption_fields, id_text

_LOOKED_AT = 64  # samples whose keys are compared with those that are asked for


class ShardSource:
    """Plain tar files, "shards/part-*.tar" (`shard_paths`), in the order of their names.

    All headers are read at once, at the start: they tell how many samples there are, and whether
    these are the shards of the run that is gone on with. A `.txt` is the sample's `caption`, unless
    its JSON has one. Keys of the JSON that are not asked for are kept as they are.

    Args:
        on_shard: called with (shards looked at, shards).

    Raises ConfigError where a shard is missing, or no sample has a key that is asked for.
    """

    def __init__(
        self,
        pattern: str,
        columns: Columns,
        on_shard: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self.shards, self.columns = shard_paths(pattern, "SOURCE"), columns
        self.report, self.counts = SkipReport(), []
        digest = hashlib.sha256()
        for number, shard in enumerate(self.shards, start=1):
            self.counts.append(_look(shard, digest, self.report))
            on_shard(number, len(self.shards))
        self.total: int | None = sum(self.counts)
        self.identity: dict[str, Any] = {
            "SOURCE": digest.hexdigest()[:16],
            "--caption-column": list(columns.captions),
            "--id-column": columns.id,
        }
        self._check_keys()

    def samples(self, start: int, state: Any) -> Iterator[Sample | Unusable]:
        for shard, count in zip(self.shards, self.counts, strict=True):
            if start >= count:
                start -= count
                continue
            # What is broken was reported when the shards were looked at.
            for found in islice(samples_in(shard, SkipReport()), start, None):
                try:
                    yield self._sample(shard, *found)
                except Unusable as skip:
                    yield skip
            start = 0

    def state(self) -> None:
        return None  # a number is enough to find a sample

    def _sample(self, shard: Path, key: str, pieces: dict[str, Piece]) -> Sample:
        name = f"{shard.name}/{key}"
        ending = next((ending for ending in IMAGE_ENDINGS if ending in pieces), None)
        if ending is None:
            raise Unusable("sample has no image", name)
        values = _values(shard, pieces, name)
        fields = caption_fields(values, self.columns.captions, name)
        own = values.get(self.columns.id or "id")
        if own is None and self.columns.id is None:
            own = name  # as `read_glit_shards` calls it
        gone = {"id", "image", self.columns.id, *self.columns.captions, *fields}
        rest = {key: value for key, value in values.items() if key not in gone}
        return Sample(
            name,
            key.rpartition("/")[2],
            {"id": id_text(own, name), **fields, **rest},
            partial(pieces[ending].read, shard),
        )

    def _check_keys(self) -> None:
        """A key that is misspelt should not cost a whole run."""
        known: dict[str, None] = {}
        every = ((s, *found) for s in self.shards for found in samples_in(s, SkipReport()))
        for shard, key, pieces in islice(every, _LOOKED_AT):
            try:
                known |= dict.fromkeys(_values(shard, pieces, key))
            except Unusable:
                continue
        asked = {"--caption-column": self.columns.captions, "--id-column": (self.columns.id,)}
        for argument, keys in asked.items():
            for key in keys:
                if known and key is not None and key not in known:
                    raise ConfigError(
                        f"{argument} {key}: the first samples do not have it, only "
                        f"{', '.join(known)}. Fix: name one of those"
                    )


def _values(shard: Path, pieces: dict[str, Piece], name: str) -> dict[str, Any]:
    """What a sample's JSON and text say. Raises Unusable."""
    values = json_object(pieces["json"].read(shard), name) if "json" in pieces else {}
    if "txt" in pieces and values.get("caption") is None:
        try:
            values["caption"] = pieces["txt"].read(shard).decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8", name) from None
    return values


def _look(shard: Path, digest: Any, report: SkipReport) -> int:
    """Count a shard's samples; the digest takes its files' headers: name, size, time, checksum."""
    count = 0
    digest.update(shard.name.encode("utf-8", "surrogateescape"))
    with shard.open("rb") as file:
        for _, pieces in samples_in(shard, report):
            count += 1
            for piece in pieces.values():
                file.seek(piece.offset - tarfile.BLOCKSIZE)  # it stands right before the contents
                digest.update(file.read(tarfile.BLOCKSIZE))
    return count

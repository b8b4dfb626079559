"""What is unpacked: a picture's bytes and what is told of it, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..glit import says_something
from ..skips import SkipReport, Unusable


class Sample(NamedTuple):
    """One picture with its captions."""

    name: str
    """what reports call it"""
    stem: str
    """what its authors call the picture's file, without the ending; any text"""
    row: dict[str, Any]
    """its line without the image; there is an `id`"""
    image: Callable[[], bytes]
    """the picture's file; raises Unusable"""


class Source(Protocol):
    """Samples in an order that is always the same, so that a run can go on in the middle."""

    identity: dict[str, Any]
    """what decides the samples, by the argument that says so"""
    report: SkipReport
    """what was found broken beforehand"""
    total: int | None
    """samples, usable or not, if that is known"""

    def samples(self, start: int, state: Any) -> Iterator[Sample | Unusable]:
        """Those behind the first `start`; `state` is what `state()` was there, or None."""
        ...

    def state(self) -> Any:
        """Helps to go on quickly behind the sample that was given last; JSON holds it."""
        ...


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset, or keys of a shard's JSON, mean what."""

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    id: str | None = None
    keep: tuple[str, ...] = ()


def caption_fields(values: Mapping[str, Any], keys: Sequence[str], name: str) -> dict[str, Any]:
    """`caption`, and `captions` where there are several: the texts of the keys, as they are.

    A value is a text, a list of texts, or None. Raises Unusable.
    """
    texts: list[Any] = []
    for key in keys:
        value = values.get(key)
        texts += value if isinstance(value, list) else [value]
    texts = [text for text in texts if text is not None]
    if not texts:
        raise Unusable("caption is missing", name)
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("caption is not text", name)
    # What `fastgoal prepare` would call empty is, too.
    kept = [text for text in texts if says_something(text)]
    if not kept:
        raise Unusable("caption is empty", name)
    return {"caption": kept[0]} | ({"captions": kept} if len(kept) > 1 else {})


def id_text(value: Any, name: str) -> str:
    """An id as text. Raises Unusable for what is neither text nor a whole number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise Unusable("id is not text", name)
    return str(value)

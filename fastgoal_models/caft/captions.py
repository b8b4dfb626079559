"""CAFT's captions of an image: parts that make up a long caption in order, and some extra ones.

Of K = 8 captions the first four are the *parts*: one long caption's sentences, cut into four pieces
that keep their order. The other four are *extras*: pieces of one to three sentences out of the
image's other captions. Everything is a function of the captions and of a `random.Random`.

A caption is a list of sentences here; `split_published` and `split_sentences` make them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

PARTS, EXTRAS = 4, 4
_MOST_MERGED = 3  # sentences in a piece
_LONG_ENOUGH = 3  # sentences of a caption that is worth parting
_MOST_GATHERED = 8  # sentences taken from all captions where none is long enough
_SHORTEST_PIECE = 3  # characters of a sentence that the published shards keep
_CUTS = re.compile(r"\n|</s>|\.")

Caption = Sequence[str]
"""the sentences of one caption, in order"""


def split_published(caption: str) -> list[str]:
    """The published splitter: cuts at every newline, `</s>` and full stop, which it drops.

    Decimals and abbreviations are cut, too; pieces under three characters are left out.
    """
    pieces = (piece.strip() for piece in _CUTS.split(caption))
    return [piece for piece in pieces if len(piece) >= _SHORTEST_PIECE]


def merge_published(sentences: Caption) -> str:
    """How the published code joins what `split_published` cut."""
    return ". ".join(sentences) + "."


def merge(sentences: Caption) -> str:
    """How sentences that kept their full stops are joined."""
    return " ".join(sentences)


Merge = Callable[[Caption], str]


def partition_sizes(sentences: int, parts: int, rng: random.Random) -> list[int]:
    """Sizes of 1 to 3 that part `sentences` in order, at random, all such partitions alike.

    What parts of three sentences each can not hold is left over at the end. Needs at least as many
    sentences as parts.
    """
    kept = min(sentences, _MOST_MERGED * parts)
    sizes = []
    for later in reversed(range(parts)):  # parts still to come after this one
        fitting = [
            size
            for size in range(1, _MOST_MERGED + 1)
            if later <= kept - size <= _MOST_MERGED * later
        ]
        weights = [_partitions(kept - size, later) for size in fitting]
        sizes.append(rng.choices(fitting, weights)[0])
        kept -= sizes[-1]
    return sizes


def _partitions(sentences: int, parts: int) -> int:
    """In how many ways `sentences` can be parted into pieces of 1 to 3."""
    ways = [1] + [0] * sentences
    for _ in range(parts):
        ways = [
            sum(ways[total - size] for size in range(1, _MOST_MERGED + 1) if size <= total)
            for total in range(sentences + 1)
        ]
    return ways[sentences]


def training_parts(
    caption: Caption, rng: random.Random, parts: int = PARTS, join: Merge = merge
) -> list[str]:
    """A caption as `parts` pieces in order, of 1 to 3 sentences at random.

    Fewer sentences than parts: each is a part, and some at random are repeated, still in order.
    Sentences past three a part are left out.

    Raises ValueError for a caption without a sentence.
    """
    _require(caption)
    count = len(caption)
    if count < parts:
        places = sorted([*range(count), *rng.choices(range(count), k=parts - count)])
        return [join([caption[place]]) for place in places]
    return _cut(caption, partition_sizes(count, parts, rng), join)


def evaluation_parts(caption: Caption, parts: int = PARTS, join: Merge = merge) -> list[str]:
    """A caption as `parts` pieces in order, as even as can be; the earlier ones are the longer.

    Fewer sentences than parts: they are repeated in order. More than three a part: each part has
    three, the last one all the rest, so that no sentence is left out.

    Raises ValueError for a caption without a sentence.
    """
    _require(caption)
    count = len(caption)
    if count < parts:
        return [join([caption[place % count]]) for place in range(parts)]
    if count > _MOST_MERGED * parts:
        sizes = [_MOST_MERGED] * (parts - 1)
        sizes.append(count - sum(sizes))
    else:
        even, more = divmod(count, parts)
        sizes = [even + (part < more) for part in range(parts)]
    return _cut(caption, sizes, join)


def _require(caption: Caption) -> None:
    if not caption:
        raise ValueError("caption has no sentences: there is nothing to part")


def _cut(caption: Caption, sizes: Sequence[int], join: Merge) -> list[str]:
    pieces, first = [], 0
    for size in sizes:
        pieces.append(join(caption[first : first + size]))
        first += size
    return pieces


def training_captions(
    captions: Mapping[str, Caption],
    rng: random.Random,
    *,
    parts: int = PARTS,
    extras: int = EXTRAS,
    join: Merge = merge,
) -> list[str]:
    """The K captions of an image for one training step: parts, then extras.

    The parts come from one caption of three or more sentences, drawn from those whose name begins
    with "long"; where there is none, from up to eight sentences drawn from all captions, in order.
    Extras are runs of 1 to 3 sentences of the other captions, or of the same one where an image has
    no other.

    Args:
        captions: the sentences of each caption by its name, e.g. "raw", "longIB", "shortSV".
        rng: draws everything.
        parts, extras: how many of each; K is their sum.
        join: makes a text of sentences.

    Raises:
        ValueError: no caption has a sentence.
    """
    usable = {name: list(sentences) for name, sentences in captions.items() if sentences}
    if not usable:
        raise ValueError("captions hold no sentence: there is nothing to train on")
    long = [
        name
        for name, sentences in usable.items()
        if name.startswith("long") and len(sentences) >= _LONG_ENOUGH
    ]
    chosen = rng.choice(long) if long else None
    if chosen is not None:
        source: Caption = usable[chosen]
    else:
        everything = [sentence for sentences in usable.values() for sentence in sentences]
        places = sorted(rng.sample(range(len(everything)), min(len(everything), _MOST_GATHERED)))
        source = [everything[place] for place in places]
    others = [sentences for name, sentences in usable.items() if name != chosen] or [source]
    found = training_parts(source, rng, parts, join)
    for _ in range(extras):
        sentences = rng.choice(others)
        size = rng.randint(1, min(_MOST_MERGED, len(sentences)))
        first = rng.randint(0, len(sentences) - size)
        found.append(join(sentences[first : first + size]))
    return found

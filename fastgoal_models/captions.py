"""Sentences of a caption and where their tokens lie, found once when data are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

# Cuts are made only at whitespace that CLIP's tokenizer also takes for whitespace; it deletes these
# control characters, which Python counts as spaces, and so would join what they part.
_SPACE = r"[^\S\x0b\x1c-\x1f]"
_CLOSING = "\"'”’»)\\]}*_"
_OPENING = "\"'“‘«(\\[{*_#•–—-"

# A run of sentence ends with whatever closes around it, then the space at which to cut.
# A quote that stands alone closes what came before it.
_STOP = re.compile(rf"(?<![.!?…])([.!?…]+)((?:{_SPACE}*[{_CLOSING}])*)({_SPACE}+)")
_LINE_BREAK = re.compile(rf"\n{_SPACE}*")
_NEXT_WORD = re.compile(rf"[{_OPENING}]*(\w*)")
_INITIALS = re.compile(r"[^\W\d_](\.[^\W\d_])*")
_BRACKETS_AND_QUOTES = "\"'“‘”’«»()[]{}*_"

# End a sentence only where the next word could not go on with them.
_ABBREVIATIONS = frozenset(
    "mr mrs ms mx dr prof st mt ft gen col capt cmdr lt sgt rev hon sen rep gov pres messrs "
    "no nos fig figs vol vols pp cf vs approx ca circa est e.g i.e eg ie al www "
    "jr sr inc ltd co corp bros dept ave blvd rd sq bldg etc a.m p.m pm yd mi cm mm km "
    "oz lb lbs kg hr hrs mins secs jan feb apr jun jul aug sep sept oct nov dec "
    "u.s u.k u.s.a d.c b.c a.d ph.d".split()
)  # fmt: skip
# Words that open sentences and hardly ever follow an abbreviation or an initial ("the U.S. The").
_OPENERS = frozenset(
    "a an the this that these those it its he she they we you i his her their our there here "
    "in on at to by of for from with under above behind beside between below near next around "
    "and but or so as if when while although though both each all some many most several two "
    "three four five one another other others not also however".split()
)  # fmt: skip
_DOMAINS = frozenset(["com", "org", "net", "gov", "edu"])


def split_sentences(caption: str) -> list[str]:
    """The sentences of a caption, in order: substrings that leave out nothing but whitespace.

    Cuts after `.`, `!`, `?` and `…` (with the quotes and brackets that close there) and at line
    breaks that are not mere wrapping; not within decimals, after titles and abbreviations, after
    initials, or where a sentence visibly goes on. A piece without a letter or digit stays with its
    neighbour. An empty caption has no sentences.
    """
    cuts = {0, len(caption)}
    cuts |= {stop.end() for stop in _STOP.finditer(caption) if _ends_sentence(caption, stop)}
    cuts |= {gap.end() for gap in _LINE_BREAK.finditer(caption) if _ends_line(caption, gap)}
    sentences: list[str] = []
    held = ""  # a piece that says nothing itself, waiting for the first that does
    for start, end in pairwise(sorted(cuts)):
        piece = caption[start:end]
        if any(c.isalnum() for c in piece):
            sentences.append(held + piece)
            held = ""
        elif sentences:
            sentences[-1] += piece
        else:
            held += piece
    if held:
        sentences.append(held)
    return [kept for kept in (sentence.strip() for sentence in sentences) if kept]


def _ends_sentence(caption: str, stop: re.Match[str]) -> bool:
    marks, closing, _ = stop.groups()
    if stop.end() == len(caption):
        return False  # the caption ends here anyhow
    following = _NEXT_WORD.match(caption, stop.end())
    assert following is not None  # it matches the empty string
    next_word = following[1]
    goes_on = next_word[:1].islower()
    if marks != "." or closing:
        return not goes_on
    # Enough for any abbreviation, and no more: a caption can be one endless word.
    before = caption[max(stop.start() - 40, 0) : stop.start()].split()
    word = before[-1].strip(_BRACKETS_AND_QUOTES).lower() if before else ""
    if word in _ABBREVIATIONS or _INITIALS.fullmatch(word):
        return next_word.lower() in _OPENERS and not goes_on
    if word.isdigit() and _opens_line(caption, stop.start() - len(word)):
        return False  # "1. A cat": the number of an item
    if goes_on:  # writers in a hurry start sentences small; web addresses are parted by mistake
        return len(word) > 1 and word.isalpha() and next_word not in _DOMAINS
    return True


def _opens_line(caption: str, at: int) -> bool:
    line = caption[:at].rpartition("\n")[2]
    return not line.strip()


def _ends_line(caption: str, gap: re.Match[str]) -> bool:
    """A blank line always parts; a single break unless the next line goes on in lower case."""
    if gap[0].count("\n") > 1:
        return True
    return not caption[gap.end() : gap.end() + 1].islower()


class TokenizedCaption(NamedTuple):
    """A caption as the text tower reads it. Positions count the start token, which is 0."""

    tokens: Tensor
    """(L,) int64: start token, words, end token, zeros"""
    length: int
    """tokens with start and end, at most L"""
    spans: list[tuple[int, int]]
    """half-open token range of each sentence, clipped to the words that fit; empty past them"""
    truncated: bool
    """whether words were cut off"""


def tokenize_caption(
    sentences: Sequence[str],
    tokenizer: SimpleTokenizer,
    context_length: int,
    *,
    caption: str | None = None,
) -> TokenizedCaption:
    """Tokenise a caption whole and say where its sentences lie.

    `tokens` are exactly what `tokenizer(caption)` gives. `caption` is what the sentences are cut
    from (they must be all of it but whitespace); by default the sentences joined by spaces.
    """
    words = sentence_tokens(
        " ".join(sentences) if caption is None else caption, sentences, tokenizer
    )
    room = context_length - 2
    spans = [(min(start, room + 1), min(end, room + 1)) for start, end in token_spans(words)]
    flat = [token for sentence in words for token in sentence]
    row = pack_row(flat, tokenizer, context_length)
    return TokenizedCaption(row, min(len(flat), room) + 2, spans, truncated=len(flat) > room)


def token_spans(words: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The half-open token range of each sentence of `sentence_tokens`, cut at no context.

    The start token is 0.
    """
    return list(pairwise(accumulate(map(len, words), initial=1)))


def sentence_tokens(
    caption: str, sentences: Sequence[str], tokenizer: SimpleTokenizer
) -> list[list[int]]:
    """The caption's tokens, encoded once, dealt out to its sentences; no start and end tokens.

    Byte-pair merges never cross whitespace and every other character belongs to a token, so the
    words of a sentence end where a token ends. The caption is cleaned as one text: what `ftfy`
    repairs can depend on the whole line, so that cleaning sentences alone would not always give
    the caption's tokens.
    """
    tokens = tokenizer.encode(caption)
    words = tokenizer.clean_fn(caption).split()
    counts = [len(tokenizer.clean_fn(sentence).split()) for sentence in sentences]
    last_words = [min(count, len(words)) for count in accumulate(counts)]
    if last_words:
        last_words[-1] = len(words)
    word_ends = [0, *accumulate(len(word.encode()) for word in words)]
    token_at = {0: 0}
    read = 0
    for index, token in enumerate(tokens, start=1):
        # A byte of text is one character of a token's name, whose word end is marked "</w>".
        read += len(tokenizer.decoder[token].removesuffix("</w>"))
        token_at[read] = index
    ends = [token_at[word_ends[last]] for last in last_words]
    return [tokens[start:end] for start, end in pairwise([0, *ends])]


def pack_row(words: Sequence[int], tokenizer: SimpleTokenizer, context_length: int) -> Tensor:
    """Start token, as many words as fit, end token, zeros: (context_length,) int64."""
    row = torch.zeros(context_length, dtype=torch.long)
    kept = [tokenizer.sot_token_id, *words[: context_length - 2], tokenizer.eot_token_id]
    row[: len(kept)] = torch.tensor(kept)
    return row

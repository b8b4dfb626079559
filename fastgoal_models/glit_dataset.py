"""GLIT records with local pairs as a training step needs them: tokens, pictures, regions."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip import SimpleTokenizer
from PIL import Image
from torch.utils.data import Dataset

from .captions import pack_row, sentence_tokens
from .errors import ConfigError, GlitError
from .fast_goal import FastGoalBatch
from .glit import GlitRecord, LocalPair
from .pictures import crop_region, image_tensor, load_image
from .preprocessing import CLIP_NORMALISATION, Normalisation

PAIR_SAMPLINGS = ("best", "uniform", "weighted")
LONG_CAPTIONS = ("cut", "chunk")


class FastGoalDataset(Dataset[FastGoalBatch]):
    """Records with local pairs as what a training step needs, one picture at a time.

    Captions are tokenised once, here. An item's local pair is the record's best one whose sentence
    has words within the context (its best one where none has), or with `sampling` one that is drawn
    anew each epoch. Pictures and regions are squashed to S × S (`image_tensor`), without any
    augmentation, so that an item is always the same. `dataset[i]` is a FastGoalBatch without the
    batch axis, of the best pair; `dataset.at(epoch, i)` is that of the drawn one, and the same
    whenever it is asked for. Give `collate` to a DataLoader.

    Args:
        records: each with at least one local pair.
        tokenizer: CLIP's; of any context.
        image_size: S.
        context_length: L, the tokens of a text, start and end included.
        normalisation: of the pictures; the model's own.
        sampling: "best"; or one of the `top_k` best pairs, "uniform" each as often, "weighted" as
            often as its score is high (one that is not above 0 never, unless all are).
        top_k: pairs to draw from; fewer where a record has fewer within the context.
        seed: of the draws, which depend on it, the epoch and the item's number alone.
        long_captions: "cut" keeps of a caption what fits. "chunk" makes an item of each run of
            whole sentences that fits, as long as possible, with the pairs of those sentences; runs
            without a pair are left out. Items of one record have the same picture: a loss takes
            them for negatives of each other where they meet in a batch.
        load: a record's picture, upright and RGB, where it is not in the file `record.image`.

    Attributes, besides the arguments: `records` and `pairs`, the record and the best pair of each
    item; `truncated`, the items that lose the end of their text, of which a warning tells; `long`,
    the captions that run past the context; `left_out`, the runs without a pair; `single`, the items
    with only one pair to draw from.

    Raises GlitError for no records, or for records without pairs; ConfigError for a `sampling`,
    `top_k` or `long_captions` that is not one of the above.
    """

    def __init__(
        self,
        records: Sequence[GlitRecord],
        tokenizer: SimpleTokenizer,
        image_size: int,
        context_length: int = 248,
        normalisation: Normalisation = CLIP_NORMALISATION,
        *,
        sampling: str = "best",
        top_k: int = 3,
        seed: int = 0,
        long_captions: str = "cut",
        load: Callable[[Any], Image.Image] | None = None,
    ) -> None:
        if sampling not in PAIR_SAMPLINGS:
            raise ConfigError(f"--pairs must be one of {PAIR_SAMPLINGS}; got {sampling!r}")
        if long_captions not in LONG_CAPTIONS:
            raise ConfigError(
                f"--long-captions must be one of {LONG_CAPTIONS}; got {long_captions!r}"
            )
        if top_k < 1:
            raise ConfigError(f"--top-k must be at least 1; got {top_k}")
        if not records:
            raise GlitError("there are no records to train on")
        unmatched = [record.id for record in records if not record.pairs]
        if unmatched:
            raise GlitError(
                f"{len(unmatched)} of {len(records)} records have no local pair "
                f"({', '.join(unmatched[:3])}{', …' if len(unmatched) > 3 else ''}). "
                "Fix: run fastgoal_models.match_pairs on them first"
            )
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.context_length = context_length
        self.normalisation = normalisation
        self.sampling, self.seed = sampling, seed
        self._load = load
        room = context_length - 2
        kept = 1 if sampling == "best" else top_k
        tokens: list[int] = []
        starts = [0]
        self.records: list[GlitRecord] = []
        self._choices: list[list[_Choice]] = []
        self.long = self.left_out = 0
        for record in records:
            words = sentence_tokens(record.caption, record.sentences, tokenizer)
            ends = np.cumsum([0, *map(len, words)]).tolist()
            self.long += ends[-1] > room
            runs = [(0, len(words))]
            if long_captions == "chunk":
                runs = _runs_that_fit([len(sentence) for sentence in words], room)
            for first, last in runs:
                choices = _choices(record.pairs, ends, first, last, room)
                if not choices:
                    self.left_out += 1
                    continue
                self.records.append(record)
                self._choices.append(choices[:kept])
                tokens.extend(token for sentence in words[first:last] for token in sentence)
                starts.append(len(tokens))
        self.pairs: list[LocalPair] = [choices[0].pair for choices in self._choices]
        self.single = sum(len(choices) == 1 for choices in self._choices)
        # One flat tensor: workers share it, and a hundred thousand captions take 50 MB.
        self._tokens = torch.tensor(tokens, dtype=torch.int32)
        self._starts = starts
        self.truncated = int((np.diff(starts) > room).sum())
        if self.truncated:
            what = "captions" if long_captions == "cut" else "runs of sentences"
            warnings.warn(
                f"{self.truncated} of {len(self)} {what} are longer than {context_length} "
                "tokens and lose their end",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> FastGoalBatch:
        return self._item(index, self._choices[index][0])

    def at(self, epoch: int, index: int) -> FastGoalBatch:
        """Item `index` with the pair that was drawn for it in `epoch`."""
        return self._item(index, self._choices[index][self._drawn(epoch, index)])

    def _drawn(self, epoch: int, index: int) -> int:
        choices = self._choices[index]
        if len(choices) == 1:
            return 0
        # Mixed through a string, so that neighbouring seeds, epochs and items share nothing.
        generator = random.Random(f"pair/{self.seed}/{epoch}/{index}")
        scores = [choice.pair.score for choice in choices]
        weights = [score if 0 < score < math.inf else 0.0 for score in scores]
        if self.sampling == "uniform" or not any(weights):
            return generator.randrange(len(choices))
        return generator.choices(range(len(choices)), weights)[0]

    def _item(self, index: int, choice: _Choice) -> FastGoalBatch:
        record, (pair, start, end) = self.records[index], choice
        words = self._tokens[self._starts[index] : self._starts[index + 1]].tolist()
        room = self.context_length - 2
        image = load_image(record.image) if self._load is None else self._load(record)
        local = crop_region(image, pair.box)
        return FastGoalBatch(
            images=image_tensor(image, self.image_size, *self.normalisation),
            texts=pack_row(words, self.tokenizer, self.context_length),
            local_images=image_tensor(local, self.image_size, *self.normalisation),
            local_texts=pack_row(words[start:end], self.tokenizer, self.context_length),
            boxes=torch.tensor(pair.box, dtype=torch.float32),
            image_sizes=torch.tensor((record.width, record.height)),
            spans=torch.tensor((min(start, room) + 1, min(end, room) + 1)),
            lengths=torch.tensor(min(len(words), room) + 2),
        )


class _Choice(NamedTuple):
    """A pair that an item can have."""

    pair: LocalPair
    start: int
    """of the sentence's tokens within the item's"""
    end: int


def _choices(
    pairs: Sequence[LocalPair], ends: Sequence[int], first: int, last: int, room: int
) -> list[_Choice]:
    """The pairs of sentences first ... last − 1 that have words in the first `room` of theirs.

    The best one where none has; an empty list where the sentences have no pair.
    """
    begin = ends[first]
    choices = [
        _Choice(pair, ends[pair.sentence] - begin, ends[pair.sentence + 1] - begin)
        for pair in pairs
        if first <= pair.sentence < last
    ]
    fitting = [choice for choice in choices if choice.start < min(choice.end, room)]
    return fitting or choices[:1]


def _runs_that_fit(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Sentences of these many tokens as half-open runs of at most `room`, each as long as it can.

    A sentence that alone is longer is a run of its own.
    """
    runs, first, used = [], 0, 0
    for number, length in enumerate(lengths):
        if used + length > room and number > first:
            runs.append((first, number))
            first, used = number, 0
        used += length
    return [*runs, (first, len(lengths))]


def collate(items: Sequence[FastGoalBatch]) -> FastGoalBatch:
    """Items of a FastGoalDataset as one batch."""
    return FastGoalBatch(*(torch.stack(parts) for parts in zip(*items, strict=True)))

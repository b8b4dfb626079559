"""Parts and extras: in order, of the right sizes, nothing lost, a function of the seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgoal_models.caft.captions import (
    evaluation_parts,
    merge_published,
    partition_sizes,
    split_published,
    training_captions,
    training_parts,
)
from fastgoal_models.captions import split_sentences

CAPTIONS = Path(__file__).resolve().parents[4] / "shared" / "data" / "captions"


def numbered(count: int) -> list[str]:
    return [f"s{n}." for n in range(count)]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 999))
def test_training_parts_keep_the_order_and_are_of_one_to_three(count, parts, seed):
    found = training_parts(numbered(count), random.Random(seed), parts)
    assert len(found) == parts
    pieces = [piece.split() for piece in found]
    flat = [word for piece in pieces for word in piece]
    if count >= parts:
        assert flat == numbered(min(count, 3 * parts))
        assert all(1 <= len(piece) <= 3 for piece in pieces)
    else:
        assert flat == sorted(flat, key=numbered(count).index)
        assert set(flat) == set(numbered(count))
    assert found == training_parts(numbered(count), random.Random(seed), parts)


def test_every_partition_is_as_likely():
    rng = random.Random(0)
    counts = Counter(tuple(partition_sizes(6, 4, rng)) for _ in range(4000))
    assert len(counts) == 10  # 6 = four sizes of 1 to 3: one 3 (4 ways), two 2 (6 ways)
    assert min(counts.values()) > 300 and max(counts.values()) < 500


@given(st.integers(1, 30), st.integers(1, 5))
def test_evaluation_parts_are_even_and_lose_nothing(count, parts):
    pieces = [piece.split() for piece in evaluation_parts(numbered(count), parts)]
    sizes = [len(piece) for piece in pieces]
    flat = [word for piece in pieces for word in piece]
    if count < parts:
        assert flat == [f"s{n % count}." for n in range(parts)]
        return
    assert flat == numbered(count)
    if count <= 3 * parts:
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    else:
        assert sizes[:-1] == [3] * (parts - 1)


def test_published_splitting_cuts_decimals_and_drops_crumbs():
    pieces = split_published("A 3.5 m wall. It is red.</s>Two cats\nsit. a.")
    assert pieces == ["A 3", "5 m wall", "It is red", "Two cats", "sit"]
    assert merge_published(pieces[2:]) == "It is red. Two cats. sit."


def test_parts_come_from_a_long_caption_and_extras_from_the_others():
    captions = {
        "raw": ["r0.", "r1."],
        "longIB": [f"l{n}." for n in range(7)],
        "longSV": ["too.", "short."],
        "shortSV": ["q0."],
    }
    for seed in range(50):
        found = training_captions(captions, random.Random(seed))
        assert len(found) == 8
        assert " ".join(found[:4]).split() == captions["longIB"]
        for extra in found[4:]:
            assert extra.split()[0][0] in "rqts" and 1 <= len(extra.split()) <= 3


def test_without_a_long_caption_up_to_eight_sentences_are_gathered_in_order():
    captions = {"raw": numbered(20), "short": ["q."]}
    everything = [*numbered(20), "q."]
    for seed in range(20):
        flat = " ".join(training_captions(captions, random.Random(seed))[:4]).split()
        assert len(flat) == 8 and flat == sorted(flat, key=everything.index)
    only = training_captions({"caption": ["one.", "two."]}, random.Random(0))
    assert len(only) == 8 and set(" ".join(only).split()) <= {"one.", "two."}


def test_nothing_to_say_is_an_error():
    with pytest.raises(ValueError, match="no sentences"):
        evaluation_parts([])
    with pytest.raises(ValueError, match="hold no sentence"):
        training_captions({"raw": []}, random.Random(0))


@pytest.mark.skipif(not CAPTIONS.is_dir(), reason="the real captions are not here")
@pytest.mark.parametrize("name", ["urban1k_test", "dci_test", "docci_test"])
def test_real_captions_part_without_loss(name):
    rows = json.loads((CAPTIONS / f"{name}.json").read_text())
    parted = 0
    for text in (row["caption"] for row in rows):
        sentences = split_sentences(text)
        if len(sentences) >= 4:
            assert " ".join(evaluation_parts(sentences)).split() == text.split()
            parted += 1
    assert parted > 0.5 * len(rows)

"""Recall@K: by hand on small matrices, and alike however it is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgoal_kernels import maxsim_scores, pack_tokens
from fastgoal_kernels.functional import token_blocks
from fastgoal_models import retrieval
from fastgoal_models.retrieval import (
    Ranks,
    feature_recall,
    first_right_ranks,
    maxsim_recall,
    recall_at_k,
)

NAN = float("nan")


def test_ranks_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2],  # right and best
            [0.9, 0.1, 0.2],  # right and last
            [0.5, 0.5, 0.2],  # a tie counts against: second
            [0.5, 0.5, 0.5],  # all alike: last
            [0.1, 0.9, 0.8],  # two right ones: the better one counts
        ]
    )
    right = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]]).bool()
    assert first_right_ranks(scores, right).tolist() == [1, 3, 2, 3, 2]


def test_nan_never_helps():
    scores = torch.tensor([[NAN, 0.1], [0.3, NAN], [NAN, NAN], [0.5, NAN]])
    right = torch.tensor([[True, False], [True, False], [True, False], [True, True]])
    # Wrong or right, a NaN stands before the right answer; the last row's other answer is right.
    assert first_right_ranks(scores, right).tolist() == [2, 2, 2, 1]


def test_minus_infinity_is_an_ordinary_score():
    scores = torch.tensor([[-torch.inf, -torch.inf, -1.0]])
    assert first_right_ranks(scores, torch.tensor([[True, False, False]])).tolist() == [3]


def test_bad_ranks_input():
    with pytest.raises(ValueError, match=r"queries \[1\] have none"):
        first_right_ranks(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="both have shape"):
        first_right_ranks(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))


def test_both_directions_by_hand():
    scores = torch.tensor(
        [  # texts:  a    b    c
            [0.9, 0.8, 0.1],
            [0.2, 0.7, 0.6],
            [0.3, 0.1, 0.5],
        ]
    )
    found = recall_at_k(scores, ks=(1, 2))
    # texts: a first, b second (0.8 beats 0.7), c second; images: first, first, first
    assert found.text_to_image == {1: pytest.approx(1 / 3), 2: 1.0}
    assert found.image_to_text == {1: 1.0, 2: 1.0}
    assert (found.num_texts, found.num_images) == (3, 3)


def test_several_captions_and_a_picture_without_any():
    """Texts 0 and 1 tell of picture 0, text 2 of picture 1; picture 2 only distracts."""
    scores = torch.tensor([[0.1, 0.9, 0.8], [0.3, 0.2, 0.7], [0.5, 0.1, 0.2]])
    found = recall_at_k(scores, ks=(1, 2), text_image=torch.tensor([0, 0, 1]))
    # text 0: its picture's 0.1 is behind 0.5 and 0.3; text 1: first; text 2: 0.7 behind 0.8
    assert found.text_to_image == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    # picture 0: text 1 is first; picture 1: text 2 is first; picture 2 asks nothing
    assert found.image_to_text == {1: 1.0, 2: 1.0}
    assert (found.num_texts, found.num_images) == (3, 2)


def test_a_collapsed_model_recalls_nothing():
    found = recall_at_k(torch.ones(10, 10), ks=(1, 5, 10))
    assert found.text_to_image == found.image_to_text == {1: 0.0, 5: 0.0, 10: 1.0}


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_chunks_change_nothing(chunk):
    """Small whole numbers, whose products are exact in float32: equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    images = corners[torch.randint(4, (5,), generator=generator)]
    texts = corners[torch.randint(4, (13,), generator=generator)]
    owner = torch.randint(4, (13,), generator=generator)  # picture 4 owns none
    whole = recall_at_k(images @ texts.T / 4, ks=(1, 2, 5), text_image=owner)
    assert feature_recall(images, texts, ks=(1, 2, 5), text_image=owner, chunk=chunk) == whole


@given(
    seed=st.integers(0, 2**31), num_images=st.integers(1, 9), num_texts=st.integers(0, 12),
    direction=st.sampled_from(["text_to_image", "image_to_text"]), ragged=st.booleans(),
    ks=st.lists(st.integers(1, 6), max_size=3),
)  # fmt: skip
def test_recall_of_maxsim_needs_no_score_matrix(seed, num_images, num_texts, direction, ragged, ks):
    """Few distinct scores, exact in float32, so that ties fall at every cut-off; some are NaN."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 2, (num_images, 3, 2), generator=generator).float()
    words = torch.randint(0, 2, (num_texts, 4, 2), generator=generator).float()
    words[torch.rand(num_texts, generator=generator) < 0.2] = NAN
    mask = torch.rand(num_texts, 4, generator=generator) < 0.7
    owner = torch.randint(num_images, (num_texts,), generator=generator)
    options = {"direction": direction, "reduction": "sum"}
    whole = recall_at_k(
        maxsim_scores(patches, words, text_mask=mask, **options), ks, text_image=owner
    )
    layout = {"text_mask": mask}
    if ragged:
        words, offsets, longest = pack_tokens(words, mask)
        layout = {"text_offsets": offsets, "max_text_tokens": longest}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(token_blocks, "_BLOCK_ITEMS", 2)
        assert maxsim_recall(patches, words, ks, text_image=owner, **layout, **options) == whole


def test_maxsim_of_a_collapsed_model_recalls_nothing():
    found = maxsim_recall(torch.ones(10, 3, 2), torch.ones(10, 4, 2), ks=(1, 5, 10))
    assert found.text_to_image == found.image_to_text == {1: 0.0, 5: 0.0, 10: 1.0}


def test_maxsim_recall_names_what_does_not_fit():
    with pytest.raises(ValueError, match="2 images, 3 texts: pass text_image"):
        maxsim_recall(torch.ones(2, 3, 2), torch.ones(6, 2), text_offsets=torch.arange(4) * 2)
    with pytest.raises(ValueError, match="direction must be one of"):
        maxsim_recall(torch.ones(2, 3, 2), torch.ones(2, 3, 2), direction="both")


@pytest.mark.parametrize(
    "owner, message",
    [
        (None, "pass text_image"),
        (torch.tensor([0, 1]), r"\(3,\) integers"),
        (torch.tensor([0.0, 1.0, 1.0]), "integers"),
        (torch.tensor([0, 1, 2]), r"\[0, 2\)"),
        (torch.tensor([0, -1, 1]), r"\[0, 2\)"),
    ],
)
def test_bad_owners(owner, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(torch.zeros(2, 3), text_image=owner)


def test_intervals_bring_an_images_texts_along():
    # Ten images with two texts each; both texts of an image are found, or neither.
    owner = torch.arange(10).repeat_interleave(2)
    ranks = torch.where(owner < 5, 1, 9)
    found = Ranks(ranks, torch.tensor([1] * 9 + [3]), owner, torch.arange(10))
    assert found.recall((1, 5)).text_to_image == {1: 0.5, 5: 0.5}
    intervals = found.intervals((1, 10), samples=4000)
    # Of ten draws between five and five: binomial, whose 95 % lie in 2 ... 8 of 10.
    assert intervals.text_to_image == {1: (0.2, 0.8), 10: (1.0, 1.0)}
    low, high = intervals.image_to_text[1]
    assert low <= 0.9 <= high == 1.0
    assert intervals == found.intervals((1, 10), samples=4000)


def test_intervals_do_not_depend_on_how_many_draws_are_held(monkeypatch):
    owner = torch.randint(30, (90,), generator=torch.Generator().manual_seed(0))
    asked = owner.unique()
    found = Ranks(torch.arange(90) % 12 + 1, torch.arange(len(asked)) % 9 + 1, owner, asked)
    whole = found.intervals()
    monkeypatch.setattr(retrieval, "_BOOTSTRAP_BLOCK", 200)  # of which 1000 draws need 150
    assert found.intervals() == whole
    monkeypatch.setattr(retrieval, "_BOOTSTRAP_BLOCK", 1)
    assert found.intervals() == whole
    # As of all draws at once, which took 24 KB an image.
    drawn = torch.randint(
        len(asked), (1000, len(asked)), generator=torch.Generator().manual_seed(0)
    )
    shares = (found.images <= 5)[drawn].double().mean(dim=1)
    ends = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert whole.image_to_text[5] == pytest.approx(tuple(ends))


def test_intervals_leave_distractors_out_and_weigh_texts():
    # Image 1 owns no text; image 2 owns three, all found; image 0 one, which is not.
    owner = torch.tensor([0, 2, 2, 2])
    found = Ranks(torch.tensor([4, 1, 1, 1]), torch.tensor([2, 1]), owner, torch.tensor([0, 2]))
    # Both drawn twice, or one of each: 0 of 2, 6 of 6, or 3 of 4.
    assert found.intervals((1,), confidence=0.2, samples=999).text_to_image[1] == (0.75, 0.75)
    assert found.intervals((1,)).text_to_image[1] == (0.0, 1.0)
    empty = torch.zeros(0, dtype=torch.int64)
    assert Ranks(empty, empty, empty, empty).intervals((1,)).image_to_text == {1: (0.0, 0.0)}

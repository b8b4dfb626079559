"""Local pairs drawn anew each epoch, and captions longer than the context."""

import math
import random
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from open_clip import SimpleTokenizer
from PIL import Image

from fastgoal_models import FastGoalDataset, FastGoalModel, GlitRecord, LocalPair
from fastgoal_models.checkpoints import load_checkpoint
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.glit_dataset import _runs_that_fit
from fastgoal_models.training import train

TOKENIZER = SimpleTokenizer()
# 5, 4, 6 and 4 tokens.
SENTENCES = ("A red cat sleeps.", "Its tail hangs.", "The wall is very green.", "It snows.")
SCORES = (0.1, 0.4, 0.3, 0.2)


@pytest.fixture
def record(tmp_path) -> GlitRecord:
    path = tmp_path / "cat.png"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return GlitRecord("cat", path, 40, 30, " ".join(SENTENCES), SENTENCES, pairs_of(SCORES))


def pairs_of(scores) -> tuple[LocalPair, ...]:
    pairs = [
        LocalPair(number, (0.0, 0.0, 10.0 + 5 * number, 20.0), "", score)
        for number, score in enumerate(scores)
    ]
    return tuple(sorted(pairs, key=lambda pair: -pair.score))


def sentence_of(item) -> str:
    words = item.local_texts[1 : int(item.local_texts.argmax())].tolist()
    return TOKENIZER.decode(words).strip()


def decoded(sentence: str) -> str:
    return TOKENIZER.decode(TOKENIZER.encode(sentence)).strip()


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# -- sampling -------------------------------------------------------------------------------------


def test_best_is_what_it_always_was(record):
    dataset = FastGoalDataset([record], TOKENIZER, 32)
    assert sentence_of(dataset[0]) == decoded(SENTENCES[1])
    assert all(same(dataset.at(epoch, 0), dataset[0]) for epoch in range(3))


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_drawn_pairs_do_not_change_the_best_one(record, sampling):
    dataset = FastGoalDataset([record], TOKENIZER, 32, sampling=sampling)
    assert same(dataset[0], FastGoalDataset([record], TOKENIZER, 32)[0])
    assert dataset.pairs[0].sentence == 1


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_a_draw_depends_on_seed_epoch_and_index_alone(record, sampling):
    records = [replace(record, id=str(number)) for number in range(8)]

    def draws(count: int = 8, seed: int = 0, epochs: int = 8):
        dataset = FastGoalDataset(records[:count], TOKENIZER, 32, sampling=sampling, seed=seed)
        return [[dataset._drawn(epoch, index) for index in range(count)] for epoch in range(epochs)]

    first = draws()
    random.seed(1)
    torch.manual_seed(1)
    assert draws() == first
    assert [row[:3] for row in first] == draws(count=3)
    assert draws(seed=1) != first
    assert len({tuple(row) for row in first}) > 1  # epochs differ
    assert len(set(zip(*first, strict=True))) > 1  # items differ


def test_an_item_of_an_epoch_is_always_the_same_and_of_its_pair(record):
    dataset = FastGoalDataset([record], TOKENIZER, 32, sampling="uniform")
    for epoch in range(12):
        item = dataset.at(epoch, 0)
        assert same(item, dataset.at(epoch, 0))
        pair = dataset._choices[0][dataset._drawn(epoch, 0)].pair
        assert sentence_of(item) == decoded(SENTENCES[pair.sentence])
        assert item.boxes.tolist() == list(pair.box)
        start, end = item.spans.tolist()
        assert torch.equal(item.texts[start:end], item.local_texts[1 : 1 + end - start])


@pytest.mark.parametrize(
    "sampling, top_k, scores, expected",
    [
        ("uniform", 3, SCORES, [0, 1 / 3, 1 / 3, 1 / 3]),
        ("uniform", 2, SCORES, [0, 1 / 2, 1 / 2, 0]),
        ("uniform", 9, SCORES, [1 / 4] * 4),
        ("uniform", 1, SCORES, [0, 1, 0, 0]),
        ("weighted", 3, SCORES, [0, 4 / 9, 3 / 9, 2 / 9]),
        ("weighted", 3, (-0.1, 0.4, 0.0, -0.2), [0, 1, 0, 0]),
        ("weighted", 3, (-0.4, -0.1, -0.2, -0.3), [0, 1 / 3, 1 / 3, 1 / 3]),
        ("weighted", 3, (0.0, math.nan, 0.3, 0.2), [0, 0, 3 / 5, 2 / 5]),
    ],
)
def test_how_often(record, sampling, top_k, scores, expected):
    pairs = pairs_of([2.0 if math.isnan(score) else score for score in scores])
    pairs = tuple(pair._replace(score=scores[pair.sentence]) for pair in pairs)
    dataset = FastGoalDataset(
        [replace(record, pairs=pairs)], TOKENIZER, 32, sampling=sampling, top_k=top_k
    )
    count = 4000
    drawn = Counter(
        dataset._choices[0][dataset._drawn(epoch, 0)].pair.sentence for epoch in range(count)
    )
    assert [drawn[number] / count for number in range(4)] == pytest.approx(expected, abs=0.03)


def test_sentences_past_the_context_are_not_drawn(record):
    with pytest.warns(UserWarning, match="lose their end"):
        dataset = FastGoalDataset(
            [record], TOKENIZER, 32, context_length=11, sampling="uniform", top_k=4
        )
    assert sorted(choice.pair.sentence for choice in dataset._choices[0]) == [0, 1]
    assert dataset.single == 0


def test_items_with_nothing_to_draw_are_counted(record):
    records = [record, replace(record, id="one", pairs=record.pairs[:1])]
    assert FastGoalDataset(records, TOKENIZER, 32, sampling="uniform").single == 1


def test_what_is_not_known_is_refused(record):
    for options, words in (
        ({"sampling": "worst"}, "--pairs must be one of"),
        ({"top_k": 0}, "--top-k must be at least 1"),
        ({"long_captions": "drop"}, "--long-captions must be one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            FastGoalDataset([record], TOKENIZER, 32, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_resumes_exactly(record, tmp_path, num_workers):
    """Stopped in the middle of an epoch; with readers in other processes too."""
    clip = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16
        },
        "text_cfg": {"context_length": 24, "width": 8, "heads": 2, "layers": 1},
    }  # fmt: skip
    records = [replace(record, id=str(number)) for number in range(5)]
    dataset = FastGoalDataset(records, TOKENIZER, 32, 24, sampling="weighted", seed=3)

    def run(out: str, **how):
        torch.manual_seed(0)
        model = FastGoalModel.create(clip, context_length=24)
        config = FastGoalTrainConfig(
            tmp_path / out, steps=6, batch_size=2, learning_rate=1e-3, save_every=1, keep=None,
            num_workers=num_workers,
        )  # fmt: skip
        return load_checkpoint(train(model, dataset, config, device="cpu", **how).checkpoint)

    whole = run("a")
    resumed = run("b", resume=tmp_path / "a/checkpoints/step-00000003")
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, resumed.weights[name]), name


# -- long captions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, room, runs",
    [
        ([5, 4, 6, 3], 18, [(0, 4)]),
        ([5, 4, 6, 3], 9, [(0, 2), (2, 4)]),
        ([5, 4, 6, 3], 8, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([5, 14, 6, 3], 9, [(0, 1), (1, 2), (2, 4)]),
        ([14], 9, [(0, 1)]),
        ([9, 0, 0, 9], 9, [(0, 3), (3, 4)]),
    ],
)
def test_runs(lengths, room, runs):
    assert _runs_that_fit(lengths, room) == runs


def test_chunks(record):
    short = replace(record, id="short", caption=SENTENCES[0], sentences=SENTENCES[:1],
                    pairs=record.pairs[-1:])  # fmt: skip
    dataset = FastGoalDataset([short, record], TOKENIZER, 32, 12, long_captions="chunk")
    assert (len(dataset), dataset.long, dataset.truncated, dataset.left_out) == (3, 1, 0, 0)
    assert [r.id for r in dataset.records] == ["short", "cat", "cat"]
    assert [pair.sentence for pair in dataset.pairs] == [0, 1, 2]
    for index, text in enumerate([SENTENCES[0], " ".join(SENTENCES[:2]), " ".join(SENTENCES[2:])]):
        item = dataset[index]
        assert torch.equal(item.texts, TOKENIZER(text, 12)[0])
        assert item.lengths == (item.texts != 0).sum()
        assert sentence_of(item) == decoded(SENTENCES[dataset.pairs[index].sentence])
        start, end = item.spans.tolist()
        assert torch.equal(item.texts[start:end], item.local_texts[1 : 1 + end - start])
        assert item.local_texts[1 + end - start] == TOKENIZER.eot_token_id


def test_all_of_a_caption_is_in_its_chunks(record):
    for context in range(5, 22):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = FastGoalDataset([record], TOKENIZER, 32, context, long_captions="chunk")
        assert dataset._tokens.tolist() == TOKENIZER.encode(record.caption)
        assert dataset.left_out == 0


def test_runs_without_a_pair_are_left_out_and_counted(record):
    pairs = tuple(pair for pair in record.pairs if pair.sentence >= 2)
    dataset = FastGoalDataset(
        [replace(record, pairs=pairs)], TOKENIZER, 32, 12, long_captions="chunk"
    )
    assert (len(dataset), dataset.left_out) == (1, 1)
    assert torch.equal(dataset[0].texts, TOKENIZER(" ".join(SENTENCES[2:]), 12)[0])


def test_a_sentence_that_is_too_long_alone_is_cut(record):
    with pytest.warns(UserWarning, match="1 of 4 runs of sentences are longer than 7 tokens"):
        dataset = FastGoalDataset([record], TOKENIZER, 32, 7, long_captions="chunk")
    assert (len(dataset), dataset.truncated) == (4, 1)
    assert torch.equal(dataset[2].texts, TOKENIZER(SENTENCES[2], 7)[0])


def test_chunks_draw_from_their_own_pairs(record):
    dataset = FastGoalDataset(
        [record], TOKENIZER, 32, 12, long_captions="chunk", sampling="uniform", top_k=4
    )
    seen = [
        {dataset._choices[index][dataset._drawn(epoch, index)].pair.sentence for epoch in range(40)}
        for index in range(2)
    ]
    assert seen == [{0, 1}, {2, 3}]


def test_nothing_is_chunked_that_fits(record):
    dataset = FastGoalDataset([record], TOKENIZER, 32, long_captions="chunk")
    assert same(dataset[0], FastGoalDataset([record], TOKENIZER, 32)[0])
    assert (len(dataset), dataset.long) == (1, 0)

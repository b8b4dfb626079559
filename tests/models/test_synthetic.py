"""The synthetic scenes: functions of their numbers, told in full, boxes where things are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgoal_models import FastGoalBatch
from fastgoal_models.caft import Caft
from fastgoal_models.synthetic import (
    SyntheticCaft,
    SyntheticFastGoal,
    box,
    draw,
    held_out,
    scene,
)


def test_a_scene_is_a_function_of_its_number():
    assert scene(7) == scene(7) != scene(8)
    assert np.array_equal(np.asarray(draw(scene(7), 64)), np.asarray(draw(scene(7), 64)))


def test_captions_tell_every_thing_in_five_to_nine_sentences():
    captions = set()
    for number in range(300):
        told = scene(number)
        assert 5 <= len(told.sentences) <= 9
        assert sorted(x for x in told.about if x is not None) == [*range(len(told.things))]
        for sentence, about in zip(told.sentences, told.about, strict=True):
            if about is not None:
                thing = told.things[about]
                for word in (thing.colour, thing.shape, thing.texture, thing.size):
                    assert word in sentence
        captions.add(told.caption)
    assert len(captions) == 300


def test_training_and_held_out_scenes_never_coincide():
    seen = {(told.background, told.things) for told in map(scene, range(500))}
    kept = {(told.background, told.things) for told in held_out(500)}
    assert len(kept) == 500 and not seen & kept


def test_things_are_drawn_in_their_boxes():
    for number in range(20):
        told = scene(number)
        picture = np.asarray(draw(told, 96)).astype(int)
        empty = type(told)(told.background, told.background_texture, (), (), ())
        changed = np.abs(picture - np.asarray(draw(empty, 96)).astype(int)).sum(axis=2) > 0
        for thing in told.things:
            x1, y1, x2, y2 = (round(x) for x in box(thing, 96))
            assert changed[y1:y2, x1:x2].mean() > 0.25
            changed[y1 : y2 + 1, x1 : x2 + 1] = False
        assert not changed.any()


@pytest.fixture(scope="module")
def tokenizer():
    return Caft.create("caft-xs", superpixels="grid").tokenizer


def test_fast_goal_items_name_a_thing_and_its_words(tokenizer):
    dataset = SyntheticFastGoal(10, 48, tokenizer, 128)
    item = dataset.at(1, 4)
    assert isinstance(item, FastGoalBatch) and item.images.shape == (3, 48, 48)
    start, end = item.spans.tolist()
    sentence = tokenizer.decode(item.texts[start:end].tolist()).strip()
    local = tokenizer.decode(item.local_texts[1 : 1 + end - start].tolist()).strip()
    assert sentence == local and sentence.startswith("a ")
    boxes = {box(thing, 48) for thing in scene(4).things}
    assert tuple(item.boxes.tolist()) in {tuple(np.float32(x).tolist() for x in b) for b in boxes}
    assert len({tuple(dataset.at(epoch, 4).spans.tolist()) for epoch in range(8)}) > 1


def test_caft_items_have_parts_and_extras(tokenizer):
    dataset = SyntheticCaft(10, 48, tokenizer)
    item = dataset.at(0, 3)
    assert item.images.shape == (3, 48, 48) and item.texts.shape == (8, 77)
    assert torch.equal(item.texts, dataset[3].texts)
    assert not torch.equal(item.texts, dataset.at(1, 3).texts)

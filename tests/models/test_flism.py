"""FLISM's matching, with an encoder whose answers can be worked out by hand."""

import threading
import time

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from fastgoal_models import (
    FastGoalModel,
    GlitError,
    GlitRecord,
    best_pair,
    fixed_regions,
    match_pairs,
)
from fastgoal_models.flism import Matched, Matcher, Picture, RegionRules
from fastgoal_models.pictures import load_image
from fastgoal_models.skips import Unusable

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TOKENIZER = open_clip.SimpleTokenizer(context_length=16)


def test_regions_by_hand():
    assert fixed_regions(80, 40) == {
        "upper left": (0, 0, 40, 20),
        "upper right": (40, 0, 80, 20),
        "lower left": (0, 20, 40, 40),
        "lower right": (40, 20, 80, 40),
        "centre": (20, 10, 60, 30),
    }
    assert fixed_regions(5, 3)["centre"] == (1.25, 0.75, 3.75, 2.25)


class ColourEncoder(nn.Module):
    """Embeds a crop as its mean colour, and a text as the colours it names."""

    def __init__(self):
        super().__init__()
        self.tokenizer = TOKENIZER
        self.image_size = 8
        self.colours = nn.Parameter(torch.zeros(1))
        self.batches = []
        self.modes = set()

    def encode_image(self, images):
        self.batches.append(("image", len(images)))
        self.modes.add(self.training)
        mean = images.new_tensor(open_clip.OPENAI_DATASET_MEAN)
        std = images.new_tensor(open_clip.OPENAI_DATASET_STD)
        return images.mean(dim=(2, 3)) * std + mean + self.colours * 0

    def encode_text(self, texts):
        self.batches.append(("text", len(texts)))
        words = [TOKENIZER.encode(colour)[0] for colour in COLOURS]
        named = [(texts == word).sum(dim=1) for word in words]
        return torch.stack(named, dim=1).float() + 0.01


def record(folder, name, quadrants, sentences, size=(40, 20)):
    """A picture of four colours: upper left, upper right, lower left, lower right."""
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for number, colour in enumerate(quadrants):
        top, left = number // 2 * height // 2, number % 2 * width // 2
        pixels[top : top + height // 2, left : left + width // 2] = COLOURS[colour]
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    return GlitRecord(name, path, width, height, " ".join(sentences), tuple(sentences))


@pytest.fixture
def records(tmp_path):
    return [
        record(
            tmp_path,
            "first",
            ["red", "green", "green", "blue"],
            ["It is blue and green.", "It is red.", "All is blue."],
        ),
        record(tmp_path, "second", ["blue", "blue", "red", "blue"], ["Here is red."], (30, 50)),
        record(tmp_path, "third", ["green"] * 4, ["Only green.", "Only green."]),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_each_sentence_takes_its_most_similar_region(records, device):
    matched = match_pairs(ColourEncoder().to(device), records, progress=False)
    first, second, third = matched
    regions = {pair.sentence: pair.region for pair in first.pairs}
    # The centre is half green and a quarter each red and blue, so nearest to "blue and green".
    assert regions == {0: "centre", 1: "upper left", 2: "lower right"}
    assert first.pairs[-1].sentence == 0
    assert [pair.score for pair in first.pairs] == sorted(p.score for p in first.pairs)[::-1]
    # cos((1, 0, 0), (1.01, 0.01, 0.01))
    assert first.pairs[0].score == pytest.approx(1.01 / (1.01**2 + 2 * 0.01**2) ** 0.5, abs=1e-5)
    assert best_pair(second).region == "lower left"
    assert best_pair(second).box == (0, 25, 15, 50)
    # All regions and both sentences are equal: the first ones.
    assert [(p.sentence, p.region) for p in third.pairs] == [(0, "upper left"), (1, "upper left")]
    assert [(r.id, r.caption, r.image) for r in matched] == [
        (r.id, r.caption, r.image) for r in records
    ]
    assert not records[0].pairs


def test_batches(records):
    encoder = ColourEncoder()
    whole = match_pairs(encoder, records, progress=False)
    assert encoder.batches == [("image", 15), ("text", 5)]  # equal sentences once
    encoder.batches.clear()
    assert match_pairs(encoder, records, batch_size=4, progress=False) == whole
    assert max(size for _, size in encoder.batches) <= 4
    assert match_pairs(encoder, [], progress=False) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_put_back(records, training):
    encoder = ColourEncoder().train(training)
    match_pairs(encoder, records, progress=False)
    assert encoder.training is training
    assert encoder.modes == {False}
    records[1].image.unlink()
    with pytest.raises(GlitError, match=r"second\.png: image is missing"):
        match_pairs(encoder, records, progress=False)
    assert encoder.training is training


def test_no_gradients_are_kept(records):
    # Parameters take part in the embedding: with gradients on, its .tolist() would still pass, so
    # look at what the encoder sees.
    encoder = ColourEncoder()
    seen = []
    encoder.encode_image = lambda images: (
        seen.append(torch.is_grad_enabled()) or ColourEncoder.encode_image(encoder, images)
    )
    match_pairs(encoder, records, progress=False)
    assert seen == [False]
    assert torch.is_grad_enabled()


def tiny_clip():
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=16, patch_size=8, width=32, head_width=16, layers=1),
        text_cfg=dict(context_length=77, width=32, heads=2, layers=1),
    )


def test_a_fast_goal_model_and_a_plain_clip(records):
    clip = tiny_clip()
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    plain = match_pairs(clip, records, tokenizer=tokenizer, image_size=16, progress=False)
    with pytest.raises(TypeError, match="CLIP has no tokenizer"):
        match_pairs(clip, records)
    model = FastGoalModel(clip)  # these sentences end before the positions that the stretch moves
    ours = match_pairs(model, records, progress=False)
    assert match_pairs(model, records, progress=False) == ours
    for a, b in zip(plain, ours, strict=True):
        scores = {pair.sentence: pair.score for pair in b.pairs}
        for pair in a.pairs:  # float32 encoders with another context length
            assert scores[pair.sentence] == pytest.approx(pair.score, abs=1e-5)


def test_a_progress_bar_is_shown(records, capsys):
    match_pairs(ColourEncoder(), records)
    assert "3/3" in capsys.readouterr().err


def test_best_pair_of_an_unmatched_record(records):
    with pytest.raises(ValueError, match="first has no local pair"):
        best_pair(records[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_groups_in_threads_come_in_order_and_leave_the_threads_as_they_were(records, threads):
    """On a CPU each thread computes alone; what can not be read stands in its place."""
    before = torch.get_num_threads()
    items = [*records, "no picture", *records, "neither"] * 3
    seen, inside = set(), set()

    class Watched(ColourEncoder):
        def encode_image(self, images):
            seen.add(threading.get_ident())
            inside.add(torch.get_num_threads())
            return super().encode_image(images)

    def read(item):
        if isinstance(item, str):
            return Unusable(item, "here")
        return Picture(item, load_image(item.image), str(item.image))

    matcher = Matcher(Watched(), rules=RegionRules(), batch_size=5)
    assert matcher.images_at_once == 1
    torch.set_num_threads(threads)
    try:
        found = list(matcher.match(items, read))
        assert torch.get_num_threads() == threads
        assert inside == {1} and 1 <= len(seen) <= threads
        assert threading.get_ident() not in seen
        ahead = matcher.match(items, read)  # left alone after the first, as by Ctrl-C
        next(ahead)
        ahead.close()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for item, one in zip(items, found, strict=True):
        if isinstance(item, str):
            assert isinstance(one, Unusable) and one.reason == item
        else:
            assert isinstance(one, Matched) and one.record.id == item.id and one.record.pairs


def test_another_device_has_one_group_at_a_time(records):
    matcher = Matcher(ColourEncoder(), rules=RegionRules(), batch_size=5, device="xpu")
    matcher.device = torch.device("cpu")  # where the tensors of this test stay
    before, turns = torch.get_num_threads(), []

    class Busy(ColourEncoder):
        def encode_image(self, images):
            turns.append(1)
            assert matcher._turn.locked() and len(turns) == 1
            time.sleep(0.01)  # others would come in
            turns.pop()
            return super().encode_image(torch.rand(images.shape))

        def encode_text(self, texts):
            assert matcher._turn.locked()
            return super().encode_text(torch.ones(texts.shape, dtype=torch.int64))

    matcher.model = Busy()
    torch.set_num_threads(3)
    try:
        found = matcher.match(records * 3, lambda r: Picture(r, load_image(r.image), r.id))
        assert [one.record.id for one in found] == [record.id for record in records * 3]
    finally:
        torch.set_num_threads(before)

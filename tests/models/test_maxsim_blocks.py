"""MaxSim of images a block at a time: the same matches, and never the patches of all images."""

import pytest
import torch
from PIL import Image

from fastgoal_kernels import maxsim_topk
from fastgoal_models import FastGoalModel, encoding, evaluation
from fastgoal_models.demo.live_bytes import LiveBytes
from fastgoal_models.errors import ConfigError
from fastgoal_models.evaluation import evaluate_set, word_tokens
from fastgoal_models.maxsim_blocks import best_of_kept, topk_of_blocks
from fastgoal_models.sets import CaptionedImage, CaptionSet
from tests.models.small_models import CONFIG, coloured_records, small_clip

WIDE = CONFIG | {
    "embed_dim": 64,
    "vision_cfg": CONFIG["vision_cfg"] | {"image_size": 128, "patch_size": 8},
}


def tokens(images=11, texts=9, seed=0):
    """Whole numbers, so that many scores are equal and all are exact; and a NaN on either side."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(-1, 2, (images, 3, 4), generator=generator).float()
    lengths = 2 ** torch.randint(0, 3, (texts,), generator=generator)  # means are exact, too
    lengths[3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    words = torch.randint(-1, 2, (int(offsets[-1]), 4), generator=generator).float()
    patches[5, 1, 0] = torch.nan
    words[0, 2] = torch.nan
    return patches, words, offsets


def assert_same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 4, 9, 50])
@pytest.mark.parametrize("size", [1, 2, 5, 11])
def test_the_best_of_blocks_are_those_of_all_at_once(k, size):
    patches, words, offsets = tokens()
    wanted = maxsim_topk(patches, words, k, text_offsets=offsets)
    assert_same(topk_of_blocks(patches.split(size), words, offsets, k), wanted)


def test_no_blocks():
    with pytest.raises(ValueError, match="no images"):
        topk_of_blocks([], *tokens()[1:], 3)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_best_of_those_that_are_kept(k):
    patches, words, offsets = tokens()
    kept = torch.tensor([True, False, True, True, False, True, True, True, False])
    some = [words[offsets[j] : offsets[j + 1]] for j in kept.nonzero().flatten().tolist()]
    bounds = torch.tensor([0, *(len(x) for x in some)]).cumsum(0)
    wanted, _ = maxsim_topk(patches, torch.cat(some), k, text_offsets=bounds)
    best, _ = maxsim_topk(patches, words, k + 3, text_offsets=offsets)
    assert_same([best_of_kept(best, kept, k)], [wanted])


def test_the_patches_of_all_images_are_never_there(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = FastGoalModel.create(WIDE, context_length=24).eval()
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    captioned = CaptionSet("x", [CaptionedImage(f"{i}", path, ("Grey.",)) for i in range(100)])
    options = {"score": "maxsim", "ks": (1,), "batch_size": 2}
    whole = evaluate_set(model, captioned, **options)  # in one block
    monkeypatch.setattr(encoding, "_BLOCK_BYTES", 5 * 256 * 64 * 4)
    with LiveBytes() as live:
        live.ignore(model.parameters())
        assert evaluate_set(model, captioned, **options) == whole
    assert live.peak < 100 * 256 * 64 * 4 / 2  # half the patches of all images


def test_words_are_there_once():
    torch.manual_seed(0)
    model = FastGoalModel.create(WIDE, context_length=24).eval()
    captions = [f"{i} red dogs and two blue cats sit on a green mat near it" for i in range(300)]
    with LiveBytes() as live:
        live.ignore(model.parameters())
        words, offsets, truncated = word_tokens(model, captions, batch_size=2)
    assert len(words) == offsets[-1] > 300 * 10 and not truncated.any()
    assert live.peak < 1.5 * words.numel() * 4


@pytest.mark.parametrize("spare, passes", [(64, 1), (3, 1), (2, 2), (0, 2)])
def test_captions_of_unreadable_pictures_count_nowhere(tmp_path, monkeypatch, spare, passes):
    monkeypatch.setattr(evaluation, "_SPARE", spare)
    began, blocks = [], encoding.blocks_of_patches
    monkeypatch.setattr(
        evaluation, "blocks_of_patches", lambda *a, **o: began.append(1) or blocks(*a, **o)
    )
    records = coloured_records(tmp_path)
    texts = [("Red.", "All red.", "x " * 40), ("Green.",), ("Blue.", "Sky.")]
    items = [CaptionedImage(r.id, r.image, some) for r, some in zip(records, texts, strict=True)]
    gone = CaptionedImage("gone", tmp_path / "gone.png", ("Red.", "y " * 40, "Blue."))
    options = {"score": "maxsim", "ks": (1, 2, 3), "show": 2, "batch_size": 1}
    wanted = evaluate_set(small_clip(), CaptionSet("x", items), **options)
    began.clear()
    counted = []
    with_it = CaptionSet("x", [items[0], gone, *items[1:]])
    found = evaluate_set(small_clip(), with_it, **options, progress=counted.append)
    assert len(began) == passes and sum(counted) == 3 + with_it.num_captions
    assert (found.retrieval, found.intervals) == (wanted.retrieval, wanted.intervals)
    assert found.truncated == wanted.truncated == 1 and list(found.unread) == ["gone"]
    assert found.found.captions == wanted.found.captions
    assert found.found.ranks == wanted.found.ranks and found.found.scores == wanted.found.scores
    nothing = CaptionSet("x", [gone])
    with pytest.raises(ConfigError, match="none of 1 pictures can be read"):
        evaluate_set(small_clip(), nothing, **options)

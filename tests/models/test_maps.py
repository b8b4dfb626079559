"""`fastgoal maps`: the attention is the class token's own, and each record gets its picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import FastGoalModel, GlitRecord
from fastgoal_models.attention import class_attention, has_class_attention
from fastgoal_models.cli import app
from fastgoal_models.glit import LocalPair
from fastgoal_models.localisation import sentence_maps
from fastgoal_models.map_pictures import ModelMaps, draw_maps, shown_sentences
from tests.models.small_models import CONFIG, coloured_records, deep_clip, small_clip


def maps(*arguments: object):
    arguments = ("maps", *arguments, "--device", "cpu")
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Three coloured pictures, the second without a pair."""
    rows = [
        {"id": record.id, "image": record.image.name, "caption": record.caption}
        | ({} if number == 1 else {"pairs": [record.pairs[0]._asdict()]})
        for number, record in enumerate(coloured_records(tmp_path))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- attention ------------------------------------------------------------------------------------


def test_attention_is_the_mean_over_heads_of_the_last_layers_softmax():
    model = deep_clip(3).train()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = class_attention(model, images)
    assert model.training and found.shape == (2, 2, 2)
    visual = model.eval().clip.visual
    with torch.no_grad():
        x = model._embed_image(images)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        last = visual.transformer.resblocks[-1]
        q, k, _ = (last.ln_1(x) @ last.attn.in_proj_weight.T + last.attn.in_proj_bias).chunk(3, -1)
        q, k = (part.unflatten(-1, (last.attn.num_heads, -1)) for part in (q, k))
        logits = torch.einsum("nhd,nphd->nhp", q[:, 0], k) * q.shape[-1] ** -0.5
        expected = logits.softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(found.flatten(1), expected[:, 1:])
    assert last.attn.num_heads == 2 and (found.sum(dim=(1, 2)) < 1).all()
    assert not last._forward_pre_hooks


@pytest.mark.parametrize("setting", [{"pool_type": "avg"}, {"qk_norm": True}])
def test_attention_of_other_towers_is_not_drawn(setting):
    assert has_class_attention(small_clip())
    config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | setting}
    assert not has_class_attention(FastGoalModel.create(config, context_length=24))


# -- pictures -------------------------------------------------------------------------------------


def test_a_picture_shows_these_maps_and_boxes(tmp_path):
    (record, *_) = coloured_records(tmp_path)
    model = small_clip()
    attention = torch.tensor([[0.1, 0.2], [0.3, 0.25]])
    found = sentence_maps(model, record, shown_sentences(record))
    assert shown_sentences(record) == [1, 0]  # the sentence with a pair comes first
    both = [ModelMaps("A", "before training", found, None)]
    both.append(ModelMaps("B", "after training", [-heat for heat in found], attention))
    figure = draw_maps(record, both)
    assert figure.get_suptitle() == "before training: A\nafter training: B"
    drawn = [
        image.get_array().data
        for axis in figure.axes
        for image in axis.images
        if image.get_array().ndim == 2  # the others are photographs
    ]
    expected = [*found, attention, *(-heat for heat in found)]
    assert len(drawn) == len(expected)
    for heat in expected:
        assert any(np.array_equal(heat.numpy(), other) for other in drawn)
    boxes = [patch.get_bbox().extents.tolist() for axis in figure.axes for patch in axis.patches]
    assert boxes == [[0, 0, 24, 16]] * 3  # on the photograph, and on the sentence's two maps
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("It is plain.") == 2 and titles.count("A red rectangle.") == 2
    assert sum("30.0% a patch" in title.replace("\n", " ") for title in titles) == 1


def test_four_sentences_at_most_best_pairs_first():
    box = (0.0, 0.0, 1.0, 1.0)
    pairs = tuple(LocalPair(sentence, box, "all", 0.5) for sentence in (5, 2, 5))
    sentences = tuple(f"Sentence {number}." for number in range(6))
    record = GlitRecord("x", Path("x.png"), 1, 1, " ".join(sentences), sentences, pairs)
    assert shown_sentences(record) == [5, 2, 0, 1]


# -- the command ----------------------------------------------------------------------------------


def test_a_picture_a_record_with_and_without_before(tiny, data, tmp_path):
    alone = maps("--model", tiny, "--data", data, "--out", tmp_path / "alone", "--limit", 2)
    assert alone.exit_code == 0, alone.output
    assert "2 pictures in" in alone.output and "mean nothing" in alone.output
    names = ["0001-red.png", "0002-green.png"]
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == names
    both = maps(
        "--model", tiny, "--data", data, "--out", tmp_path / "both", "--before", tiny, "--limit", 2
    )
    assert both.exit_code == 0, both.output
    for name in names:
        with (
            Image.open(tmp_path / "alone" / name) as one,
            Image.open(tmp_path / "both" / name) as two,
        ):
            assert one.width == two.width > 1000
            assert two.height > one.height + 200  # a row more


def test_a_picture_that_can_not_be_read_is_left_out(tiny, data, tmp_path):
    noise = Image.effect_noise((48, 32), 80).convert("RGB")
    noise.save(tmp_path / "red.png", "JPEG")
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").write_bytes(whole[:-200])  # its header is whole, and says its size
    found = maps("--model", tiny, "--data", data, "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "left out" in found.output and "red.png" in found.output
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "caft-xs"], ["is a CAFT", "Fix: fastgoal hierarchy", "--checkpoint FILE"]),
        (["--before", "caft-xs"], ["--before: caft-xs is a CAFT", "fastgoal hierarchy"]),
        (["--before-pretrained", "openai"], ["--before-pretrained openai", "Fix: --before NAME"]),
        (["--out", __file__], ["is a file", "Fix: name a folder"]),
        (["--data", "gone.jsonl"], ["--data: there is no file gone.jsonl"]),
    ],
)
def test_what_can_not_be_drawn_is_refused(tiny, data, tmp_path, arguments, words):
    usual = ["--model", tiny, "--data", data, "--out", tmp_path / "out"]
    found = maps(*usual, *arguments)  # of an option that is given twice the last one counts
    assert found.exit_code == 2 and "Traceback" not in found.output
    for word in words:
        assert word in found.output
    assert not (tmp_path / "out").exists()

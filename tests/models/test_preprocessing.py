"""Models whose pictures are normalised and resized otherwise than CLIP's."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from open_clip.transform import PreprocessCfg
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import FastGoalDataset, FastGoalModel, match_pairs, write_glit
from fastgoal_models.cli import app
from fastgoal_models.encoding import encode_pictures
from fastgoal_models.errors import ConfigError
from fastgoal_models.flism import Matcher, RegionRules
from fastgoal_models.glit import GlitRecord, LocalPair
from fastgoal_models.loading import load_fast_goal, load_model
from fastgoal_models.localisation import sentence_maps
from fastgoal_models.pictures import crop_region, image_tensor, load_image
from fastgoal_models.prepare import prepare
from fastgoal_models.preprocessing import (
    CLIP_NORMALISATION,
    Normalisation,
    preprocess_of,
    unlike_clip,
)
from fastgoal_models.search import identity_of, make_index, search_index
from tests.models.small_models import CONFIG, small_clip

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
TAGS = {
    "siglips": {**HALF, "interpolation": "bicubic", "resize_mode": "squash"},
    "imagenets": {**IMAGENET, "interpolation": "bilinear", "resize_mode": "squash"},
    "padded": {**HALF, "resize_mode": "longest", "fill_color": 9},
    "clips": {},
}
NAME = "fastgoal-test-preprocessing"


def colourful(folder: Path) -> list[GlitRecord]:
    """Pictures of noise, wide and tall, so that each way to resize them gives another result."""
    records = []
    for number, (width, height) in enumerate([(70, 40), (33, 90), (64, 64)]):
        path = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(path)
        sentences = (f"Noise number {number}.", "It shows nothing.")
        box = (0.0, 0.0, width / 2, height / 2)
        pair = LocalPair(number % 2, box, "upper left", 0.5)
        caption = " ".join(sentences)
        records.append(GlitRecord(str(number), path, width, height, caption, sentences, (pair,)))
    return records


@pytest.fixture
def tags(tmp_path, monkeypatch) -> None:
    """open_clip knows a small model with some tags, whose weights are on the disk already."""
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    for table in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):  # put back afterwards
        known = getattr(open_clip.factory, table)
        monkeypatch.setattr(open_clip.factory, table, known.copy())
    open_clip.add_model_config(folder)
    torch.save(small_clip(1).clip.state_dict(), folder / "weights.pt")
    known = {tag: {"url": tag, **settings} for tag, settings in TAGS.items()}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, known)
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained", lambda *_, **__: str(folder / "weights.pt")
    )


def with_preprocess(**settings) -> FastGoalModel:
    """`small_clip` with other settings: the same weights."""
    torch.manual_seed(0)
    return FastGoalModel.create(
        CONFIG | {"preprocess_cfg": settings}, context_length=24
    ).eval()  # fmt: skip


def fastgoal(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.output


def test_what_a_configuration_means():
    assert preprocess_of({}, 48) == PreprocessCfg(size=48)
    assert unlike_clip(PreprocessCfg(size=48)) == {}
    settings = {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash", "size": 224, "mode": "RGB"}
    found = preprocess_of(settings, 48)
    assert (found.size, found.mean, found.std) == (48, (0.5, 0.5, 0.5), OPENAI_DATASET_STD)
    assert unlike_clip(found) == {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    assert json.loads(json.dumps(unlike_clip(found))) == unlike_clip(found)
    assert small_clip().normalisation == CLIP_NORMALISATION == (
        OPENAI_DATASET_MEAN, OPENAI_DATASET_STD,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"means": [0, 0, 0]}, "has no means. Fix: use size, mode, mean, std"),
        ({"mean": 0.5}, "mean must be three numbers"),
        ({"mean": [0.5, 0.5]}, "mean must be three numbers"),
        ({"std": [0.5, float("nan"), 0.5]}, "std must be three numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "std must be above 0"),
        ({"interpolation": "nearest"}, "interpolation must be one of .*'bilinear'"),
        ({"resize_mode": "crop"}, "resize_mode must be one of .*'longest'"),
        ({"mode": "L"}, "mode must be one of"),
    ],
)
def test_a_configuration_that_makes_no_sense(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        preprocess_of(settings, 32)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(CONFIG | {"preprocess_cfg": settings}))
    with pytest.raises(ConfigError, match=message):
        load_model(str(path))


@pytest.mark.parametrize("tag", TAGS)
def test_pictures_are_as_open_clip_has_them_for_the_tag(tags, tmp_path, tag):
    records = colourful(tmp_path)
    theirs, _, transform = open_clip.create_model_and_transforms(NAME, pretrained=tag)
    theirs.eval()
    model = load_fast_goal(NAME, tag).model.eval()
    assert unlike_clip(model.preprocess).keys() == TAGS[tag].keys() - {
        name for name, usual in (("interpolation", "bicubic"),) if TAGS[tag].get(name) == usual
    }
    pictures = torch.stack([transform(load_image(record.image)) for record in records])
    with torch.no_grad():
        expected = theirs.encode_image(pictures, normalize=True)
    features, _ = encode_pictures(model, [record.image for record in records])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    squashed, _ = encode_pictures(model, [record.image for record in records], resize="squash")
    pixels = torch.stack(
        [image_tensor(load_image(r.image), 32, *model.normalisation) for r in records]
    )
    with torch.no_grad():
        expected = theirs.encode_image(pixels, normalize=True)
    torch.testing.assert_close(squashed, expected, rtol=1e-5, atol=1e-6)


def test_training_and_matching_normalise_as_the_model_wants(tmp_path, monkeypatch):
    records = colourful(tmp_path)
    model = with_preprocess(**IMAGENET)
    assert model.normalisation == Normalisation(IMAGENET_MEAN, IMAGENET_STD)
    dataset = FastGoalDataset(records, model.tokenizer, 32, 24, model.normalisation)
    for item, record in zip(dataset, records, strict=False):
        image = load_image(record.image)
        assert torch.equal(item.images, image_tensor(image, 32, *IMAGENET.values()))
        cut = crop_region(image, record.pairs[0].box)
        assert torch.equal(item.local_images, image_tensor(cut, 32, *IMAGENET.values()))

    # The same pixels, so the same pairs and maps, by a model that undoes the other normalisation.
    plain = small_clip()
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET.values())
    clips = [torch.tensor(values)[:, None, None] for values in CLIP_NORMALISATION]
    embed = plain._embed_image
    monkeypatch.setattr(
        plain, "_embed_image", lambda x: embed((x * clips[1] + clips[0] - mean) / std)
    )
    for one, two in zip(match_pairs(model, records), match_pairs(plain, records), strict=True):
        assert [p[:3] for p in one.pairs] == [p[:3] for p in two.pairs]
        scores = [[pair.score for pair in record.pairs] for record in (one, two)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for record in records:
        for heat in zip(
            sentence_maps(model, record, [0]), sentence_maps(plain, record, [0]), strict=True
        ):
            torch.testing.assert_close(*heat, rtol=1e-4, atol=1e-5)


def test_another_encoder_says_how_or_is_clips():
    class Encoder:
        tokenizer, image_size = open_clip.SimpleTokenizer(), 32

    def normalisation(**options):
        return Matcher(Encoder(), rules=RegionRules(), **options).normalisation  # type: ignore

    assert normalisation() == CLIP_NORMALISATION
    half = Normalisation(*HALF.values())
    assert normalisation(normalisation=half) == half


def test_a_run_keeps_it_and_is_loaded_with_it(tags, tmp_path):
    records = colourful(tmp_path)
    write_glit(records, tmp_path / "data.jsonl")

    def train(out: str, *words: object) -> str:
        return fastgoal(
            "train", "fast-goal", "--data", tmp_path / "data.jsonl", "--out", tmp_path / out,
            "--context-length", 24, "--steps", 1, "--batch-size", 2, "--device", "cpu", *words,
        )  # fmt: skip

    train("run", "--model", NAME, "--pretrained", "siglips", "--eval-data", tmp_path / "data.jsonl")
    loaded = load_fast_goal(str(tmp_path / "run"))
    expected = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    assert loaded.notes["architecture"]["preprocess_cfg"] == expected
    assert loaded.model.preprocess == PreprocessCfg(size=32, resize_mode="squash", **HALF)
    train("run", "--model", NAME, "--pretrained", "siglips", "--resume")
    train("second", "--model", tmp_path / "run")
    assert load_fast_goal(str(tmp_path / "second")).model.preprocess == loaded.model.preprocess
    # Neither the weights nor the name say it, but what the run noted beside the weights does.
    weights = str(next((tmp_path / "run" / "checkpoints").glob("*/model.safetensors")))
    assert load_fast_goal(NAME, weights).model.preprocess == loaded.model.preprocess
    other = tmp_path / "other.json"
    other.write_text(json.dumps(CONFIG | {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}))
    with pytest.raises(ConfigError, match=r"preprocess_cfg is \{'mean': .* in .*other.json"):
        load_model(str(other), weights)

    # As runs of before were saved, and those of CLIP's are.
    train("clips", "--model", NAME, "--pretrained", "clips")
    old = load_fast_goal(str(tmp_path / "clips"))
    assert "preprocess_cfg" not in old.notes["architecture"]
    assert old.model.preprocess == PreprocessCfg(size=32)


def test_an_index_of_other_pictures_is_refused(tmp_path):
    colourful(tmp_path)
    clips, half = small_clip(), with_preprocess(**HALF)
    index, _ = make_index(half, tmp_path)
    assert len(search_index(half, index, "noise", 2, score="maxsim")) == 2
    with pytest.raises(ConfigError, match="made by a model with other"):
        search_index(clips, index, "noise", 2)
    assert identity_of(clips) == identity_of(with_preprocess())
    assert "preprocess" not in repr(clips)


def test_prepared_pairs_name_what_is_not_clips(tmp_path):
    write_glit(colourful(tmp_path), tmp_path / "data.jsonl")
    for model, noted in ((small_clip(), None), (with_preprocess(**HALF), HALF)):
        out = tmp_path / f"{noted is None}.jsonl"
        prepare(tmp_path / "data.jsonl", out, Matcher(model, rules=RegionRules()))
        told = json.loads(out.with_name(out.name + ".provenance.json").read_text())
        assert told.get("normalisation") == (
            noted and {name: list(values) for name, values in noted.items()}
        )

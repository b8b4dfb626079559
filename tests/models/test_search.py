"""`fastgoal embed` and `fastgoal search`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastgoal_models import FastGoalModel
from fastgoal_models.caft import Caft
from fastgoal_models.cli import app
from fastgoal_models.encoding import encode_captions, encode_pictures
from fastgoal_models.errors import ConfigError
from fastgoal_models.search import Hit, Index, make_index, search_index, search_with_caft
from fastgoal_models.sheets import draw_sheet
from fastgoal_models.zero_shot import class_folders, classify, picture_files
from tests.models.small_models import CONFIG, coloured_records, small_clip

QUERY = "A rectangle that is red all over."


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    coloured_records(tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


def test_an_index_finds_what_a_plain_product_finds(folder, tmp_path):
    model = small_clip()
    index, lost = make_index(model, folder)
    assert index.names == ["blue.png", "green.png", "red.png"]
    assert list(lost) == ["broken.jpg"]
    index.save(tmp_path / "index.safetensors")
    back = Index.load(tmp_path / "index.safetensors")
    assert torch.equal(back.features, index.features) and back.names == index.names
    hits = search_index(model, back, QUERY, 2)
    text, _ = encode_captions(model, [QUERY])
    scores = (index.features @ text.T)[:, 0]
    order = scores.argsort(descending=True)[:2].tolist()
    assert [hit.image.name for hit in hits] == [index.names[at] for at in order]
    assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist())


def test_reranking_is_the_mean_of_whole_and_words(folder):
    model = small_clip()
    index, _ = make_index(model, folder)

    def found_by(score):
        hits = search_index(model, index, QUERY, 3, score=score)
        return {hit.image.name: hit.score for hit in hits}

    by = {score: found_by(score) for score in ("global", "maxsim", "reranked")}
    for name, score in by["reranked"].items():
        assert score == pytest.approx((by["global"][name] + by["maxsim"][name]) / 2)
    features, found = encode_pictures(model, [folder / name for name in index.names], tokens=True)
    assert features.shape == (3, 4, 16) and not found.lost


def test_what_can_not_be_searched(folder, tmp_path):
    model = small_clip()
    index, _ = make_index(model, folder)
    with pytest.raises(ConfigError, match="other weights"):
        search_index(small_clip(seed=1), index, QUERY, 1)
    quick = FastGoalModel.create(CONFIG | {"quick_gelu": True}, context_length=24)
    quick.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="other weights"):
        search_index(quick, index, QUERY, 1)
    with pytest.raises(ConfigError, match="no words"):
        search_index(model, index, "  ", 1)
    with pytest.raises(ConfigError, match="global"):
        search_index(model, index, QUERY, 1, score="whole")
    (folder / "red.png").unlink()
    with pytest.raises(ConfigError, match="is gone"):
        search_index(model, index, QUERY, 1, score="maxsim")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        make_index(model, tmp_path / "empty")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        make_index(model, tmp_path / "nowhere")
    (tmp_path / "captions.jsonl").write_text('{"image": "red.png"}\n' * 9)
    with pytest.raises(ConfigError, match="is a file, and no folder"):
        make_index(model, tmp_path / "captions.jsonl")
    with pytest.raises(ConfigError, match="neither a folder of images nor an index"):
        Index.load(tmp_path / "captions.jsonl")


@pytest.mark.parametrize("query", ["A sign $x_$ there, $5.", "一" * 300, "word " * 200])
def test_any_text_stands_above_its_sheet(folder, tmp_path, query):
    draw_sheet(query, [Hit(folder / "red.png", 0.5)], tmp_path / "sheet.png", right=[True])
    assert (tmp_path / "sheet.png").stat().st_size > 3000
    with pytest.raises(ConfigError, match="should end in one of"):
        draw_sheet(query, [], tmp_path / "sheet.xyz")


@pytest.mark.parametrize("name", ["../outside.png", "/etc/x.png", "a/../../outside.png"])
def test_an_index_that_names_files_outside_its_folder_is_refused(folder, tmp_path, name):
    path = tmp_path / "index.safetensors"
    Index(folder, [name], torch.ones(1, 16), "x").save(path)
    with pytest.raises(ConfigError, match=r"is not in .*fastgoal embed"):
        Index.load(path)


@pytest.mark.parametrize(
    "names, features, words",
    [
        ("[", torch.ones(1, 16), "can not be read"),
        ("[" * 100_000, torch.ones(1, 16), "can not be read"),
        ("[1]", torch.ones(1, 16), "no list of names"),
        ('"a.png"', torch.ones(5, 16), "no list of names"),
        ('["a.png"]', torch.ones(2, 16), "not one row for 1 names"),
        ('["a.png"]', torch.ones(1), "not one row for 1 names"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, names, features, words):
    notes = {"kind": "fastgoal index", "folder": "x", "names": names, "weights": "x"}
    save_file({"features": features}, tmp_path / "index.safetensors", notes)
    with pytest.raises(ConfigError, match=words):
        Index.load(tmp_path / "index.safetensors")
    save_file({"features": features}, tmp_path / "other.safetensors", {"kind": "other"})
    with pytest.raises(ConfigError, match="is no index"):
        Index.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("score", ["global", "reranked"])
def test_a_link_out_of_an_indexs_folder_is_not_followed(folder, tmp_path, score):
    model = small_clip()
    index, _ = make_index(model, folder)
    (folder / "red.png").rename(tmp_path / "red.png")
    (folder / "red.png").symlink_to(tmp_path / "red.png")
    with pytest.raises(ConfigError, match=r"red.png of the index is a link out of its folder"):
        search_index(model, index, QUERY, 3, score=score)


def test_a_caft_searches_a_folder(folder):
    torch.manual_seed(0)
    model = Caft.create("caft-xs", superpixels="grid").eval()
    paths = [folder / f"{name}.png" for name in ("red", "broken", "blue")]
    hits, lost = search_with_caft(model, paths, QUERY, 5)
    assert [hit.image.name for hit in hits] != [] and len(hits) == 2
    assert list(lost) == [str(folder / "broken.png")]
    alone, _ = search_with_caft(model, paths[:1], QUERY, 5)
    (score,) = [hit.score for hit in hits if hit.image == paths[0]]
    assert alone[0].score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_a_query_is_cut_as_the_caft_was_trained(folder, trained):
    """0.5 is a full stop to the published splitter."""
    torch.manual_seed(0)
    model = Caft.create("caft-xs", superpixels="grid", published=trained).eval()
    query = "A sign says 0.5 miles. It is red."

    def found(**options):
        return search_with_caft(model, [folder / "red.png"], query, 1, **options)[0][0].score

    assert found() == found(published=trained)
    assert found() != pytest.approx(found(published=not trained), abs=1e-7)


def test_links_out_of_the_folder_are_left_out(folder, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes((folder / "red.png").read_bytes())
    (folder / "link.png").symlink_to(outside)
    assert [path.name for path in picture_files(folder)] == [
        "blue.png", "broken.jpg", "green.png", "red.png"
    ]  # fmt: skip


def test_the_commands(folder, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    torch.save(small_clip().clip.state_dict(), tmp_path / "weights.pt")
    model = ["--model", tmp_path / "model.json", "--pretrained", tmp_path / "weights.pt"]

    def run(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    index = tmp_path / "index.safetensors"
    assert "3 images" in run("embed", folder, "--out", index, *model)
    sheet, found = tmp_path / "sheet.png", tmp_path / "found.json"
    said = run("search", QUERY, index, "-k", 2, "--out", sheet, "--json", found, *model)
    assert "1 images could not be read" in run("search", QUERY, folder, *model)
    assert sheet.stat().st_size > 5000
    document = json.loads(found.read_text())
    assert (document["schema"], document["kind"], document["score"]) == (1, "search", "reranked")
    assert document["query"] == QUERY and document["command"].startswith("fastgoal")
    images = document["images"]
    assert len(images) == 2 and all(image["image"] in said for image in images)
    assert "by reranked score of" in said
    words = ["search", QUERY, index, "--published", *model]
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "--published is how texts are cut for a CAFT" in done.output
    # Without an index the same; on the standard output nothing but JSON.
    words = ["search", QUERY, folder, "-k", 2, "--json", "-", *model]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert json.loads(done.stdout)["images"] == images and "by reranked" in done.stderr
    assert not Path("-").exists()


def test_what_is_there_is_not_replaced_and_what_is_missing_is_named(folder, tmp_path):
    """Before a model is loaded, which may be a download."""
    model = ["--model", "no such model"]

    def refused(*words):
        done = CliRunner().invoke(app, [str(w) for w in [*words, *model]], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        return done.output

    index, gone = tmp_path / "index.safetensors", tmp_path / "gone"
    index.write_text("mine")
    assert "--force replaces it" in refused("embed", folder, "--out", index)
    assert "no such model" in refused("embed", folder, "--out", index, "--force")
    assert "must end in .safetensors" in refused("embed", folder, "--out", tmp_path / "index.pt")
    assert "does not exist" in refused("embed", gone, "--out", folder / "i.safetensors")
    assert "does not exist" in refused("search", QUERY, gone)
    assert "neither a folder" in refused("search", QUERY, index)
    assert index.read_text() == "mine"


def test_the_images_of_a_caft_are_named_as_those_of_a_clip(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["search", QUERY, folder.name, "--model", "caft-xs", "--json", "-", "--device", "cpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["score"] == "blended" and len(document["images"]) == 3
    assert {hit["image"] for hit in document["images"]} == {
        str(folder.resolve() / f"{name}.png") for name in ("red", "green", "blue")
    }


def test_classes_are_folders(folder, tmp_path):
    for name in ("deep_red", "blue"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        picture = (folder / f"{name.removeprefix('deep_')}.png").read_bytes()
        (tmp_path / "classes" / name / "1.png").write_bytes(picture)
    (tmp_path / "classes" / "blue" / "broken.png").write_bytes(b"")
    classes = class_folders(tmp_path / "classes")
    assert list(classes) == ["blue", "deep red"]
    found = classify(small_clip(), classes)
    assert (found.classes, found.pictures) == (2, 2)
    assert list(found.unread) == [str(tmp_path / "classes" / "blue" / "broken.png")]
    assert "empty" in next(iter(found.unread.values()))
    assert found.top5 is None  # of two classes it takes both
    assert found.top1 in (0.0, 0.5, 1.0)
    with pytest.raises(ConfigError, match="has 0 classes"):
        class_folders(folder)


def test_a_model_that_says_the_same_of_all_classes_knows_none(folder, tmp_path, monkeypatch):
    from fastgoal_models import zero_shot

    # Of one number only, so that no order of adding makes them differ in the last bit.
    monkeypatch.setattr(
        zero_shot, "class_features", lambda model, names: torch.eye(16)[:1].expand(len(names), -1)
    )
    classes = {str(number): [folder / "red.png"] for number in range(6)}
    found = classify(small_clip(), classes)
    assert (found.top1, found.top5) == (0.0, 0.0)

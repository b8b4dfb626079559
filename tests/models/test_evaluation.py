"""`fastgoal eval`: its numbers are those of plain score matrices, and what is left out is named."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastgoal_kernels import maxsim_scores
from fastgoal_models import evaluation, write_glit
from fastgoal_models.caft import Caft
from fastgoal_models.encoding import caft_rows
from fastgoal_models.errors import ConfigError
from fastgoal_models.evaluation import (
    average_precision_at,
    caption_set,
    evaluate_set,
    joint_precision,
)
from fastgoal_models.pictures import crop_region, image_tensor, load_image
from fastgoal_models.retrieval import recall_at_k
from fastgoal_models.sets import CaptionedImage, CaptionSet
from fastgoal_models.trained import notes_as_metadata
from tests.models.small_models import CONFIG, coloured_records, small_clip
from tests.models.tuned_run import fastgoal, tuned_run

CAFT = {
    "embed_dim": 16, "pool_heads": 2,
    "vision_cfg": {"image_size": 32, "width": 32, "heads": 2, "layers": [1, 1, 1, 1],
                   "tokens": [4, 3, 2]},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
                 "parts": 4, "whole_layers": 1, "adapter_width": 8},
}  # fmt: skip


@pytest.fixture
def records(tmp_path):
    return coloured_records(tmp_path)


def score_matrix(model, records, captions):
    images = torch.stack([image_tensor(load_image(r.image), 32) for r in records])
    with torch.no_grad():
        return model.encode_image(images) @ model.encode_text(model.tokenizer(captions)).T


@pytest.mark.parametrize("resize", ["own", "squash"])
def test_global_recall_is_that_of_the_score_matrix(records, resize):
    """Plain colours look alike cropped or squashed, so one expectation holds for both."""
    model = small_clip().train()
    found = evaluate_set(model, caption_set(records, "x"), ks=(1, 2), resize=resize, batch_size=2)
    assert model.training
    model.eval()
    scores = score_matrix(model, records, [record.caption for record in records])
    assert found.retrieval == recall_at_k(scores, ks=(1, 2))
    assert found.intervals.text_to_image.keys() == {1, 2}
    assert (found.score, found.truncated, found.unread) == ("global", 0, {})


def test_several_captions_an_image_and_pictures_that_are_gone(records, tmp_path):
    model = small_clip()
    texts = [("Red.", "All red.", "x " * 40), ("Green.",), ("Blue.", "Sky.")]
    items = [CaptionedImage(r.id, r.image, some) for r, some in zip(records, texts, strict=True)]
    lost = CaptionedImage("lost", tmp_path / "lost.png", ("Nothing.", "No."))
    found = evaluate_set(model, CaptionSet("x", [*items[:1], lost, *items[1:]]), ks=(1, 2))
    captions = [caption for some in texts for caption in some]
    owner = torch.tensor([0, 0, 0, 1, 2, 2])
    scores = score_matrix(model, records, captions)
    assert found.retrieval == recall_at_k(scores, ks=(1, 2), text_image=owner)
    assert found.truncated == 1
    assert list(found.unread) == ["lost"] and "missing" in found.unread["lost"]


@pytest.mark.parametrize("score", ["global", "maxsim"])
def test_what_each_caption_found(records, score, tmp_path):
    model = small_clip()
    lost = CaptionedImage("lost", tmp_path / "lost.png", ("Nothing.",))
    items = [lost, *caption_set(records, "x").images]
    found = evaluate_set(model, CaptionSet("x", items), score=score, ks=(1,), show=2).found
    assert found is not None and found.captions == [record.caption for record in records]
    assert found.owners == [1, 2, 3]
    for owner, rank, images, scores in zip(
        found.owners, found.ranks, found.images, found.scores, strict=True
    ):
        assert scores == sorted(scores, reverse=True) and 0 not in images
        assert (images[0] == owner) == (rank == 1)
    assert evaluate_set(model, CaptionSet("x", items), score=score).found is None


def test_maxsim_recall_is_that_of_the_words_and_patches(records):
    model = small_clip()
    found = evaluate_set(model, caption_set(records, "x"), score="maxsim", ks=(1, 2))
    images = torch.stack([image_tensor(load_image(r.image), 32) for r in records])
    scores = torch.zeros(3, 3)
    with torch.no_grad():
        patches = model.project_patches(model.image_tokens(images)[1])
        for column, record in enumerate(records):
            row = model.tokenizer([record.caption])
            words = model.project_words(model.text_tokens(row)[1])[:, 1 : int(row.argmax())]
            scores[:, column] = maxsim_scores(patches, words, normalize=True)[:, 0]
    assert found.retrieval == recall_at_k(scores, ks=(1, 2))


@pytest.mark.parametrize("score", ["whole", "blended", "reranked"])
def test_a_caft_is_judged_by_its_own_scores(records, tmp_path, score):
    torch.manual_seed(0)
    model = Caft.create(CAFT, superpixels="grid").eval()
    items = [CaptionedImage(r.id, r.image, (r.caption, "Short.")) for r in records]
    whole = evaluate_set(model, CaptionSet("x", items), score=score, ks=(1, 3))
    assert whole.retrieval.num_texts == 6 and whole.score == score
    lost = CaptionedImage("lost", tmp_path / "lost.png", ("Nothing.",))
    assert evaluate_set(model, CaptionSet("x", [lost, *items]), score=score, ks=(1, 3)) == (
        whole.__class__(**vars(whole) | {"unread": {"lost": f"{lost.image}: image is missing"}})
    )


def test_what_can_not_be_evaluated(records):
    model, captioned = small_clip(), caption_set(records, "x")
    with pytest.raises(ConfigError, match="'own', 'squash'"):
        evaluate_set(model, captioned, resize="stretch")
    with pytest.raises(ConfigError, match="'global', 'maxsim'"):
        evaluate_set(model, captioned, score="whole")
    with pytest.raises(ConfigError, match="no images"):
        evaluate_set(model, CaptionSet("x", []))


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5]])
    right = torch.tensor([[True, False, True, False], [True, False, False, True]])
    # Right at 1 and 3: (1 + 2/3) / 2. All alike: the two wrong ones first, (1/3 + 2/4) / 2.
    expected = [(1 + 2 / 3) / 2, (1 / 3 + 1 / 2) / 2]
    assert average_precision_at(scores, right, 4).tolist() == pytest.approx(expected)
    assert average_precision_at(scores, right, 1).tolist() == [0.5, 0.0]
    nan = torch.tensor([[float("nan"), 0.0]])
    for owners in ([[True, False]], [[False, True]]):
        assert average_precision_at(nan, torch.tensor(owners), 2).tolist() == [0.5]


def test_joint_precision_is_that_of_all_pictures_and_parts(records):
    model = small_clip()
    found = joint_precision(model, records, at=4, batch_size=2)
    cuts = [crop_region(load_image(r.image), r.pairs[0].box) for r in records]
    with torch.no_grad():
        wholes = [load_image(r.image) for r in records]
        v = model.encode_image(torch.stack([image_tensor(p, 32) for p in [*wholes, *cuts]]))
        texts = [r.caption for r in records] + [r.sentences[1] for r in records]
        scores = model.encode_text(model.tokenizer(texts)) @ v.T
    owner = torch.arange(3).repeat(2)
    right = owner[:, None] == owner
    expected = average_precision_at(scores, right, 4).mean()
    assert found.text_to_image == pytest.approx(float(expected), abs=1e-6)
    assert (found.at, found.records) == (4, 3)


def test_a_broken_picture_costs_no_result_and_a_files_name_no_papers_rows(records, tmp_path):
    half = tmp_path / "red.jpg"  # whose header is whole
    Image.effect_noise((48, 32), 50).convert("RGB").save(half)
    half.write_bytes(half.read_bytes()[:800])
    write_glit([replace(records[0], image=half), *records[1:]], tmp_path / "coco.jsonl")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    command = [
        "eval", "--model", tmp_path / "model.json", "--data", tmp_path / "coco.jsonl",
        "--json", tmp_path / "e.json", "--resize", "squash", "--device", "cpu",
    ]  # fmt: skip
    done = fastgoal(*command)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "e.json").read_text())
    assert document["published"] == [] and document["resize"] == "squash"
    (found,) = document["models"]
    assert list(found["retrieval"]["unread"]) == ["red"]
    assert found["joint"]["records"] == found["pointing"]["sentences"] == 2
    # What is said is of what was evaluated.
    assert "coco: 2 images, 2 captions" in done.output
    left_out = "1 images could not be read and are left out with their captions, which makes"
    assert left_out in done.output and document["note"].startswith(left_out)
    wrong = fastgoal(*command, "--score", "whole")
    assert wrong.exit_code == 2 and "has global, maxsim" in wrong.output


def test_the_command(records, tmp_path):
    write_glit(records, tmp_path / "data.jsonl")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    for name in ("red", "blue"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.png").write_bytes((tmp_path / f"{name}.png").read_bytes())
    command = [
        "eval", "--model", tmp_path / "model.json", "--before", tmp_path / "model.json",
        "--data", tmp_path / "data.jsonl", "--classes", tmp_path / "classes",
        "--trained-on", tmp_path / "data.jsonl", "--device", "cpu", "--json", tmp_path / "e.json",
        "--sheets", tmp_path / "sheets",
    ]  # fmt: skip
    done = fastgoal(*command)
    assert done.exit_code == 0, done.output
    assert done.output.count("3 test images are among the training images") == 1
    document = json.loads((tmp_path / "e.json").read_text())
    before, after = document["models"]
    assert before["retrieval"] == after["retrieval"]
    assert after["classes"]["pictures"] == 2 and after["pointing"]["sentences"] == 3
    assert after["joint"]["records"] == 3
    assert len(list((tmp_path / "sheets").glob("rank-*.png"))) == 3
    recall = after["retrieval"]["text_to_image"]["1"]
    assert recall["interval"][0] <= recall["recall"] <= recall["interval"][1]
    # Each of three has its own in its best five, whatever the model.
    assert list(after["retrieval"]["text_to_image"]) == ["1"]
    assert "R@1 text → image" in done.output and "R@5" not in done.output
    assert done.output.count("K takes every candidate") == 1
    # Of two classes the best five are both, whatever the model.
    assert after["classes"]["top5"] is None and "zero-shot top-5" not in done.output
    assert "top-5 is left out: it takes all of 2 classes" in done.output
    nothing = fastgoal("eval", "--model", tmp_path / "model.json")
    assert nothing.exit_code == 2 and "nothing to evaluate on" in nothing.output


def test_pictures_of_classes_that_can_not_be_read_are_named(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    for number in range(6):
        (tmp_path / "classes" / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(
            tmp_path / "classes" / f"class{number}" / "1.png"
        )
    (tmp_path / "classes" / "class0" / "broken.png").write_bytes(b"no picture")
    done = fastgoal(
        "eval", "--model", tmp_path / "model.json", "--classes", tmp_path / "classes",
        "--device", "cpu", "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = "1 pictures of --classes could not be read and are counted nowhere: "
    assert said in done.output and "broken.png" in done.output
    (found,) = json.loads((tmp_path / "e.json").read_text())["models"]
    assert list(found["classes"]["unread"]) == [str(tmp_path / "classes/class0/broken.png")]
    assert found["classes"]["pictures"] == 6 and found["overlap"] is None
    assert "zero-shot top-5" in done.output and "is left out" not in done.output


@pytest.mark.parametrize(
    "words, refused",
    [
        (
            ["--data", "d.jsonl", "--before-pretrained", "openai"],
            "--before-pretrained openai is of",
        ),
        (["--classes", "c", "--sheets", "s"], "--sheets does nothing with --classes alone"),
        (["--classes", "c", "--trained-on", "t"], "--trained-on does nothing with --classes"),
        (["--classes", "c", "--score", "global"], "--score does nothing with --classes alone"),
        (["--classes", "c", "--root", "r"], "--root does nothing with --classes alone"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, words, refused):
    done = fastgoal("eval", "--model", "no such model", *words)
    assert done.exit_code == 2 and refused in done.output


def test_published_is_for_a_caft(records, tmp_path):
    write_glit(records, tmp_path / "data.jsonl")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    command = ["eval", "--model", tmp_path / "model.json", "--data", tmp_path / "data.jsonl"]
    for word in ("--published", "--no-published"):
        done = fastgoal(*command, word)
        assert done.exit_code == 2 and f"{word} is how captions are cut" in done.output


@pytest.mark.parametrize("trained, foreign", [(True, False), (False, False), (True, True)])
def test_a_cafts_captions_are_cut_as_it_was_trained(
    records, tmp_path, monkeypatch, trained, foreign
):
    """By what its run noted; released weights, of which nothing is, as published."""
    write_glit(records, tmp_path / "data.jsonl")
    (tmp_path / "caft.json").write_text(json.dumps(CAFT))
    torch.manual_seed(0)
    weights = Caft.create(CAFT, superpixels="sfcn" if foreign else "grid").state_dict()
    notes = {} if foreign else {"superpixels": "grid", "published": trained}
    save_file(weights, tmp_path / "caft.safetensors", notes_as_metadata(notes))
    cut = []

    def rows(model, captions, published=False):
        cut.append(published)
        return caft_rows(model, captions, published)

    monkeypatch.setattr(evaluation, "caft_rows", rows)
    command = [
        "eval", "--model", tmp_path / "caft.json", "--pretrained", tmp_path / "caft.safetensors",
        "--data", tmp_path / "data.jsonl", "--device", "cpu", "--json", tmp_path / "e.json",
    ]  # fmt: skip
    for words, expected in (([], trained), (["--published"], True), (["--no-published"], False)):
        done = fastgoal(*command, *words)
        assert done.exit_code == 0, done.output
        (model,) = json.loads((tmp_path / "e.json").read_text())["models"]
        assert model["published_captions"] is expected and cut.pop() is expected
        assert ("captions cut as published" in done.output) == expected


def test_recall_that_any_model_has_is_no_result(records):
    items = [CaptionedImage(r.id, r.image, (r.caption, "Short.")) for r in records]
    found = evaluate_set(small_clip(), CaptionSet("x", items), ks=(1, 2, 3, 5, 6))
    assert list(found.recalls("text_to_image")) == [1, 2]  # of three images
    assert list(found.recalls("image_to_text")) == [1, 2, 3, 5]  # of six texts
    assert found.recalls("image_to_text")[5] == found.retrieval.image_to_text[5]


@pytest.fixture
def tuned(records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tuned_run(records)


def test_the_model_before_reads_as_much_of_a_caption(tuned, tmp_path):
    plain = ["--before", "model.json"]

    def contexts(*words):
        done = fastgoal(*tuned, "run", *words)
        assert done.exit_code == 0, done.output
        models = json.loads((tmp_path / "e.json").read_text())["models"]
        return [(m["context_length"], m["stretched_from"]) for m in models], done.output

    found, said = contexts(*plain)
    assert found == [(36, 24), (36, None)]
    assert said.count("texts of 36 tokens") == 2 and "positions stretched from 24" in said
    found, said = contexts(*plain, "--context-length", 24)
    assert found == [(24, None), (36, None)] and "texts of 24 tokens" in said
    assert contexts("--before", "run")[0] == [(36, None), (36, None)]


@pytest.mark.parametrize("name, fix", [("docci_descriptions.jsonlines", True), ("d.jsonl", False)])
def test_a_file_of_a_known_set_is_named(tmp_path, name, fix):
    (tmp_path / name).write_text('{"image_file": "a.jpg", "description": "A cat."}\n')
    done = fastgoal("eval", "--model", "ViT-B-16", "--data", tmp_path / name)
    assert done.exit_code == 2 and "has no usable record" in done.output
    assert (f"Fix: --set docci or docci-goal --root {tmp_path}" in done.output) == fix

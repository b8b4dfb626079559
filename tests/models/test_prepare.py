"""`prepare`: the pairs of match_pairs, in parts that outlast interruptions and can be shared."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import FastGoalModel, match_pairs, prepare, prepare_command, read_glit
from fastgoal_models.caft.captions import split_published
from fastgoal_models.captions import split_sentences
from fastgoal_models.cli import app
from fastgoal_models.detectors import BoxFile
from fastgoal_models.errors import ConfigError
from fastgoal_models.flism import Matcher, RegionRules, fixed_regions
from fastgoal_models.prepare import PrepareError, Share

CAPTIONS = [
    "A red cat sleeps. It lies on 2.5 blue rugs! The wall is green.",
    "Two dogs run. One is brown. The other is white. The grass is high.",
    "Ein schönes Kätzchen 🐈 sits here. It isn't old. It isn't old.",
    "A boat is near the U.S. coast. Dr. Lee waves.",
    "Only one sentence",
    "Here is a house.\n\nThe roof is black. Its door is red.",
    "A man reads. A woman writes. Both sit at a table.",
]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "width": 32, "heads": 2, "layers": 1},
}


def make_model():
    torch.manual_seed(0)
    return FastGoalModel.create(CONFIG, context_length=77).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_matcher(model, **options):
    options = {"rules": RegionRules(), "batch_size": 10} | options
    return Matcher(model, **options)


def picture(width=60, height=40, seed=0):
    """Blocks of colour, so that every part of it looks different."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR)


def write_rows(folder, rows):
    path = folder / "data.jsonl"
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def make_data(folder):
    """Seven pictures with captions, in four parts of two lines."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for at, caption in enumerate(CAPTIONS):
        name = f"{at}.png"
        picture(60 + at, 40, seed=at).save(folder / name)
        rows.append({"id": f"id {at}", "image": name, "caption": caption, "licence": "CC0"})
    return write_rows(folder, rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run(data, out, matcher, **options):
    return prepare.prepare(
        data, out, matcher, **({"lines_a_part": 2, "root": data.parent} | options)
    )


@pytest.fixture(scope="module")
def undisturbed(data, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "pairs.jsonl"
    assert run(data, out, make_matcher(model)).done
    return out


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def assert_same_and_alone(out, undisturbed):
    """The same bytes, and nothing else left in the folder."""
    assert out.read_bytes() == undisturbed.read_bytes()
    notes = [path.with_name(path.name + ".provenance.json") for path in (out, undisturbed)]
    assert notes[0].read_bytes() == notes[1].read_bytes()
    assert sorted(out.parent.iterdir()) == [out, notes[0]]


class Untouched:
    """An encoder that must not be asked, with the attributes of one."""

    def __init__(self, model):
        self.tokenizer, self.image_size = model.tokenizer, model.image_size

    def encode_image(self, images):
        raise AssertionError("encoded again")

    encode_text = encode_image


# -- what it writes -------------------------------------------------------------------------------


def test_the_pairs_are_those_of_match_pairs(data, model, undisturbed):
    records, report = read_glit(undisturbed, root=data.parent)
    assert report.skipped == 0
    expected = match_pairs(model, read_glit(data)[0], progress=False)
    assert [(r.id, r.caption, r.sentences, r.image, r.width, r.height) for r in records] == [
        (r.id, r.caption, r.sentences, r.image, r.width, r.height) for r in expected
    ]
    for ours, theirs in zip(records, expected, strict=True):
        # Other batches: equal scores may come in another order.
        by_sentence = {pair.sentence: pair for pair in ours.pairs}
        assert len(by_sentence) == len(ours.pairs) == len(theirs.pairs) == len(ours.sentences)
        for pair in theirs.pairs:
            mine = by_sentence[pair.sentence]
            assert (mine.box, mine.region) == (pair.box, pair.region)
            assert mine.score == pytest.approx(pair.score, abs=1e-5)
        scores = [pair.score for pair in ours.pairs]
        assert scores == sorted(scores, reverse=True)


def test_rows_hold_spans_regions_and_the_keys_of_the_input(undisturbed):
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    for row, caption in zip(rows_of(undisturbed), CAPTIONS, strict=True):
        assert row["licence"] == "CC0" and row["caption"] == caption
        tokens = tokenizer(caption)[0]
        assert len(row["spans"]) == len(row["sentences"])
        assert row["spans"][0][0] == 1
        assert int(tokens[row["spans"][-1][1]]) == tokenizer.eot_token_id
        for (start, end), sentence in zip(row["spans"], row["sentences"], strict=True):
            assert tokens[start:end].tolist() == tokenizer.encode(sentence)
        regions = {region["name"]: region["box"] for region in row["regions"]}
        fixed = fixed_regions(row["width"], row["height"])
        assert regions == {name: list(box) for name, box in fixed.items()}
        assert all(regions[pair["region"]] == pair["box"] for pair in row["pairs"])


def test_the_provenance_tells_options_and_counts(data, model, undisturbed):
    notes = json.loads(undisturbed.with_name("pairs.jsonl.provenance.json").read_text())
    assert notes["lines"] == notes["read"] == len(CAPTIONS) and notes["skipped"] == {}
    assert notes["rules"] == {"fixed": True, "most": 32, "least_area": 0.0}
    assert {row["provenance"] for row in rows_of(undisturbed)} == {notes["name"]}


def test_only_the_best_pairs_are_kept(data, model, undisturbed, tmp_path):
    run(data, tmp_path / "best.jsonl", make_matcher(model), keep_pairs=2)
    for few, all_of_them in zip(
        rows_of(tmp_path / "best.jsonl"), rows_of(undisturbed), strict=True
    ):
        assert few["pairs"] == all_of_them["pairs"][:2]
        assert few["sentences"] == all_of_them["sentences"]


def test_captions_cut_the_published_way(data, model, tmp_path):
    run(data, tmp_path / "published.jsonl", make_matcher(model), published=True)
    rows = rows_of(tmp_path / "published.jsonl")
    assert [row["original_caption"] for row in rows] == CAPTIONS
    for row, caption in zip(rows, CAPTIONS, strict=True):
        assert row["sentences"] == [f"{piece}." for piece in split_published(caption)]
        assert row["caption"] == " ".join(row["sentences"])
    assert rows[0]["sentences"][1:3] == ["It lies on 2.", "5 blue rugs! The wall is green."]
    assert rows[0]["sentences"] != split_sentences(CAPTIONS[0])
    assert len(read_glit(tmp_path / "published.jsonl", root=data.parent)[0]) == len(CAPTIONS)


def test_a_caption_without_a_published_sentence_is_named(tmp_path, model):
    picture().save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": "Hm. Ah."}, row("a.png")]
    data = write_rows(tmp_path, rows)
    done = run(data, tmp_path / "out.jsonl", make_matcher(model), published=True)
    assert done.report.names == {"caption has no sentence the published way": ["line 1"]}


def test_a_detectors_boxes_are_regions_too(data, model, tmp_path):
    boxes = tmp_path / "boxes.jsonl"
    cat = {"box": [0, 0, 200, 30], "label": "cat", "score": 0.9}
    boxes.write_text(json.dumps({"image": "1.png", "boxes": [cat]}) + "\n")
    out, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    run(data, out, make_matcher(model, detector=BoxFile(boxes)))
    rows = rows_of(out)
    assert [len(row["regions"]) for row in rows] == [5, 6, 5, 5, 5, 5, 5]
    assert rows[1]["regions"][5] == {"name": "cat", "box": [0, 0, 61, 30], "score": 0.9}
    # Without the fixed regions, pictures without boxes stay without pairs, and in the file.
    rules = RegionRules(fixed=False)
    run(data, alone, make_matcher(model, detector=BoxFile(boxes), rules=rules))
    assert [{pair["region"] for pair in row["pairs"]} for row in rows_of(alone)] == [
        {"cat"} if at == 1 else set() for at in range(len(CAPTIONS))
    ]
    with pytest.raises(ConfigError, match="no regions without the fixed ones"):
        make_matcher(model, rules=rules)


def test_the_command_keeps_all_boxes_of_a_file_and_tells_of_pictures_without(tmp_path):
    data = make_data(tmp_path / "data")
    (data.parent / "link.png").symlink_to(data.parent / "2.png")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    sure, unsure = (
        {"box": [0, 0, 20, 30], "label": n, "score": s} for n, s in (("a", 0.9), ("b", 0.2))
    )
    boxes = tmp_path / "boxes.jsonl"

    def regions(images, *words):
        rows = [{"image": image, "boxes": [sure, unsure]} for image in images]
        boxes.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        command = [
            "prepare", "--data", data, "--root", data.parent, "--out", out, "--device", "cpu",
            "--model", tmp_path / "model.json", "--detector", boxes, *words,
        ]  # fmt: skip
        done = CliRunner().invoke(app, list(map(str, command)), env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.output
        return [[r["name"] for r in row["regions"][5:]] for row in rows_of(out)], done.output

    found, said = regions(["./1.png", "link.png"])
    assert found == [[], ["a", "b"], ["a", "b"], [], [], [], []]
    assert f"5 of 7 pictures have no boxes in {boxes}" in said
    found, said = regions([f"{at}.png" for at in range(7)], "--least-score", 0.5)
    assert found == [["a"]] * 7 and "have no boxes" not in said
    alone = ["prepare", "--data", data, "--out", tmp_path / "x.jsonl", "--least-score", 0.5]
    refused = CliRunner().invoke(app, [*map(str, alone), "--device", "cpu"])
    assert refused.exit_code == 2 and "Fix: name a --detector" in refused.output


# -- interrupted, resumed, shared out -------------------------------------------------------------


@pytest.mark.parametrize("after", range(1, len(CAPTIONS) + 1))
def test_interrupted_and_resumed_is_undisturbed(data, model, undisturbed, tmp_path, after):
    out = tmp_path / "pairs.jsonl"

    def interrupt(at, of):
        assert of == len(CAPTIONS)
        if at == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, out, make_matcher(model), on_images=interrupt)
    assert not out.exists()
    done = run(data, out, make_matcher(model))
    assert done.done and done.images == len(CAPTIONS) - (after - 1) // 2 * 2
    assert_same_and_alone(out, undisturbed)


def test_interrupted_at_every_picture(data, model, undisturbed, tmp_path):
    """Again and again: parts that are done are kept, so that it ends all the same."""
    out, interrupted = tmp_path / "pairs.jsonl", 0

    def interrupt_every_second(at, of):
        if at == 3:
            raise KeyboardInterrupt

    while True:
        try:
            run(data, out, make_matcher(model), on_images=interrupt_every_second)
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
    assert interrupted == 3
    assert_same_and_alone(out, undisturbed)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_shards_in_any_order_make_one_file(data, model, undisturbed, tmp_path, order):
    out = tmp_path / "pairs.jsonl"
    left = {1: 4 - 2, 2: 4 - 1, 3: 4 - 1}  # parts 0 and 3 are the first shard's
    missing = 4
    for number in order:
        done = run(data, out, make_matcher(model), share=Share.parse(f"{number}/3"))
        missing -= 4 - left[number]
        assert (done.parts, done.parts_missing) == (4, missing)
        assert done.done == (missing == 0) == out.exists()
    assert done.report.read == len(CAPTIONS)
    assert_same_and_alone(out, undisturbed)


def test_a_shard_that_comes_late_finds_the_file(data, model, undisturbed, tmp_path, monkeypatch):
    """The other shard joins all parts between this one's last and its look at what is there."""
    out = tmp_path / "pairs.jsonl"
    run(data, out, make_matcher(model), share=Share(0, 2))
    write = prepare.write_text_atomically

    def write_and_be_late(path, text):
        write(path, text)
        if path.name == "00000003.json":
            monkeypatch.setattr(prepare, "write_text_atomically", write)
            run(data, out, make_matcher(model), share=Share(0, 2))

    monkeypatch.setattr(prepare, "write_text_atomically", write_and_be_late)
    done = run(data, out, make_matcher(model), share=Share(1, 2))
    assert done.done and done.report.read == len(CAPTIONS)
    assert_same_and_alone(out, undisturbed)


def test_two_shards_may_join_at_once(data, model, undisturbed, tmp_path, monkeypatch):
    out, join = tmp_path / "pairs.jsonl", prepare._join

    def the_other_is_faster(*arguments):
        monkeypatch.setattr(prepare, "_join", join)
        run(data, out, make_matcher(Untouched(model), device="cpu"))
        return join(*arguments)

    monkeypatch.setattr(prepare, "_join", the_other_is_faster)
    done = run(data, out, make_matcher(model))
    assert done.done and done.report.read == len(CAPTIONS)
    assert_same_and_alone(out, undisturbed)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "-1/3", "1/3/3", "½/2"])
def test_shards_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match="a shard is written like 2/8"):
        Share.parse(text)


def test_a_finished_file_is_not_made_again(data, model, undisturbed):
    before = undisturbed.stat().st_mtime_ns
    done = run(data, undisturbed, make_matcher(Untouched(model), device="cpu"))
    assert done.done and done.images == 0 and done.report.read == len(CAPTIONS)
    assert undisturbed.stat().st_mtime_ns == before


@pytest.mark.parametrize("moment", ["before the file", "before its note", "before the parts go"])
def test_stopped_while_it_ends(data, model, undisturbed, tmp_path, monkeypatch, moment):
    out = tmp_path / "pairs.jsonl"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            prepare,
            {
                "before the file": "_join",
                "before its note": "_note",
                "before the parts go": "remove_parts",
            }[moment],
            stop,
        )
        with pytest.raises(KeyboardInterrupt):
            run(data, out, make_matcher(model))
    assert out.exists() == (moment != "before the file")
    done = run(data, out, make_matcher(Untouched(model), device="cpu"))
    assert done.done and done.report.read == len(CAPTIONS)
    assert_same_and_alone(out, undisturbed)


# -- refusals -------------------------------------------------------------------------------------


def test_parts_of_another_run_are_refused(data, model, tmp_path):
    out = tmp_path / "pairs.jsonl"
    run(data, out, make_matcher(model), share=Share(0, 2), identity={"weights": "a"})
    changes = {
        "keep_pairs": {"keep_pairs": 1},
        "published": {"published": True},
        "weights": {"identity": {"weights": "b"}},
        "lines_a_part": {"lines_a_part": 3},
    }
    for name, change in changes.items():
        options = {"identity": {"weights": "a"}} | change
        with pytest.raises(PrepareError, match=f"differs in {name}. Fix"):
            run(data, out, make_matcher(model), **options)
    rules = make_matcher(model, rules=RegionRules(least_area=0.1), batch_size=20)
    with pytest.raises(PrepareError, match="differs in batch_size, rules"):
        run(data, out, rules, identity={"weights": "a"})
    other = tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes().replace(b"cat", b"dog"))
    with pytest.raises(PrepareError, match=r"differs in data\. Fix"):
        run(other, out, make_matcher(model), root=data.parent, identity={"weights": "a"})


def test_a_file_of_another_run_is_refused_and_left_alone(data, model, undisturbed, tmp_path):
    out = tmp_path / "pairs.jsonl"
    run(data, out, make_matcher(model))
    before = out.read_bytes()
    with pytest.raises(PrepareError, match=r"was made otherwise\. Fix: another --out"):
        run(data, out, make_matcher(model), keep_pairs=1)
    assert out.read_bytes() == before
    own = tmp_path / "own.jsonl"
    own.write_text("mine\n")
    with pytest.raises(PrepareError, match="was made otherwise"):
        run(data, own, make_matcher(model))
    assert own.read_text() == "mine\n"
    with pytest.raises(PrepareError, match="was made otherwise"):
        run(data, data, make_matcher(model))  # the input itself


def test_a_removed_file_is_made_anew_with_other_options(data, model, tmp_path, monkeypatch):
    """Its old note must not make the new file, stopped before its own, look like another's."""
    out = tmp_path / "pairs.jsonl"
    run(data, out, make_matcher(model))
    out.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_note", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(data, out, make_matcher(model), keep_pairs=1)
    assert run(data, out, make_matcher(model), keep_pairs=1).done
    assert {len(row["pairs"]) for row in rows_of(out)} == {1}


def test_parts_half_removed_are_not_taken_for_another_runs(data, model, tmp_path, monkeypatch):
    """Stopped while the parts were removed; then the file was removed, and the options changed."""
    out = tmp_path / "pairs.jsonl"
    with monkeypatch.context() as patched:
        unlink, done = Path.unlink, []

        def stop_at_the_second(path, **options):
            if path.parent.name.endswith(".parts") and path.suffix == ".json":
                done.append(path)
                if len(done) == 2:
                    raise KeyboardInterrupt
            unlink(path, **options)

        patched.setattr(Path, "unlink", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(data, out, make_matcher(model))
    out.unlink()
    with pytest.raises(PrepareError, match="differs in keep_pairs"):
        run(data, out, make_matcher(model), keep_pairs=1)


@pytest.mark.parametrize(
    "rows, why",
    [
        ([b" ", b"", b"\t"], "0 records read"),
        ([b"{", {"image": "gone.png"}], r"1 × line is not JSON: line 1\n  1 × caption is empty"),
        ([{"image": f"{name}.png", "caption": "A cat."} for name in "ab"], "Fix: --root FOLDER"),
    ],
)
def test_data_of_which_nothing_can_be_used_leaves_nothing(tmp_path, model, rows, why):
    data, out = write_rows(tmp_path, rows), tmp_path / "out" / "pairs.jsonl"
    with pytest.raises(PrepareError, match=f"(?s)has no usable record.*{why}"):
        run(data, out, make_matcher(model), lines_a_part=1)
    assert list(out.parent.iterdir()) == []
    picture().save(tmp_path / "good.png")
    write_rows(tmp_path, [row("good.png"), row("gone.png")])
    done = run(data, out, make_matcher(model))
    assert done.done and (done.report.read, done.report.skipped) == (1, 1)
    assert done.images == 1  # not those that were only looked for


def test_a_share_may_be_without_a_usable_record(tmp_path, model):
    picture().save(tmp_path / "a.png")
    data, out = write_rows(tmp_path, [row("gone.png"), row("a.png")]), tmp_path / "pairs.jsonl"
    first = run(data, out, make_matcher(model), share=Share(0, 2), lines_a_part=1)
    assert not first.done and first.report.read == 0
    assert run(data, out, make_matcher(model), share=Share(1, 2), lines_a_part=1).done


def test_another_folders_pairs_say_where_their_pictures_are(data, undisturbed):
    """Whoever forgets --root, as they did not need it to make the file, is told what it was."""
    records, report = read_glit(undisturbed)
    assert records == [] and f"Fix: --root {data.parent}, or" in str(report)
    assert len(read_glit(undisturbed, root=data.parent)[0]) == len(CAPTIONS)


def test_ctrl_c_says_what_is_kept(tmp_path, model, monkeypatch):
    data, out = make_data(tmp_path / "data"), tmp_path / "pairs.jsonl"

    def interrupt(at, of):
        if at == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, out, make_matcher(model), on_images=interrupt, lines_a_part=3)
    assert prepare.kept_lines(data, out, 3) == (6, 7)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_command, "prepare", stop)
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    words = ["prepare", "--data", data, "--out", out, "--model", tmp_path / "model.json"]
    done = CliRunner().invoke(app, [*map(str, words), "--device", "cpu"], env={"COLUMNS": "300"})
    assert done.exit_code == 130
    assert "Stopped: 7 of 7 lines are kept; the same command goes on." in done.output


def test_input_that_is_not_there_is_refused(tmp_path, model):
    with pytest.raises(PrepareError, match=r"none\.jsonl: there is no such file"):
        run(tmp_path / "none.jsonl", tmp_path / "out.jsonl", make_matcher(model))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(PrepareError, match=r"empty\.jsonl is empty"):
        run(tmp_path / "empty.jsonl", tmp_path / "out.jsonl", make_matcher(model))


# -- input of every kind --------------------------------------------------------------------------


def row(image, caption=CAPTIONS[0], **more):
    return {"id": image, "image": image, "caption": caption} | more


BAD = {
    "corrupt.jpg": "image is corrupt",
    "cut.jpg": "image is corrupt",
    "empty.jpg": "image is empty (zero bytes)",
    "missing.jpg": "image is missing",
    "../outside.png": "image leaves the data folder",
    "link.png": "image leaves the data folder",
    "bomb.png": "image has more than 30,000 pixels",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_left_out_is_counted_and_named(tmp_path, model, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    picture().save(folder / "good.png")
    picture().save(tmp_path / "outside.png")
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8 this is no picture")
    noise = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    picture(200, 200).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    absolute = str(tmp_path / "outside.png")
    rows = [
        row("good.png"),
        *map(row, BAD),
        row(absolute),
        json.dumps(row("good.png")).encode()[:-2] + b'\xff"}',
        b'{"image": "good.png", "cap',
        row("good.png", caption=" "),
        row("good.png", id="another"),
    ]
    data = write_rows(folder, rows)
    done = run(data, tmp_path / "out.jsonl", make_matcher(model))
    assert [found["id"] for found in rows_of(tmp_path / "out.jsonl")] == ["good.png", "another"]
    assert done.report.read == 2 and done.report.skipped == len(rows) - 2
    named = [(name, reason) for reason, names in done.report.names.items() for name in names]
    expected = [*BAD.items(), (absolute, "image leaves the data folder")]
    for at, (image, reason) in enumerate(expected, start=2):
        assert any(why == reason and f"line {at} (" in n and image in n for n, why in named), image
    names = done.report.names
    assert names["line is not UTF-8"] == ["line 10"]
    assert names["line is not JSON"] == ["line 11"]
    assert names["caption is empty"] == ["line 12 (good.png)"]
    assert done.report.counts["image leaves the data folder"] == 3
    # The note keeps them for whoever finds the file later.
    assert run(data, tmp_path / "out.jsonl", make_matcher(model)).report == done.report


def test_of_equal_ids_across_parts_the_first_stays(data, model, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    rows = rows_of(folder / "data.jsonl")
    rows[5]["id"] = rows[6]["id"] = rows[0]["id"]
    out = tmp_path / "out.jsonl"
    done = run(write_rows(folder, rows), out, make_matcher(model))
    assert (done.report.read, done.report.counts) == (5, {"id appears twice": 2})
    assert done.report.names == {"id appears twice": ["id 0", "id 0"]}
    assert [found["image"] for found in rows_of(out)] == [f"{at}.png" for at in range(5)]


def odd_pictures(folder):
    """Pictures that are unusual and good: their names, with the sizes they are seen in."""
    picture(50, 30).convert("CMYK").save(folder / "cmyk.jpg")
    picture(50, 30).convert("P").save(folder / "palette.png")
    grey = np.linspace(0, 65535, 30 * 50).reshape(30, 50).astype(np.uint16)
    Image.fromarray(grey).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(50, 30).save(folder / "turned.jpg", exif=exif, quality=95)
    picture(20_000, 40).save(folder / "panorama.png")
    picture(1, 1).save(folder / "dot.png")
    picture(50, 30).convert("L").save(folder / "grey.jpg")
    return {
        "cmyk.jpg": (50, 30), "palette.png": (50, 30), "deep.png": (50, 30),
        "turned.jpg": (30, 50), "panorama.png": (20_000, 40), "dot.png": (1, 1),
        "grey.jpg": (50, 30),
    }  # fmt: skip


def test_odd_pictures_work(tmp_path, model):
    sizes = odd_pictures(tmp_path)
    data = write_rows(tmp_path, map(row, sizes))
    done = run(data, tmp_path / "out.jsonl", make_matcher(model))
    assert done.report.skipped == 0
    for found in rows_of(tmp_path / "out.jsonl"):
        width, height = size = sizes[found["image"]]
        assert (found["width"], found["height"]) == size
        assert len(found["pairs"]) == 3
        boxes = {region["name"]: region["box"] for region in found["regions"]}
        assert boxes["lower right"] == [width / 2, height / 2, width, height]


def test_a_turned_picture_is_matched_upright(tmp_path, model):
    odd_pictures(tmp_path)
    with Image.open(tmp_path / "turned.jpg") as image:
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    data = write_rows(tmp_path, [row("turned.jpg"), row("upright.png")])
    run(data, tmp_path / "out.jsonl", make_matcher(model))
    turned, upright = rows_of(tmp_path / "out.jsonl")
    assert [p["region"] for p in turned["pairs"]] == [p["region"] for p in upright["pairs"]]
    for a, b in zip(turned["pairs"], upright["pairs"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)

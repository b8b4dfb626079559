"""FAST-GOAL from webdataset shards: the same as from a folder, wherever a run is stopped."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models import FastGoalDataset, FastGoalModel, read_glit, write_glit
from fastgoal_models.checkpoints import latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import GlitError, UserError
from fastgoal_models.glit import GlitRecord, LocalPair
from fastgoal_models.glit_shards import load_from_shard, read_glit_shards
from tests.models.small_models import CONFIG
from tests.models.test_training import assert_same_bits

COLOURS = ("red", "green", "blue", "black", "white")


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path) -> Path:
    """`data.jsonl` with pictures, and the same in `part-0.tar` and `part-1.tar`."""
    records = []
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (48, 32), colour)
        picture.putpixel((number, number), (9, 9, 9))
        picture.save(tmp_path / f"{colour}.png")
        sentences = (f"A {colour} rectangle.", "It has a dark spot.", "It is plain.")
        pairs = (
            LocalPair(1, (0.0, 0.0, 24.0, 16.0), "upper left", 0.5),
            LocalPair(2, (0.0, 0.0, 48.0, 32.0), "all", 0.4),
        )
        record = GlitRecord(
            colour, tmp_path / f"{colour}.png", 48, 32, " ".join(sentences), sentences, pairs
        )
        records.append(record)
    data = write_glit(records, tmp_path / "data.jsonl")
    lines = data.read_bytes().splitlines()
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        files: dict[str, bytes] = {}
        for number in numbers:
            files[f"{number:04}.json"] = lines[number]
            files[f"{number:04}.png"] = (tmp_path / f"{COLOURS[number]}.png").read_bytes()
        write_shard(tmp_path / f"part-{shard}.tar", files)
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    return tmp_path


def fastgoal(folder: Path, data: str, out: str, *words: object):
    found = CliRunner().invoke(
        app,
        [
            "train", "fast-goal", "--data", str(folder / data), "--out", str(folder / out),
            "--model", str(folder / "model.json"), "--context-length", "24", "--steps", "6",
            "--batch-size", "2", "--device", "cpu", "--lr", "1e-3", "--save-every", "1",
            *map(str, words),
        ],
        env={"COLUMNS": "400"},
    )  # fmt: skip
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def test_items_are_those_of_a_folder(folder):
    records, _ = read_glit(folder / "data.jsonl")
    samples, report = read_glit_shards(folder / "part-*.tar")
    assert str(report) == "5 records read, none skipped"
    tokenizer = FastGoalModel.create(CONFIG, context_length=24).tokenizer
    how = {"sampling": "uniform", "seed": 2}
    one = FastGoalDataset(records, tokenizer, 32, 24, **how)
    two = FastGoalDataset(samples, tokenizer, 32, 24, **how, load=load_from_shard)
    for epoch in range(3):
        for index in (4, 0, 3, 2, 1):
            for here, there in zip(one.at(epoch, index), two.at(epoch, index), strict=True):
                assert torch.equal(here, there)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_that_of_a_folder_and_resumes_exactly(folder, workers):
    more = ["--pairs", "uniform", "--num-workers", workers]
    code, said = fastgoal(folder, "data.jsonl", "files", "--pairs", "uniform")
    assert code == 0, said
    code, said = fastgoal(folder, "part-*.tar", "shards", *more)
    assert code == 0 and "5 records read, none skipped" in said, said
    last = "checkpoints/step-00000006"
    assert_same_bits(folder / "shards" / last, folder / "files" / last)
    whole = load_checkpoint(folder / "shards" / last).weights
    for path in (folder / "shards" / last).iterdir():
        path.unlink()
    (folder / "shards" / last).rmdir()
    assert latest_checkpoint(folder / "shards/checkpoints").name == "step-00000005"
    code, said = fastgoal(folder, "part-*.tar", "shards", *more, "--resume")
    assert code == 0, said
    again = load_checkpoint(folder / "shards" / last).weights
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    (folder / "part-1.tar").unlink()
    code, said = fastgoal(folder, "part-*.tar", "shards", *more, "--resume")
    assert code == 2 and "records was 5, is now 3" in said


def test_an_id_that_is_null_is_the_samples_name(folder):
    png, row = (
        (folder / "red.png").read_bytes(),
        json.dumps({"id": None, "captions": ["A square.", "It is red."]}).encode(),
    )
    files = {"a.json": row, "a.png": png, "b.json": row, "b.png": png}
    write_shard(folder / "null.tar", files)
    samples, report = read_glit_shards(folder / "null.tar")
    assert [sample.id for sample in samples] == ["null.tar/a", "null.tar/b"]
    assert {sample.caption for sample in samples} == {"A square."} and report.skipped == 0


def test_what_can_not_be_used_is_counted(folder):
    png = (folder / "red.png").read_bytes()
    row = json.loads((folder / "data.jsonl").read_bytes().splitlines()[0])

    def changed(**values) -> bytes:
        return json.dumps(row | values).encode()

    write_shard(
        folder / "bad.tar",
        {
            "a.json": changed(id="a"), "a.png": png,
            "b.json": changed(id="b"),
            "c.png": png,
            "d.json": b"{", "d.png": png,
            "e.json": changed(id="e", caption=" "), "e.png": png,
            "f.json": changed(id="f", sentences=["Other."]), "f.png": png,
            "g.json": changed(id="g"), "g.png": png[:60],
            "h.json": changed(id="h", width=5), "h.png": png,
            "i.json": changed(id="i", pairs=[{"sentence": 9}]), "i.png": png,
            "j.json": changed(id="a"), "j.png": png,
            "k.json": changed(id="k", caption="A \ud800 thing."), "k.png": png,
            "l.json": b"[]", "l.png": png,
        },
    )  # fmt: skip
    records, report = read_glit_shards(folder / "bad.tar")
    assert [record.id for record in records] == ["a"] and report.read == 1
    assert report.counts == {
        "sample has no image": 1,
        "sample has no caption": 1,
        "line is not JSON": 1,
        "line is not an object": 1,
        "caption is empty": 1,
        "caption is not valid Unicode": 1,
        "sentences do not make up the caption": 1,
        "image is corrupt": 1,
        "boxes are for a picture of another size": 1,
        "local pair names no sentence or no part of the picture": 1,
        "id appears twice": 1,
    }
    with pytest.raises(GlitError, match=r"bad\.tar/b: sample has no image"):
        read_glit_shards(folder / "bad.tar", strict=True)
    whole = (folder / "part-0.tar").read_bytes()
    (second, *_) = [r for r in read_glit_shards(folder / "part-0.tar")[0] if r.id == "green"]
    (folder / "cut.tar").write_bytes(whole[: second.place.offset + 20])
    records, report = read_glit_shards(folder / "cut.tar")
    assert [record.id for record in records] == ["red"]
    assert report.counts.get("shard is broken") == 1
    with pytest.raises(GlitError, match="shard is broken"):
        read_glit_shards(folder / "cut.tar", strict=True)
    with pytest.raises(UserError, match="there is no shard"):
        read_glit_shards(folder / "none-*.tar")


def test_a_shard_that_changed_is_said(folder):
    records, _ = read_glit_shards(folder / "part-0.tar")
    (folder / "part-0.tar").write_bytes(b"\0" * 20480)
    with pytest.raises(GlitError, match=r"part-0\.tar/0000\.png"):
        load_from_shard(records[0])


def test_options_that_do_not_go_with_shards(folder):
    code, said = fastgoal(folder, "part-*.tar", "run", "--root", folder)
    assert code == 2 and "shards hold theirs" in said
    row = {"image": "x.png", "caption": "A red thing. It is plain."}
    write_shard(
        folder / "plain.tar",
        {"a.json": json.dumps(row).encode(), "a.png": (folder / "red.png").read_bytes()},
    )
    records, _ = read_glit_shards(folder / "plain.tar")
    assert records[0].id == "plain.tar/a" and len(records[0].sentences) == 2
    code, said = fastgoal(folder, "p*.tar", "run")
    assert code == 2, said
    assert "1 of 6 samples have no local pair, e.g. plain.tar/a" in said
    assert "fastgoal prepare" in said

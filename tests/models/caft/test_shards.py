"""Samples of shards: those of a folder, wherever they lie; what is broken is counted and named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models.caft import Caft, CaftConfig
from fastgoal_models.caft.data import CaftDataset, Splitting, read_caft
from fastgoal_models.caft.shards import read_shards
from fastgoal_models.checkpoints import load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import UserError

LONG = "A cat sits. It is {}. The sofa is red. A lamp stands behind."
COLOURS = ("red", "green", "blue", "black", "white", "grey")
TINY = {
    "embed_dim": 32, "pool_heads": 2,
    "vision_cfg": {"image_size": 32, "width": 32, "heads": 2, "layers": [1, 1, 1, 1],
                   "tokens": [4, 3, 2]},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
                 "parts": 4, "whole_layers": 1, "adapter_width": 16},
}  # fmt: skip


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, "PNG")
    return file.getvalue()


def captions(colour: str) -> dict[str, str]:
    return {"raw_caption": f"a {colour} cat", "longSV_captions": LONG.format(colour)}


def write_shard(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def files_of(number: int, colour: str) -> dict[str, bytes]:
    return {
        f"some/{number}.png": png(colour),
        f"some/{number}.json": json.dumps(captions(colour)).encode(),
        f"some/{number}.txt": b"not read",
    }


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two shards with three samples each; the pattern that names them."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for number, colour in enumerate(COLOURS[3 * shard : 3 * shard + 3]):
            files |= files_of(number, colour)
        write_shard(tmp_path / f"part-{shard}.tar", files)
    return tmp_path / "part-*.tar"


def test_items_are_those_of_a_folder(shards, tmp_path):
    rows = []
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
        rows.append({"image": f"{colour}.png"} | captions(colour))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = Caft.create(TINY, superpixels="grid").tokenizer
    for splitting in (Splitting(), Splitting.published()):
        samples, report = read_shards(shards, splitting)
        assert str(report) == "6 records read, none skipped"
        records, _ = read_caft(tmp_path / "data.jsonl", splitting=splitting)
        sharded, folder = (
            CaftDataset(found, tokenizer, 32, seed=3, splitting=splitting)
            for found in (samples, records)
        )
        assert len(sharded) == len(folder) == 6
        for index in range(6):
            for one, other in zip(sharded.at(2, index), folder.at(2, index), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [0, 100])  # before the second image's header, and within it
def test_a_shard_cut_between_files_is_broken(tmp_path, cut):
    whole = tmp_path / "a.tar"
    write_shard(whole, files_of(0, "red") | files_of(1, "blue"))
    with tarfile.open(whole) as tar:
        start = tar.getmember("some/1.png").offset
    whole.write_bytes(whole.read_bytes()[: start + cut])
    _, report = read_shards(whole)
    assert report.counts["shard is broken"] == 1


def test_broken_samples_are_counted_and_named(tmp_path):
    good = files_of(0, "red")
    files = good | {
        "cut.jpg": png("red")[:50], "cut.json": json.dumps(captions("red")).encode(),
        "none.json": b"{}", "mute.png": png("red"), "odd.png": png("red"), "odd.json": b"[",
        "silent.png": png("red"), "silent.json": b'{"raw_caption": " "}',
    }  # fmt: skip
    write_shard(tmp_path / "a.tar", files)
    write_shard(tmp_path / "b.tar", good, mode="w:gz")
    whole = tmp_path / "c.tar"
    write_shard(whole, good | files_of(1, "blue"))
    with tarfile.open(whole) as tar:
        end = tar.getmember("some/1.png").offset_data + 20
    whole.write_bytes(whole.read_bytes()[:end])
    samples, report = read_shards(tmp_path / "*.tar")
    assert [sample.name.partition(" ")[0] for sample in map(samples.__getitem__, range(2))] == [
        "a.tar", "c.tar",
    ]  # fmt: skip
    assert len(samples) == report.read == 2
    assert report.counts == {
        "image is corrupt": 1, "sample has no image": 1, "sample has no caption": 3,
        "line is not JSON": 1, "shard is broken": 2,
    }  # fmt: skip
    said = str(report)
    for name in ("a.tar/cut", "a.tar/none", "a.tar/mute", "a.tar/odd", "b.tar (", "c.tar ("):
        assert name in said
    with pytest.raises(UserError, match=r"there is no shard .*x-\*\.tar"):
        read_shards(tmp_path / "x-*.tar")


def test_the_digest_knows_names_and_captions(shards):
    first = read_shards(shards)[0].digest
    assert read_shards(shards)[0].digest == first
    path = shards.parent / "part-1.tar"
    path.write_bytes(path.read_bytes().replace(b"a white cat", b"a quiet cat"))
    changed = read_shards(shards)[0].digest
    path.rename(shards.parent / "part-2.tar")
    assert len({first, changed, read_shards(shards)[0].digest}) == 3


def test_a_run_from_shards_resumes_to_the_same_bits(shards, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CaftConfig.load(TINY).as_json()))

    def run(out: str, *more: object, code: int = 0) -> str:
        command = [
            "train", "caft", "--data", shards, "--out", tmp_path / out, "--steps", 4, "--device",
            "cpu", "--model", tmp_path / "tiny.json", "--batch-size", 2, "--save-every", 3, *more,
        ]  # fmt: skip
        done = CliRunner().invoke(app, [str(word) for word in command], env={"COLUMNS": "300"})
        assert done.exit_code == code, done.output
        return done.output

    assert "6 records read, none skipped" in run("a", "--num-workers", 1)
    last = tmp_path / "a" / "checkpoints" / "step-00000004"
    undisturbed = load_checkpoint(last).weights
    (last / "checkpoint.json").unlink()  # as if the run had been killed while it saved
    run("a", "--resume")
    resumed = load_checkpoint(last).weights
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert "shards hold theirs" in run("b", "--root", tmp_path, code=2)

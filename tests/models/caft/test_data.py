"""CAFT's data: captions by name, items of seed, epoch and place alone, broken samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgoal_models.caft import Caft
from fastgoal_models.caft.data import (
    CaftDataset,
    Splitting,
    collate,
    read_caft,
    shard_samples,
)
from fastgoal_models.errors import UserError
from fastgoal_models.skips import SkipReport

LONG = "A cat sits. It is black. The sofa is red. A lamp stands behind."


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png())
    (tmp_path / "images" / "cut.png").write_bytes(png()[:60])
    (tmp_path / "images" / "none.png").write_bytes(b"")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    return Caft.create("caft-xs", superpixels="grid").tokenizer


def write(folder: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    return folder / "data.jsonl"


def test_captions_by_name_and_broken_samples_counted(folder):
    path = write(
        folder,
        {"image": "images/a.png", "raw_caption": "a cat", "longIB_captions": LONG,
         "shortSV_captions": ["A cat.", "A sofa."]},
        {"image": "images/b.png", "caption": LONG},
        {"image": "images/b.png", "raw_caption": "  "},
        {"image": "images/cut.png", "caption": LONG},
        {"image": "images/none.png", "caption": LONG},
        {"image": "images/gone.png", "caption": LONG},
        {"image": "../outside.png", "caption": LONG},
        {"image": "/etc/passwd", "caption": LONG},
        {"caption": LONG},
        b"{broken",
        b'"\xff"',
        b"[1]",
    )  # fmt: skip
    records, report = read_caft(path)
    assert [record.image.name for record in records] == ["a.png", "b.png"]
    assert records[0].captions == {
        "raw_caption": ["a cat"],
        "shortSV": ["A cat.", "A sofa."],
        "longIB": ["A cat sits.", "It is black.", "The sofa is red.", "A lamp stands behind."],
    }
    assert list(records[1].captions) == ["long"] and len(records[1].captions["long"]) == 4
    assert report.read == 2 and report.skipped == 10
    assert report.counts["image leaves the data folder"] == 2
    assert report.counts["sample has no caption"] == 1
    published, _ = read_caft(path, splitting=Splitting.published())
    assert published[1].captions["long"][0] == "A cat sits"


def test_items_are_a_function_of_seed_epoch_and_place(folder, tokenizer):
    rows = [{"image": f"images/{name}.png", "caption": LONG} for name in ("a", "b")]
    records, _ = read_caft(write(folder, *rows))
    one, other = (CaftDataset(records, tokenizer, 32, seed=5) for _ in range(2))
    assert torch.equal(one.at(3, 1).texts, other.at(3, 1).texts)
    drawn = {one.at(epoch, 0).texts.numpy().tobytes() for epoch in range(6)}
    assert len(drawn) > 1
    assert not torch.equal(CaftDataset(records, tokenizer, 32, seed=6).at(3, 1).texts,
                           one.at(3, 1).texts)  # fmt: skip
    batch = collate([one[0], one[1]])
    assert batch.images.shape == (2, 3, 32, 32) and batch.texts.shape == (2, 8, 77)
    with pytest.raises(UserError, match="no samples"):
        CaftDataset([], tokenizer, 32)


def test_shards(tmp_path, tokenizer):
    pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for at in range(4):
                key = f"{shard}{at}"
                row = {"raw_caption": "a cat", "longSV_captions": LONG}
                files = {"png": png(), "json": json.dumps(row).encode()}
                if at == 1:
                    files["png"] = png()[:50]
                if at == 2:
                    files["json"] = b"{"
                for end, data in files.items():
                    info = tarfile.TarInfo(f"{key}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    pattern = str(tmp_path / "part-{0..1}.tar")
    report = SkipReport()
    items = list(shard_samples(pattern, tokenizer, 32, report, seed=1))
    assert len(items) == 4 == report.read and report.skipped == 4
    assert report.counts == {"image is corrupt": 2, "line is not JSON": 2}
    assert items[0].images.shape == (3, 32, 32) and items[0].texts.shape == (8, 77)
    again = list(shard_samples(pattern, tokenizer, 32, SkipReport(), seed=1))
    assert all(torch.equal(a.texts, b.texts) for a, b in zip(items, again, strict=True))
    with pytest.raises(UserError, match="there is no shard"):
        list(shard_samples("pipe:touch harmed", tokenizer, 32, SkipReport()))

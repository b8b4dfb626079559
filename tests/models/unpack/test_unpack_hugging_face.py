"""`fastgoal unpack` of datasets: a stand-in for the `datasets` library, and the real one if there.

The stand-in gives rows as Arrow's tables do: a column is a list of things with `as_py`.
"""

import io
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgoal_models.errors import ConfigError
from fastgoal_models.sets import read_set
from fastgoal_models.unpack import Columns, UnpackError, UnpackOptions, folder, unpack
from tests.models.unpack.test_unpack_shards import fastgoal, files_in, picture, rows_in


class Cell:
    def __init__(self, value):
        self.value = value

    def as_py(self):
        return self.value.decode() if isinstance(self.value, Text) else self.value


class Text(bytes):
    """A text as Arrow holds it: bytes, which need not be UTF-8."""


class Stream:
    """As much of an IterableDataset as is asked for."""

    def __init__(self, rows, fails_at=None):
        self.all, self.fails_at, self.at, self.wanted = rows, fails_at, 0, None
        self.column_names = list(rows[0])

    def select_columns(self, names):
        chosen = Stream(self.all, self.fails_at)
        chosen.wanted = names
        return chosen

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def __iter__(self):
        while self.at < len(self.all):
            if self.at == self.fails_at:
                raise ConnectionError("the network is down")
            self.at += 1
            row = self.all[self.at - 1]
            yield {name: [Cell(row[name])] for name in self.wanted}


def install(monkeypatch, splits, version="4.0.0", digest="d1", told=None):
    infos = {name: SimpleNamespace(num_examples=told) for name in splits} if told else None

    def builder(source, subset):
        return SimpleNamespace(
            hash=digest,
            as_streaming_dataset=lambda: splits,
            info=SimpleNamespace(splits=infos),
            config=SimpleNamespace(data_files=None),
        )

    stand = SimpleNamespace(__version__=version, load_dataset_builder=builder)
    monkeypatch.setitem(sys.modules, "datasets", stand)


def many(number=11):
    return [
        {"image": {"bytes": picture((at, 0, 0)), "path": None}, "caption": f"Number {at}."}
        for at in range(number)
    ]


def test_pictures_and_captions(tmp_path, monkeypatch):
    rows = [
        {
            "image": {"bytes": picture("red", "JPEG"), "path": "../../a.sh"},
            "caption": "A.",
            "key": 1,
        },
        {"image": picture("green"), "caption": ["B.", "C."], "key": "b"},
        {"image": {"bytes": None, "path": "/etc/passwd"}, "caption": "D.", "key": "d"},
        {"image": {"bytes": b"no picture", "path": "e.jpg"}, "caption": "E.", "key": "e"},
        {"image": None, "caption": "F.", "key": "f"},
        {"image": [picture("red")], "caption": "F.", "key": "f"},
        {"image": picture("red"), "caption": Text(b"caf\xe9"), "key": "g"},
        {"image": picture("red"), "caption": 4, "key": "h"},
        {"image": picture("red"), "caption": None, "key": "i"},
        {"image": picture("red"), "caption": "J.", "key": "b"},
        {"image": picture("red"), "caption": "K.", "key": None},
        {"image": picture("red"), "caption": "L.", "key": True},
    ]
    install(monkeypatch, {"test": Stream(rows)})
    options = UnpackOptions(Columns(id="key"))
    found = unpack("me/photos", tmp_path / "out", options)
    assert rows_in(tmp_path / "out") == [
        {"id": "1", "image": "images/00000/a.jpg", "caption": "A."},
        {"id": "b", "image": "images/00000/0001.png", "caption": "B.", "captions": ["B.", "C."]},
    ]
    assert (tmp_path / "out/images/00000/a.jpg").read_bytes() == picture("red", "JPEG")
    assert found.report.counts == {
        "image leaves the dataset": 1, "image is corrupt": 1, "image is missing": 2,
        "caption is not UTF-8": 1, "caption is not text": 1, "caption is missing": 1,
        "id appears twice": 1, "id is not text": 2,
    }  # fmt: skip
    captioned = read_set("jsonl", tmp_path / "out")
    assert [item.captions for item in captioned.images] == [("A.",), ("B.", "C.")]


def test_columns_that_are_kept(tmp_path, monkeypatch):
    rows = [row | {"text": "T.", "more": {"a": [1]}, "raw": b"1"} for row in many(2)]
    install(monkeypatch, {"test": Stream(rows)})
    unpack("a/b", tmp_path / "out", UnpackOptions(Columns(captions=("text",), keep=("more",))))
    assert rows_in(tmp_path / "out")[1] == {
        "id": "1", "image": "images/00000/0001.png", "more": {"a": [1]}, "caption": "T."
    }  # fmt: skip
    with pytest.raises(UnpackError, match=r"2 × a value can not be written as JSON"):
        unpack("a/b", tmp_path / "raw", UnpackOptions(Columns(keep=("raw",))))


@pytest.mark.parametrize("fails_at", [0, 3, 4, 9])
def test_a_stream_that_breaks_is_gone_on_with(tmp_path, monkeypatch, fails_at):
    monkeypatch.setattr(folder, "PART", 4)
    monkeypatch.setattr(folder, "_AHEAD", 3)
    install(monkeypatch, {"test": Stream(many())}, told=11)
    unpack("a/b", tmp_path / "wanted", UnpackOptions(limit=10))
    install(monkeypatch, {"test": Stream(many(), fails_at)})
    code, said = fastgoal("unpack", "a/b", "--limit", 10, "--out", tmp_path / "out")
    assert code == 2 and f"past row {fails_at}: the network is down" in said
    install(monkeypatch, {"test": Stream(many())})
    again = unpack("a/b", tmp_path / "out", UnpackOptions(limit=10))
    assert again.samples == 10 - fails_at // 4 * 4
    assert files_in(tmp_path / "out") == files_in(tmp_path / "wanted")


def test_pictures_beside_the_dataset(tmp_path, monkeypatch):
    """Those of the folder and of its zip files; no others."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(picture("red"))
    (tmp_path / "secret.png").write_bytes(picture("blue"))
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    with zipfile.ZipFile(source / "z.zip", "w") as archive:
        archive.writestr("in/b.png", picture("green"))
    paths = [
        str(source.resolve() / "a.png"), f"zip://in/b.png::{source.resolve() / 'z.zip'}", "a.png",
        "../secret.png", str(tmp_path / "secret.png"), "link.png", "zip://c.png::z.zip", "no.png",
        f"file://{tmp_path}/secret.png", "http://localhost/a.png", f"simplecache::{source}/a.png",
        "zip://b.png::a.png", ".",
    ]  # fmt: skip
    rows = [{"image": {"bytes": None, "path": path}, "caption": "A."} for path in paths]
    install(monkeypatch, {"train": Stream(rows)})
    found = unpack(str(source), tmp_path / "out")
    assert [(row["id"], row["image"]) for row in rows_in(tmp_path / "out")] == [
        ("0", "images/00000/a.png"), ("1", "images/00000/b.png"), ("2", "images/00000/0002.png"),
    ]  # fmt: skip
    assert found.report.counts == {
        "image leaves the data folder": 3, "image is missing": 6, "image leaves the dataset": 1
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"--out .* lies in SOURCE"):
        unpack(str(source), source / "out")


def test_pictures_of_the_hub(tmp_path, monkeypatch):
    """Those of the very dataset; a network that fails is no reason to leave one out."""
    import fsspec

    asked = []

    def opened(path, mode):
        asked.append(path)
        if "gone" in path:
            raise FileNotFoundError(path)
        if "down" in path:
            raise ConnectionError("no route")
        return io.BytesIO(picture("red"))

    monkeypatch.setattr(fsspec, "open", opened)
    paths = [
        "hf://datasets/me/photos@1/a.png", "zip://b.png::hf://datasets/me/photos@1/z.zip",
        "hf://datasets/me/photos@1/gone.png", "hf://datasets/me/photos2/a.png", "/etc/passwd",
        "file:///etc/passwd", "reference://a::hf://datasets/me/photos@1/r.json",
    ]  # fmt: skip
    rows = [{"image": {"bytes": None, "path": path}, "caption": "A."} for path in paths]
    install(monkeypatch, {"train": Stream(rows)})
    found = unpack("me/photos", tmp_path / "out")
    assert asked == paths[:3] and found.report.read == 2
    assert found.report.counts == {"image is missing": 1, "image leaves the dataset": 4}
    rows[2]["image"]["path"] = "hf://datasets/me/photos@1/down.png"
    with pytest.raises(UnpackError, match=r"no route\)\. The same command goes on there"):
        unpack("me/photos", tmp_path / "other")


def test_errors(tmp_path, monkeypatch):
    two = {"train": Stream(many(2)), "test": Stream(many(2))}
    install(monkeypatch, two)
    for words, message in (
        ([], r"several splits\. Fix: --split train or test"),
        (["--split", "dev"], r"--split dev: .* no such split, only train, test"),
        (
            ["--split", "test", "--caption-column", "text"],
            r"--caption-column text: .* only image, c",
        ),
        (["--split", "test", "--image-column", "jpg"], "--image-column jpg: "),
        (["--split", "test", "--id-column", "key"], "--id-column key: "),
        (["--split", "test", "--keep-column", "url"], "--keep-column url: "),
        (["--split", "test", "--keep-column", "id"], "--keep-column id: every line has its own"),
    ):
        code, said = fastgoal("unpack", "me/photos", *words, "--out", tmp_path / "out")
        assert code == 2 and re.search(message, said), said
    assert not (tmp_path / "out").exists()
    options = UnpackOptions(split="test")
    unpack("me/photos", tmp_path / "out", options)
    install(monkeypatch, two, digest="d2")
    with pytest.raises(UnpackError, match="another SOURCE"):
        unpack("me/photos", tmp_path / "out", options)
    with pytest.raises(UnpackError, match=r"another SOURCE .*, --split \(there test, here train\)"):
        unpack("me/photos", tmp_path / "out", UnpackOptions(split="train"))
    with pytest.raises(ConfigError, match="is a file"):
        unpack(__file__, tmp_path / "out")


def test_without_the_package_or_with_one_that_runs_code(tmp_path, monkeypatch):
    install(monkeypatch, {}, version="3.6.0")
    with pytest.raises(UnpackError, match=r"runs code .* Fix: pip install 'datasets>=4'"):
        unpack("me/photos", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnpackError, match="pip install datasets"):
        unpack("me/photos", tmp_path)


class TestThePackageItself:
    @pytest.fixture(autouse=True)
    def _offline(self, tmp_path, monkeypatch):
        self.datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(folder, "PART", 4)
        monkeypatch.setattr(folder, "_AHEAD", 3)

    def made(self):
        columns = {name: [row[name] for row in many()] for name in ("image", "caption")}
        columns["image"][5] = {"bytes": b"no picture", "path": "five.png"}
        dataset = self.datasets.Dataset.from_dict(columns)
        return dataset.cast_column("image", self.datasets.Image())

    def saved(self, source: Path, kind: str) -> None:
        if kind == "disk":
            self.made().save_to_disk(source)
        elif kind == "dict":
            self.datasets.DatasetDict({"train": self.made()}).save_to_disk(source)
        elif kind == "parquet":
            for at, last in ((0, 6), (6, 11)):
                part = self.made().select(range(at, last))
                part.to_parquet(source / f"train-{at}.parquet", batch_size=2)
        else:
            source.mkdir()
            lines = []
            for at, row in enumerate(many()):
                data = b"no picture" if at == 5 else row["image"]["bytes"]
                lines.append({"file_name": f"{at:02}.png", "caption": row["caption"]})
                (source / lines[-1]["file_name"]).write_bytes(data)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (source / "metadata.jsonl").write_text(text)

    @pytest.mark.parametrize("kind", ["disk", "dict", "parquet", "imagefolder"])
    def test_every_kind_of_folder(self, tmp_path, monkeypatch, kind):
        self.saved(tmp_path / "source", kind)
        source = str(tmp_path / "source")
        found = unpack(source, tmp_path / "wanted")
        assert (found.report.read, found.report.counts) == (10, {"image is corrupt": 1})
        rows = rows_in(tmp_path / "wanted")
        assert [row["caption"] for row in rows] == [f"Number {a}." for a in range(11) if a != 5]
        for row in rows:
            data = (tmp_path / "wanted" / row["image"]).read_bytes()
            assert data == picture((int(row["id"]), 0, 0))
        # Interrupted after each of its parts.
        decode, calls = folder.decode_image, []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) > 6:
                raise KeyboardInterrupt
            return decode(*arguments)

        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(folder, "decode_image", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    unpack(source, tmp_path / "out")
            calls.clear()
        assert unpack(source, tmp_path / "out").samples == 3
        assert files_in(tmp_path / "out") == files_in(tmp_path / "wanted")

    def test_a_text_that_is_not_utf8(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        texts = pyarrow.array([b"A.", b"caf\xe9", b"C."], pyarrow.binary()).view(pyarrow.string())
        table = pyarrow.table({"image": [picture("red")] * 3, "caption": texts})
        (tmp_path / "source").mkdir()
        parquet.write_table(table, tmp_path / "source" / "a.parquet")
        found = unpack(str(tmp_path / "source"), tmp_path / "out")
        assert (found.report.read, found.report.counts) == (2, {"caption is not UTF-8": 1})

    def test_a_folder_without_data(self, tmp_path):
        (tmp_path / "source").mkdir()
        with pytest.raises(UnpackError, match=r"can not be read as a dataset: .*\nFix: "):
            unpack(str(tmp_path / "source"), tmp_path / "out")

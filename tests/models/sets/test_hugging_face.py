"""Datasets of the `datasets` library: a stand-in for it, and the package where it is there."""

import io
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from fastgoal_models.sets import SetError
from fastgoal_models.sets.hugging_face import read_hugging_face


def encoded(kind):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 200)).save(file, kind)
    return file.getvalue()


class Stand:
    """As much of a Dataset as is asked for."""

    def __init__(self, rows):
        self.rows = rows
        self.column_names = list(rows[0])

    def select_columns(self, names):
        return Stand([{name: row[name] for name in names} for row in self.rows])

    def cast_column(self, name, feature):
        assert name == "image" and feature.decode is False
        return self

    def __iter__(self):
        return iter(self.rows)


@pytest.fixture
def package(monkeypatch):
    stand = SimpleNamespace(Image=lambda decode: SimpleNamespace(decode=decode))
    monkeypatch.setitem(sys.modules, "datasets", stand)


def rows():
    return [
        {"image": {"bytes": encoded("JPEG"), "path": "../../a.sh"}, "caption": "A.", "key": "a"},
        {"image": {"bytes": encoded("PNG"), "path": None}, "caption": ["B.", "C."], "key": "b"},
        {"image": {"bytes": None, "path": "/etc/passwd"}, "caption": "D.", "key": "d"},
        {"image": {"bytes": b"not a picture", "path": "e.jpg"}, "caption": "E.", "key": "e"},
        {"image": None, "caption": "F.", "key": "f"},
    ]


def test_pictures_are_written_as_they_are(tmp_path, package):
    found = read_hugging_face(Stand(rows()), tmp_path / "new")
    assert [(item.id, item.image.name, item.captions) for item in found.images] == [
        ("0", "0000000.jpg", ("A.",)),
        ("1", "0000001.png", ("B.", "C.")),
    ]
    assert found.images[0].image.read_bytes() == encoded("JPEG")
    assert found.report.counts == {"image is not in the dataset itself": 2, "image is corrupt": 1}
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["0000000.jpg", "0000001.png"]
    named = read_hugging_face(Stand(rows()), tmp_path / "new", id_column="key")
    assert [item.id for item in named.images] == ["a", "b"]


def test_errors(tmp_path, package):
    with pytest.raises(SetError, match='no column "text", only image, caption, key'):
        read_hugging_face(Stand(rows()), tmp_path, caption_column="text")
    with pytest.raises(SetError, match=r"several splits\. Fix: pass one of train, test"):
        read_hugging_face({"train": Stand(rows()), "test": Stand(rows())}, tmp_path)
    with pytest.raises(SetError, match=r"no row of the dataset can be used[^$]*corrupt"):
        read_hugging_face(Stand(rows()[3:4]), tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetError, match="pip install datasets"):
        read_hugging_face(Stand(rows()), tmp_path)


def test_the_package_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [r["image"] for r in rows()[:2]], "caption": ["A.", "B."]}
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    found = read_hugging_face(made, tmp_path)
    assert [item.image.name for item in found.images] == ["0000000.jpg", "0000001.png"]
    assert found.images[0].image.read_bytes() == encoded("JPEG")

"""The demo's photographs: their captions, their files, and the data folder made of them."""

import json
import subprocess
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from fastgoal_models.demo import photographs
from fastgoal_models.demo.photographs import Photograph, load_photographs, write_annotations

PACKAGES = ("skimage", "sklearn", "matplotlib")


@pytest.fixture(scope="module")
def loaded() -> list[Photograph]:
    return load_photographs()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_are_enough_and_ids_differ(loaded):
    assert len(loaded) >= 16
    assert len({photograph.id for photograph in loaded}) == len(loaded)


def test_files_open_with_the_stated_size(loaded):
    for photograph in loaded:
        with Image.open(photograph.path) as image:
            image.load()
            assert image.size == (photograph.width, photograph.height), photograph.id


def test_files_lie_inside_their_packages(loaded):
    folders = [
        Path(place).resolve()
        for package in PACKAGES
        for place in find_spec(package).submodule_search_locations
    ]
    for photograph in loaded:
        path = photograph.path.resolve()
        assert any(path.is_relative_to(folder) for folder in folders), photograph.id


def test_captions_are_long_and_made_of_their_sentences(loaded):
    for photograph in loaded:
        assert 5 <= len(photograph.sentences) <= 10, photograph.id
        assert " ".join(photograph.sentences) == photograph.caption
        assert 60 <= len(photograph.caption.split()) <= 160, photograph.id
        for sentence in photograph.sentences:
            # One full stop, at the end: every sentence splitter then finds these very sentences.
            assert sentence.index(".") == len(sentence) - 1, sentence
            assert sentence == " ".join(sentence.split())


def test_captions_and_sentences_are_unique(loaded):
    assert len({photograph.caption for photograph in loaded}) == len(loaded)
    counts = Counter(sentence for photograph in loaded for sentence in photograph.sentences)
    assert counts.most_common(1)[0][1] == 1


def test_text_is_ascii_and_complete(loaded):
    for photograph in loaded:
        for text in (photograph.caption, photograph.licence, photograph.source):
            assert text and text.isascii() and text.isprintable(), photograph.id


def test_loading_does_not_import_the_packages():
    code = (
        "import sys; from fastgoal_models.demo.photographs import load_photographs; "
        f"load_photographs(); print([name for name in {PACKAGES!r} if name in sys.modules])"
    )
    root = Path(photographs.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert run.stdout.strip() == "[]"


def test_write_annotations_lays_out_a_data_folder(loaded, tmp_path):
    path = write_annotations(tmp_path / "new" / "demo")
    assert path == tmp_path / "new" / "demo" / "annotations.jsonl"
    entries = read_lines(path)
    assert [entry["id"] for entry in entries] == [photograph.id for photograph in loaded]
    for entry, photograph in zip(entries, loaded, strict=True):
        assert entry["image"] == f"images/{photograph.id}{photograph.path.suffix}"
        assert (path.parent / entry["image"]).read_bytes() == photograph.path.read_bytes()
        assert "package" not in entry
        assert entry["pairs"] == []
        assert entry["caption"] == photograph.caption == " ".join(entry["sentences"])
        assert (entry["width"], entry["height"]) == (photograph.width, photograph.height)
        assert (entry["licence"], entry["source"]) == (photograph.licence, photograph.source)


def test_write_annotations_twice_changes_nothing(tmp_path):
    def snapshot() -> dict[Path, tuple[bytes, int]]:
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in tmp_path.rglob("*")
            if path.is_file()
        }

    first = write_annotations(tmp_path)
    before = snapshot()
    assert write_annotations(tmp_path) == first
    after = snapshot()
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path != first)
    assert after[first][0] == before[first][0]


def test_write_annotations_repairs_a_cut_off_picture(loaded, tmp_path):
    write_annotations(tmp_path)
    picture = tmp_path / "images" / f"{loaded[0].id}{loaded[0].path.suffix}"
    picture.write_bytes(picture.read_bytes()[:100])
    write_annotations(tmp_path)
    assert picture.read_bytes() == loaded[0].path.read_bytes()


def test_a_failed_write_leaves_no_trace(monkeypatch, tmp_path):
    def fail(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(photographs.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="disk full"):
        write_annotations(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_package_is_named_with_the_fix(monkeypatch, missing):
    monkeypatch.setattr(
        photographs, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(FileNotFoundError, match=missing) as error:
        load_photographs()
    assert "Fix: pip install '.[demo]' in your clone" in str(error.value)


def test_a_missing_picture_is_named_with_the_fix(monkeypatch, tmp_path):
    empty = ModuleSpec("skimage", None, is_package=True)
    empty.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(photographs, "find_spec", lambda name: empty)
    with pytest.raises(FileNotFoundError, match=r"skimage.*data/astronaut\.png") as error:
        load_photographs()
    assert "Fix: pip install '.[demo]' in your clone" in str(error.value)

"""Patterns of shards: stars, webdataset's braces, and names that look like patterns."""

import sys

import pytest

from fastgoal_models.errors import ConfigError
from fastgoal_models.overlap import training_images
from fastgoal_models.shard_names import shard_paths


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data[1]{x}"
    folder.mkdir()
    for number in range(12):
        (folder / f"part-{number:03}.tar").write_bytes(b"")
    (folder / "odd{1}[2].tar").write_bytes(b"")
    return folder


def names(pattern) -> list[str]:
    return [path.name for path in shard_paths(pattern)]


def test_stars_and_braces(folder, tmp_path):
    every = [f"part-{number:03}.tar" for number in range(12)]
    assert names(folder / "part-*.tar") == every
    pytest.importorskip("braceexpand")
    assert names(folder / "part-{000..011}.tar") == every
    assert names(folder / "part-{009..010}.tar") == every[9:11]
    assert names(folder / "{part-00,part-}[01]*.tar") == every  # none twice
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.tar").write_bytes(b"")
    assert shard_paths(tmp_path / "{b,b}" / "c.tar") == [tmp_path / "b" / "c.tar"]


def test_a_name_that_is_there_is_no_pattern(folder, monkeypatch):
    assert names(folder / "odd{1}[2].tar") == ["odd{1}[2].tar"]
    assert names(folder / "part-003.tar") == ["part-003.tar"]
    monkeypatch.chdir(folder)
    assert names("part-00[12].tar") == ["part-001.tar", "part-002.tar"]


def test_what_is_missing_is_named_with_the_form_of_a_pattern(folder):
    with pytest.raises(
        ConfigError, match=r"--data: there is no shard .*x-\*\.tar\. Fix: .*000\.\.099"
    ):
        shard_paths(folder / "x-*.tar")
    pytest.importorskip("braceexpand")
    with pytest.raises(
        ConfigError, match=r"SOURCE: .* no shard .*part-012\.tar, which .*010\.\.012"
    ):
        shard_paths(folder / "part-{010..012}.tar", "SOURCE")
    with pytest.raises(ConfigError, match="Fix: close every brace"):
        shard_paths(folder / "part-{000..011.tar")


def test_braces_without_their_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    assert len(shard_paths(folder / "part-*.tar")) == 12
    with pytest.raises(ConfigError, match="Fix: pip install braceexpand"):
        shard_paths(folder / "part-{000..011}.tar")


def test_eval_takes_them_for_trained_on(folder):
    pytest.importorskip("braceexpand")
    with pytest.raises(ConfigError, match=r"there is no shard .*part-012\.tar"):
        training_images(folder / "part-{000..012}.tar")

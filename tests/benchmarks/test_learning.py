"""The learning experiment: its page, and runs from end to end at a tiny size."""

import json

import pytest

from benchmarks import facts, learning, learning_page


@pytest.mark.slow
@pytest.mark.parametrize("method", learning.METHODS)
def test_a_run_is_made_once_and_rendered(method, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "SCENES", 6)
    monkeypatch.setattr(learning, "POINTED", 2)
    monkeypatch.setattr(learning, "BATCH", dict.fromkeys(learning.METHODS, 2))
    arguments = ["--method", method, "--seed", "0", "--steps", "2", "--out", str(tmp_path / "runs")]
    assert learning.main(arguments) == 0
    rows = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    assert {row["variant"] for row in rows} == set(learning.VARIANTS)
    for row in rows:
        assert 0 <= row["pointing"] <= 1 and 0 < row["chance"] < 0.3
        assert len(row["losses"]) == 2
    monkeypatch.setattr(learning, "run", None)  # whoever called it now would fail
    assert learning.main(arguments) == 0
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    learning_page.render(tmp_path / "runs", "python -m benchmarks.learning")
    page = (tmp_path / "docs" / "learning.md").read_text()
    assert "whole loss" in page and "global loss alone" in page and "| 1 |" in page
    assert (tmp_path / "docs" / "learning" / "losses.png").stat().st_size > 1000

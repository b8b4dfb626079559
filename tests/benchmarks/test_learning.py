"""The learning experiment: pointing, its page, and runs from end to end at a tiny size."""

import json

import pytest
import torch

from benchmarks import facts, learning, learning_page


def test_pointing_counts_the_brightest_cell_and_shares_ties():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    box = (48.0, 24.0, 72.0, 48.0)  # exactly that cell of 96 pixels
    assert learning._points_into(heat, box) == (1.0, 1 / 16)
    assert learning._points_into(heat.T, box) == (0.0, 1 / 16)
    assert learning._points_into(torch.ones(4, 4), box) == (1 / 16, 1 / 16)


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

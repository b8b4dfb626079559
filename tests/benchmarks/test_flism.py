"""The benchmark of `fastgoal prepare`: both ways find the same pairs, and its table and JSON."""

import json
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed (extra: bench)")

from benchmarks import flism, report

SIZES = ((60, 45), (45, 60))


@pytest.fixture(autouse=True)
def restored():
    """The command sets the threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(flism, "make_setup", partial(flism.make_setup, sizes=SIZES))


@pytest.mark.parametrize("detector, regions", [(None, 5), ("yolos", 15)])
def test_the_table_is_printed_and_written(small, detector, regions, tmp_path, capsys):
    if detector:
        pytest.importorskip("transformers")
    path = tmp_path / "flism.json"
    arguments = ["--images", "3", *(["--detector", detector] if detector else [])]
    arguments += ["--rounds", "1", "--threads", "1"]
    assert flism.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert flism.OURS in printed and flism.SCRIPT in printed and "kept" in printed
    document = json.loads(path.read_text())
    assert document["kind"] == "flism" and document["device"]["threads"] == 1
    assert document["command"].endswith(" ".join(arguments))
    ours, bfloat16, our_pixels, script = document["rows"]
    contenders = [row["contender"] for row in document["rows"]]
    assert contenders == [flism.OURS, flism.BFLOAT16, flism.OUR_PIXELS, flism.SCRIPT]
    assert our_pixels["parity"] == {"scores": 0.0, "other_regions": 0}
    assert 0 < script["parity"]["scores"] <= flism.SAME_BY_PILLOW
    assert flism.SAME_SCORE < bfloat16["parity"]["scores"] <= flism.SAME_IN_BFLOAT16
    assert ours["parity"]["scores"] <= flism.SAME_SCORE
    for row in document["rows"]:
        assert (row["images"], row["regions"], row["detector"]) == (3, 3 * regions, detector)
        assert row["repeats"] == 1 and row["cpu_ms"] > 0 and row["best_ms"] > 0
        split = row["split_ms"]
        assert min(split["image_tower"], split["text_tower"], split["rest"]) > 0
        assert (split["detector"] > 0) == (detector is not None)
    out = tmp_path / "benchmarks.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    page = out.read_text()
    assert f"| {flism.BFLOAT16} |" in page and f"### Local pairs: {detector or 'no'}" in page
    assert "Local pairs, not yet measured" not in page


def test_other_pairs_are_an_error(tmp_path):
    setup = flism.make_setup(tmp_path, 2, False, SIZES)
    rows, answers = flism.by_prepare(setup), flism.one_at_a_time(setup)
    assert flism.compare(rows, answers)["scores"] <= flism.SAME_SCORE
    pair = rows[1]["pairs"][0]
    pair["score"] += 2 * flism.SAME_SCORE
    with pytest.raises(AssertionError, match=r"scores differ by 0\.0002"):
        flism.compare(rows, answers)
    pair["score"] -= 2 * flism.SAME_SCORE
    worst = int(answers[1].scores[pair["sentence"]].argmin())
    pair["box"] = list(answers[1].regions[worst].box)
    with pytest.raises(AssertionError, match=r"00001\.jpg"):
        flism.compare(rows, answers)
    with pytest.raises(AssertionError):
        flism.compare(rows[:1], answers)


def test_pixels_of_another_picture_are_an_error(tmp_path):
    setup = flism.make_setup(tmp_path, 2, False, SIZES)
    answers = flism.one_at_a_time(setup)
    wrong = flism.one_at_a_time(setup, lambda *cut: flism.our_pixels(*cut) / 2)
    with pytest.raises(AssertionError, match="scores differ"):
        flism.compare_scripts(wrong, answers)

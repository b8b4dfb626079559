"""The CPU table of the text-conditioned loss: who takes part, who is left out, what is promised."""

import json
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed (extra: bench)")

from benchmarks import cpu_rows, report, text_conditioned_cpu, text_conditioned_cpu_sections
from benchmarks.pooling_workloads import ALL, COMPILED, EAGER, PUBLISHED, SAMPLE, build
from benchmarks.text_conditioned_cpu_sections import CONTENDERS, OURS, entrants

SMALL = {"tokens": 6, "dim": 16, "heads": 2}


@pytest.fixture(autouse=True)
def restored():
    """The command sets the threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_compiler(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)


def test_who_takes_part():
    found = entrants(64, 8)
    for negatives in (ALL, SAMPLE):
        assert [name for name, work in found if work.negatives == negatives] == list(CONTENDERS)
    assert {(w.stage, w.images, w.texts, w.tokens, w.dim, w.heads, w.dtype) for _, w in found} == {
        ("forward+backward", 64, 512, 64, 512, 8, "float32")
    }


def test_the_table_is_printed_written_and_reported(no_compiler, tmp_path, monkeypatch, capsys):
    sections = text_conditioned_cpu_sections
    monkeypatch.setattr(sections, "entrants", partial(entrants, **SMALL))
    path = tmp_path / "text-conditioned-cpu.json"
    arguments = ["--images", "6", "--captions-per-image", "3", "--rounds", "3", "--threads", "1"]
    assert text_conditioned_cpu.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["kind"] == "text_conditioned_cpu" and document["device"]["threads"] == 1
    assert document["command"].endswith(" ".join(arguments))
    groups = sections.by_negatives(document["rows"])
    assert list(groups) == [ALL, SAMPLE]
    for rows in groups.values():
        status = {row["contender"]: row["status"] for row in rows}
        assert status == {OURS: "ok", EAGER: "ok", PUBLISHED: "ok", COMPILED: "failed"}
        assert rows[0]["repeats"] == 3 and 0 < rows[0]["low_ms"] <= rows[0]["median_ms"]
        assert set(rows[0]["parity"]) == {"loss", "gradients", "parameters"}
        # What each pair pools, before and after the projection, of whoever holds them.
        columns = {ALL: 18, SAMPLE: 8}[rows[0]["negatives"]]
        eager = next(row for row in rows if row["contender"] == EAGER)
        assert eager["extra_bytes"] > 2 * 6 * columns * 16 * 4
    out = tmp_path / "benchmarks.md"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    page = out.read_text()
    for text in (printed, page):
        assert "fastgoal torch" in text and "sampled" in text and "published form" in text
        assert f"left out: {COMPILED}, all: failed: RuntimeError: no C++ compiler" in text
        assert f"{PUBLISHED}: a restatement" in text
    assert "### Text-conditioned loss: 6 images, 3 captions each, 1 threads" in page
    assert "not yet measured: `python -m benchmarks.text_conditioned_cpu`" not in page
    assert list((tmp_path / "benchmarks").glob("text-conditioned-cpu.png"))
    panels = report.panels({**document, "stem": "x"})
    assert [panel.names for panel in panels] == [[OURS, EAGER, PUBLISHED]] * 2


def test_without_a_result_the_page_names_the_command(tmp_path):
    out = tmp_path / "benchmarks.md"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    assert "not yet measured: `python -m benchmarks.text_conditioned_cpu`" in out.read_text()


def tiny(*names):
    return [(name, work) for name, work in entrants(4, 2, **SMALL) if name in names][: len(names)]


def test_a_rival_that_is_wrong_is_left_out_and_a_wrong_result_of_ours_raises(monkeypatch):
    def wrong(name, work, inputs):
        way = build(name, work, inputs)
        return lambda given: 1.01 * way(given)

    def one_wrong(name, work, inputs):
        return (wrong if name == EAGER else build)(name, work, inputs)

    monkeypatch.setattr(text_conditioned_cpu, "build", one_wrong)
    ours, rival = text_conditioned_cpu.measure(tiny(OURS, EAGER), 1)
    assert ours["status"] == "ok" and rival["status"] == "wrong"
    assert "loss" in rival["reason"] and rival["median_ms"] is None
    monkeypatch.setattr(text_conditioned_cpu, "build", wrong)
    with pytest.raises(AssertionError, match="loss"):
        text_conditioned_cpu.measure(tiny(OURS), 1)


def test_who_would_exhaust_the_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu_rows, "available_memory", lambda: 1000.0)
    ours, eager = text_conditioned_cpu.measure(tiny(OURS, EAGER), 1)
    assert ours["status"] == "ok"
    assert eager["status"] == "unavailable" and "GB are free" in eager["reason"]


def row(contender, negatives, milliseconds, extra_bytes, **changes):
    base = dict(
        contender=contender, negatives=negatives, images=64, captions_per_image=8, tokens=64,
        dim=512, heads=8, dtype="float32", op="text_conditioned_sigmoid_loss",
        stage="forward+backward", status="ok", reason=None, parity={"loss": 0.0},
        median_ms=milliseconds, low_ms=milliseconds, high_ms=milliseconds, best_ms=milliseconds,
        extra_bytes=extra_bytes,
    )  # fmt: skip
    return {**base, **changes}


def verdicts(rows):
    groups = text_conditioned_cpu_sections.tables(rows)
    return {(cells[0], cells[1]): (cells[3], cells[7], cells[8]) for g in groups for cells in g}


def test_the_goals_are_about_plain_pytorch_with_all_negatives_and_the_published_sample():
    rows = [
        row(OURS, ALL, 10.0, 50),
        row(EAGER, ALL, 21.0, 1000),
        row(PUBLISHED, ALL, 40.0, 1000),
        row(COMPILED, ALL, None, None, status="failed", reason="no"),
        row(OURS, SAMPLE, 5.0, 20),
        row(EAGER, SAMPLE, 4.0, 40),
        row(PUBLISHED, SAMPLE, 6.0, 100),
    ]
    found = verdicts(rows)
    assert found[EAGER, "all"] == ("2.1 (≥ 2: holds)", "0.05 (≤ 0.1: holds)", "")
    assert found[PUBLISHED, "all"] == ("4", "0.05", "")
    assert (COMPILED, "all") not in found
    assert found[EAGER, "sampled"] == ("0.8", "0.5", "1.25")  # beside our sampled loss
    assert found[PUBLISHED, "sampled"] == ("1.2", "0.2", "0.5 (≤ 1: holds)")
    missed = verdicts(
        [
            row(OURS, ALL, 20.0, 200),
            row(EAGER, ALL, 21.0, 1000),
            row(OURS, SAMPLE, 5.0, 20),
            row(PUBLISHED, SAMPLE, 6.0, 100),
        ]
    )
    assert missed[EAGER, "all"] == ("1.05 (≥ 2: MISSED)", "0.2 (≤ 0.1: MISSED)", "")
    assert missed[PUBLISHED, "sampled"][2] == "2 (≤ 1: MISSED)"
    small = [row(name, ALL, 20.0, 100, images=16) for name in (OURS, EAGER)]
    assert verdicts(small)[EAGER, "all"] == ("1", "1", "")


def test_the_footer_says_everything_once():
    footer = text_conditioned_cpu_sections.footer(
        [
            row(OURS, ALL, 1.0, 1),
            row(EAGER, ALL, 1.0, 1),
            row(EAGER, SAMPLE, 1.0, 1),
            row(COMPILED, SAMPLE, None, None, status="failed", reason="ValueError: oh"),
        ]
    )
    assert len(footer) == 2 and footer[0].startswith("eager: plain PyTorch")
    assert footer[1] == f"left out: {COMPILED}, sampled: failed: ValueError: oh"

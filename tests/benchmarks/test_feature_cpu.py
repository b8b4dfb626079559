"""The CPU table of plain features: who takes part, who is left out and why, what is promised."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed (extra: bench)")

from benchmarks import (
    cpu_rows,
    feature_baselines,
    feature_cpu,
    feature_cpu_sections,
    feature_peers,
    report,
)
from benchmarks.feature_cpu_sections import CONTENDERS, OURS, entrants
from benchmarks.feature_peers import CLIP, SIGMOID
from benchmarks.feature_workloads import FeatureWorkload, Way, build
from benchmarks.peers import Unavailable


@pytest.fixture(autouse=True)
def restored():
    """The command sets the threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_rivals(monkeypatch):
    """No compiler on this machine, and of other packages only an open_clip."""

    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    def import_peer(module):
        if module != "open_clip.loss":
            raise Unavailable("import fails: not here")
        losses = feature_baselines.clip_loss, feature_baselines.sigmoid_loss
        return SimpleNamespace(ClipLoss=lambda: losses[0], SigLipLoss=lambda: losses[1])

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(feature_peers, "import_peer", import_peer)


def test_who_takes_part():
    found = entrants(8192)
    for op in (CLIP, SIGMOID):
        names = [name for name, work in found if work.op == op]
        assert names[:2] == [OURS, "open_clip"] and len(names) == len(set(names))
    assert {name for name, _ in found} == set(CONTENDERS)
    assert {(w.stage, w.batch, w.dim, w.dtype) for _, w in found} == {
        ("forward+backward", 8192, 512, "float32")
    }


def test_the_table_is_printed_written_and_reported(no_rivals, tmp_path, capsys):
    path = tmp_path / "feature-cpu.json"
    arguments = ["--size", "24", "--rounds", "3", "--threads", "1", "--json", str(path)]
    assert feature_cpu.main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["kind"] == "feature_cpu" and "memeff" in document["versions"]
    for rows in feature_cpu_sections.by_loss(document["rows"]).values():
        status = {row["contender"]: row["status"] for row in rows}
        assert status.pop(OURS) == status.pop("eager") == status.pop("open_clip") == "ok"
        assert status.pop("torch.compile of open_clip") == "failed"
        assert set(status.values()) == {"unavailable"}
        ours = rows[0]
        assert ours["repeats"] == 3 and 0 < ours["low_ms"] <= ours["median_ms"]
        assert set(ours["parity"]) == {"loss", "gradients", "parameters"}
        # 24 x 24 logits and their gradient at least, of whoever holds them.
        assert next(r for r in rows if r["contender"] == "eager")["extra_bytes"] > 2 * 24**2 * 4
    out = tmp_path / "benchmarks.md"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    page = out.read_text()
    for text in (printed, page):
        assert "fastgoal torch" in text and "sigmoid (SigLIP)" in text
        name = "sentence-transformers cached"
        assert f"left out: {name}, softmax (CLIP): import fails: not here" in text
        assert "(SigLIP): failed: RuntimeError: no C++ compiler" in text
        assert "left out: inf-cl, softmax (CLIP): its kernels need a CUDA device" in text
    assert "Losses of plain features: B 24, 1 threads" in page
    assert list((tmp_path / "benchmarks").glob("feature-cpu.png"))


def tiny(*names):
    work = FeatureWorkload(CLIP, "forward+backward", 8, 16, "float32")
    return [(name, work) for name in names]


def test_a_rival_that_is_wrong_is_left_out_and_a_wrong_result_of_ours_raises(monkeypatch):
    def wrong(name, work, inputs):
        way = build("eager", work, inputs)
        return Way(lambda *given: 1.01 * way.loss(*given))

    def one_wrong(name, work, inputs):
        return (wrong if name == "eager" else build)(name, work, inputs)

    monkeypatch.setattr(feature_cpu, "build", one_wrong)
    ours, rival = feature_cpu.measure(tiny(OURS, "eager"), 1)
    assert ours["status"] == "ok" and rival["status"] == "wrong"
    assert "loss" in rival["reason"] and rival["median_ms"] is None
    monkeypatch.setattr(feature_cpu, "build", wrong)
    with pytest.raises(AssertionError, match="loss"):
        feature_cpu.measure(tiny(OURS), 1)


def test_every_round_runs_every_contender_once(monkeypatch):
    calls = []

    def recorded(name, work, inputs):
        way = build(name, work, inputs)

        def counted(*given):
            calls.append(name)
            return way.loss(*given)

        return Way(counted)

    monkeypatch.setattr(feature_cpu, "build", recorded)
    rows = feature_cpu.measure(tiny(OURS, "eager"), 4)
    assert calls[-8:] == [OURS, "eager"] * 4
    assert {row["repeats"] for row in rows} == {4}


def test_who_would_exhaust_the_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu_rows, "available_memory", lambda: 1000.0)
    ours, eager = feature_cpu.measure(tiny(OURS, "eager"), 1)
    assert ours["status"] == "ok"
    assert eager["status"] == "unavailable" and "GB are free" in eager["reason"]


def row(contender, milliseconds, op=CLIP, batch=8192, **changes):
    base = dict(
        contender=contender, op=op, stage="forward+backward", batch=batch, dim=512,
        dtype="float32", status="ok", reason=None, parity={"loss": 0.0}, median_ms=milliseconds,
        low_ms=milliseconds, high_ms=milliseconds, best_ms=milliseconds, extra_bytes=100,
    )  # fmt: skip
    return {**base, **changes}


def verdicts(rows):
    return {(cells[0], cells[1].split()[0]): (cells[3], cells[7])
            for cells in feature_cpu_sections.table(rows)}  # fmt: skip


def test_the_two_goals_are_about_open_clips_softmax_at_the_promised_size():
    rows = [
        row(OURS, 10.0, extra_bytes=10),
        row("open_clip", 11.0, extra_bytes=1000),
        row("eager", 9.0),
        row(OURS, 20.0, SIGMOID),
        row("open_clip", 10.0, SIGMOID),
        row("memeff", None, status="unavailable", reason="no"),
    ]
    found = verdicts(rows)
    assert found["open_clip", "softmax"] == ("1.1 (≥ 1: holds)", "0.01 (≤ 0.05: holds)")
    assert found["eager", "softmax"] == ("0.9", "0.1")
    assert found["open_clip", "sigmoid"] == ("0.5", "1")  # beside our sigmoid loss
    assert ("memeff", "softmax") not in found
    missed = verdicts([row(OURS, 12.0), row("open_clip", 11.0, extra_bytes=1000)])
    assert missed["open_clip", "softmax"] == ("0.917 (≥ 1: MISSED)", "0.1 (≤ 0.05: MISSED)")
    small = verdicts([row(OURS, 12.0, batch=64), row("open_clip", 11.0, batch=64)])
    assert small["open_clip", "softmax"] == ("0.917", "1")


def test_the_footer_explains_who_is_there_and_who_is_not():
    footer = feature_cpu_sections.footer(
        [
            row(OURS, 1.0),
            row("sentence-transformers cached", 1.0),
            row("inf-cl", None, status="unavailable", reason="needs a GPU"),
            row("eager", None, SIGMOID, status="failed", reason="ValueError: oh"),
        ]
    )
    assert len(footer) == 3 and footer[0].startswith("sentence-transformers cached: ")
    assert footer[1:] == [
        "left out: inf-cl, softmax (CLIP): needs a GPU",
        "left out: eager, sigmoid (SigLIP): failed: ValueError: oh",
    ]

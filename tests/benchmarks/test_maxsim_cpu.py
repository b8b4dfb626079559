"""The CPU table: who takes part where, who is left out and why, and what is promised of whom."""

import json
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed (extra: bench)")

from benchmarks import cpu_rows, cpu_sections, maxsim_cpu, report, workloads
from benchmarks.cpu_peers import CPU_PEERS
from benchmarks.cpu_sections import FORWARD_ONLY, Entrant, Section
from benchmarks.peers import Peer, Unavailable
from benchmarks.workloads import Workload, build

TINY = {"text_tokens": 3, "long_text": 6, "image_tokens": 5, "dim": 8}


@pytest.fixture(autouse=True)
def restored():
    """The command sets the threads, and a row the precision of products."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def no_rivals(monkeypatch):
    """Neither a compiler nor a peer on this machine."""

    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    def not_installed(peer, device):
        raise Unavailable("import fails: not here")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(Peer, "load", not_installed)


def test_who_takes_part_where():
    parts = {section.name: section.entrants for section in cpu_sections.sections(64)}
    labels = {name: [entrant.label for entrant in found] for name, found in parts.items()}
    assert set(labels["forward"]) - set(labels["training"]) == set(FORWARD_ONLY)
    assert set(FORWARD_ONLY) == {peer.name for peer in CPU_PEERS if peer.native}
    assert not set(FORWARD_ONLY) & {*labels["training"], *labels["ragged"]}
    for name, found in parts.items():
        assert found[0].ours and not found[0].bfloat16
        assert len(labels[name]) == len(set(labels[name]))
        stage = "inference" if name == "forward" else "forward+backward"
        assert {entrant.work.stage for entrant in found} == {stage}
        assert {entrant.work.texts for entrant in found} == {64}
    assert {entrant.work.layout for entrant in parts["ragged"]} == {"packed", "padded"}
    assert {entrant.work.text_tokens for entrant in parts["ragged"]} == {248}


def test_the_table_is_printed_written_and_reported(no_rivals, tmp_path, monkeypatch, capsys):
    # The size that has targets, and tokens small enough for a test.
    monkeypatch.setattr(cpu_sections, "sections", partial(cpu_sections.sections, **TINY))
    path = tmp_path / "maxsim-cpu.json"
    arguments = ["--size", "64", "--rounds", "3", "--threads", "1", "--json", str(path)]
    assert maxsim_cpu.main(arguments) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    found = cpu_sections.by_section(document["rows"])
    assert list(found) == ["training", "forward", "ragged"]
    status = {row["contender"]: row["status"] for row in found["training"]}
    assert status["fastgoal torch"] == status["eager amax"] == status["eager max"] == "ok"
    assert status["torch.compile of amax"] == "failed"
    assert status["late-interaction-kernels"] == status["flash-maxsim"] == "unavailable"
    assert all(row["status"] == "ok" for row in found["ragged"])
    # Eager holds 64 x 64 x 3 x 5 similarities in float32 at the very least.
    rows = {row["contender"]: row for row in found["training"]}
    assert rows["eager amax"]["extra_bytes"] > 64 * 64 * 3 * 5 * 4
    assert set(rows["eager amax"]["parity"]) == {"loss", "gradients"}
    out = tmp_path / "benchmarks.md"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    page = out.read_text()
    for text in (printed, page):
        assert "(≥ 3.5: " in text and "fastgoal torch, packed" in text
        assert "left out: maxsim-cpu: import fails: not here" in text
        assert "left out: torch.compile of max: failed: RuntimeError: no C++ compiler" in text
    assert list((tmp_path / "benchmarks").glob("*.png"))


def tiny_section(*contenders, **more):
    work = Workload("maxsim_scores", "both", "inference", 4, 4, 3, 5, 8, "float32")
    return Section("forward", tuple(Entrant(name, name, work, **more) for name in contenders))


def test_a_rival_that_is_wrong_is_left_out_and_a_wrong_result_of_ours_raises(monkeypatch):
    def wrong(name, work, inputs):
        return lambda _: {way: torch.ones(4, 4) for way in work.directions}

    def one_wrong(name, work, inputs):
        return (wrong if name == "eager max" else build)(name, work, inputs)

    monkeypatch.setattr(maxsim_cpu, "build", one_wrong)
    ours, rival = maxsim_cpu.measure(tiny_section("fastgoal torch", "eager max"), 1)
    assert ours["status"] == "ok" and rival["status"] == "wrong"
    assert "scores" in rival["reason"] and rival["median_ms"] is None
    monkeypatch.setattr(maxsim_cpu, "build", wrong)
    with pytest.raises(AssertionError, match="scores"):
        maxsim_cpu.measure(tiny_section("fastgoal torch"), 1)


def test_every_round_runs_every_contender_once_and_forward_means_no_gradients(monkeypatch):
    calls = []

    def recorded(name, work, inputs):
        assert not any(leaf.requires_grad for leaf in inputs.leaves)
        call = build(name, work, inputs)

        def counted(own):
            calls.append(name)
            return call(own)

        return counted

    monkeypatch.setattr(maxsim_cpu, "build", recorded)
    names = ["fastgoal torch", "eager amax", "eager max"]
    rows = maxsim_cpu.measure(tiny_section(*names), 4)
    assert calls[-12:] == names * 4
    assert {row["repeats"] for row in rows} == {4}


def test_bfloat16_products_have_their_own_tolerance_and_must_be_rounded(monkeypatch):
    def rounded(name, work, inputs):
        assert torch.get_float32_matmul_precision() == "medium"
        call = build("eager amax", work, inputs)
        return lambda own: {way: score * 1.003 for way, score in call(own).items()}

    monkeypatch.setattr(maxsim_cpu, "build", rounded)
    section = tiny_section("eager amax", bfloat16=True)
    assert maxsim_cpu.measure(section, 1)[0]["status"] == "ok"

    def ieee(name, work, inputs):
        call = build(name, work, inputs)

        def exact(own):
            with workloads.float32_products("highest"):
                return call(own)

        return exact

    monkeypatch.setattr(maxsim_cpu, "build", ieee)
    (row,) = maxsim_cpu.measure(section, 1)
    assert row["status"] == "unavailable" and "float32" in row["reason"]


def test_who_would_exhaust_the_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu_rows, "available_memory", lambda: 1000.0)
    ours, eager = maxsim_cpu.measure(tiny_section("fastgoal torch", "eager amax"), 1)
    assert ours["status"] == "ok"
    assert eager["status"] == "unavailable" and "GB are free" in eager["reason"]


def row(contender, milliseconds, **changes):
    base = dict(
        section="training", contender=contender, bfloat16=False, images=128, status="ok",
        reason=None, parity={"loss": 0.0}, median_ms=milliseconds, low_ms=milliseconds,
        high_ms=milliseconds, best_ms=milliseconds, extra_bytes=100,
    )  # fmt: skip
    return {**base, **changes}


def verdicts(rows):
    return {cells[0]: (cells[2], cells[6]) for cells in cpu_sections.table(rows)}


def test_the_verdicts_of_a_training_step():
    found = verdicts(
        [
            row("fastgoal torch", 10.0, extra_bytes=10),
            row("eager amax", 51.0, extra_bytes=1000),
            row("eager max", 20.0),
            row("torch.compile of max", 9.0),
            row("late-interaction-kernels", 30.0),
            row("fastgoal torch, bf16 products", 5.0, bfloat16=True),
            row("eager amax, bf16 products", 20.0, bfloat16=True),
            row("flash-maxsim", None, status="unavailable", reason="no"),
        ]
    )
    assert found["fastgoal torch"] == ("1", "1")
    assert found["eager amax"] == ("5.1 (≥ 5: holds)", "0.01 (≤ 0.05: holds)")
    assert found["eager max"] == ("2 (≥ 3: MISSED)", "0.1 (≤ 0.05: MISSED)")
    assert found["torch.compile of max"] == ("0.9 (≥ 1: MISSED)", "0.1")
    assert found["late-interaction-kernels"][0] == "3 (≥ 1: holds)"
    assert found["fastgoal torch, bf16 products"][0] == "0.5"
    assert found["eager amax, bf16 products"][0] == "4 (≥ 1: holds)"  # beside ours in bfloat16
    assert "flash-maxsim" not in found


def test_scores_alone_promise_that_we_are_ahead_and_unseen_memory_is_not_compared():
    rows = [
        row("fastgoal torch", 10.0, section="forward"),
        row("eager amax", 12.0, section="forward"),
        row("maxsim-cpu", 9.0, section="forward", extra_bytes=None),
    ]
    found = verdicts(rows)
    assert found["eager amax"] == ("1.2 (≥ 1: holds)", "1")
    assert found["maxsim-cpu"] == ("0.9 (≥ 1: MISSED)", "")
    assert cpu_sections.table(rows)[2][5] == "not seen"
    assert verdicts([{**each, "images": 8} for each in rows])["maxsim-cpu"] == ("0.9", "")


def test_the_footer_explains_who_is_there_and_who_is_not():
    footer = cpu_sections.footer(
        [
            row("fastgoal torch", 1.0),
            row("maxsim-cpu", 1.0),
            row("flash-maxsim", None, status="unavailable", reason="needs a GPU"),
            row("eager max", None, status="failed", reason="ValueError: oh"),
        ]
    )
    assert len(footer) == 3 and footer[0].startswith("maxsim-cpu: ")
    assert footer[1:] == [
        "left out: flash-maxsim: needs a GPU",
        "left out: eager max: failed: ValueError: oh",
    ]

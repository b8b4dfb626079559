"""The one-shot sweep, run whole at tiny sizes, and the page that is made of it."""

import json
import math
import sys

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed (extra: bench)")

from benchmarks import (
    device,
    feature_workloads,
    pooling_workloads,
    report,
    token_workloads,
)
from benchmarks.feature_workloads import FeatureWorkload
from benchmarks.pooling_workloads import ALL, LARGE, PROMISED, PUBLISHED, SAMPLE, PoolingWorkload
from benchmarks.step_workloads import StepWorkload
from benchmarks.token_workloads import FARTHEST, GRAM, SIMILARITY, TokenWorkload
from benchmarks.workloads import CONTENDERS, Workload, sweep, takes_part


@pytest.fixture(scope="module")
def quick_result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "device-quick.json"
    with pytest.MonkeyPatch.context() as patch:
        # As if it were not installed: its import takes longer than all the rest.
        patch.setitem(sys.modules, "sentence_transformers", None)
        for name in [name for name in sys.modules if name.startswith("sentence_transformers.")]:
            patch.delitem(sys.modules, name)
        status = device.main(["--quick", "--out", str(path)])
    return status, json.loads(path.read_text()), path


def test_quick_sweep_finishes_and_every_row_says_what_happened(quick_result):
    status, document, _ = quick_result
    cuda = torch.cuda.is_available()
    assert status == 0 and document["finished"] and document["kind"] == "device"
    assert document["command"] == "python -m benchmarks.device --quick"
    assert document["versions"]["torch"] == torch.__version__.split("+")[0] or cuda
    assert document["device"]["type"] == ("cuda" if cuda else "cpu")
    assert document["ceilings"]["copy_gb_s"] > 0 and document["ceilings"]["gemm_tflop_s"] > 0
    rows = document["rows"]
    pairs = [(name, work) for name in CONTENDERS for work in sweep(cuda, quick=True)]
    own = [row for row in rows if row["op"].startswith("maxsim")]
    assert len(own) == sum(takes_part(*pair) for pair in pairs) > len(pairs) / 2
    for row in own:
        if row["status"] == "ok":
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert row["extra_bytes"] >= 0 and row["repeats"] >= 5
            assert all(math.isfinite(error) for error in row["parity"].values())
            expected = {"scores"} if row["op"] == "maxsim_scores" else {"loss"}
            if row["stage"] == "forward+backward":
                expected.add("gradients")
            assert set(row["parity"]) == expected
            assert (row["tflop_s"] is None) == (row["stage"] == "forward+backward")
        else:
            assert row["median_ms"] is None and row["reason"]
            assert row["status"] in ("unavailable", "skipped"), row


def test_quick_sweep_has_every_contender_of_both_losses_of_plain_features(quick_result):
    _, document, _ = quick_result
    rows = [row for row in document["rows"] if "batch" in row]
    works = feature_workloads.sweep(torch.cuda.is_available(), quick=True)
    names = feature_workloads.CONTENDERS
    planned = [(name, w) for w in works for name in names if feature_workloads.takes_part(name, w)]
    assert len(rows) == len(planned)
    status = {(row["contender"], row["op"], row["stage"]): row for row in rows}
    for name, work in planned:
        row = status[name, work.op, work.stage]
        if name in ("fastgoal torch", "eager"):
            assert row["status"] == "ok" and row["median_ms"] > 0 and row["tflop_s"] > 0
            expected = {"loss"}
            if work.stage == "forward+backward":
                expected |= {"gradients", "parameters"}
            assert set(row["parity"]) == expected
        else:
            assert row["status"] == "ok" or row["reason"]
    absent = status["sentence-transformers cached", "clip_contrastive_loss", "inference"]
    assert absent["status"] == "unavailable" and "import fails" in absent["reason"]
    assert {"memeff", "open-clip-torch", "sentence-transformers"} <= set(document["versions"])


def test_quick_sweep_measures_the_torch_backend_and_eager_everywhere(quick_result):
    _, document, _ = quick_result
    status = {}
    for row in document["rows"]:
        if row["op"].startswith("maxsim"):
            status.setdefault(row["contender"], []).append((row["layout"], row["status"]))
    assert all(each == "ok" for _, each in status["fastgoal torch"])
    for name in ("eager amax", "eager max"):
        for layout, each in status[name]:
            assert each == ("unavailable" if layout == "packed" else "ok")
    checks = {check["name"]: check for check in document["checks"]}
    assert len(checks) == 24
    assert checks["torch sigmoid_contrastive_loss"]["status"] == "ok"
    assert all(checks[f"torch {layout}"]["status"] == "ok" for layout in ("full", "packed"))


def test_a_spent_budget_skips_rows_and_says_so(tmp_path):
    path = tmp_path / "late.json"
    status = device.main(["--quick", "--budget", "0", "--only", "eager", "--out", str(path)])
    document = json.loads(path.read_text())
    assert status == 0 and document["finished"] and document["rows"]
    assert all("time budget" in row["reason"] for row in document["rows"])


def test_quick_sweep_has_the_text_conditioned_loss_and_the_token_ops(quick_result):
    _, document, _ = quick_result
    cuda = torch.cuda.is_available()
    for key, module in (("negatives", pooling_workloads), ("count", token_workloads)):
        rows = [row for row in document["rows"] if key in row and "model" not in row]
        works = module.sweep(cuda, quick=True)
        races = [(name, work) for name, work in device.planned(cuda, True) if work in works]
        assert len(rows) == len(races) and {name for name, _ in races} == set(module.CONTENDERS)
        for row in rows:
            if device.is_compiled(row["contender"]):
                assert row["status"] == "skipped"
            elif row["contender"] != "fastgoal triton":
                assert row["status"] == "ok" and row["median_ms"] > 0, row
                assert all(math.isfinite(error) for error in row["parity"].values())
                assert (row["tflop_s"] is None) == (key == "count")
            else:
                assert row["status"] == "ok" or row["reason"]


SECTION_TYPES = {
    "maxsim": Workload,
    "features": FeatureWorkload,
    "pooling": PoolingWorkload,
    "tokens": TokenWorkload,
    "steps": StepWorkload,
}


def test_sections_can_be_measured_apart():
    every = device.planned(True, False)
    apart = {name: device.planned(True, False, section=name) for name in SECTION_TYPES}
    assert set(SECTION_TYPES) == set(device.SECTIONS)
    for name, rows in apart.items():
        assert {type(work) for _, work in rows} == {SECTION_TYPES[name]}
    assert len(every) == sum(map(len, apart.values()))
    assert set(every) == {row for rows in apart.values() for row in rows}
    # A spent budget misses what is compiled first, and a rival of ours last.
    names = list(dict.fromkeys(name for name, _ in every))
    assert names[:2] == ["fastgoal triton", "fastgoal torch"]
    compiled = {"torch.compile", "torch.compile of open_clip", "torch.compile of eager"}
    assert compiled == set(names[-3:])
    sizes = [work for name, work in apart["features"] if device.is_compiled(name)]
    assert {(work.batch, work.dim) for work in sizes} == {feature_workloads.PROMISED}
    sizes = [work for name, work in apart["pooling"] if device.is_compiled(name)]
    assert {(work.images, work.captions_per_image) for work in sizes} == {
        pooling_workloads.PROMISED
    }


@pytest.mark.parametrize(
    "section, checks, rows", [("features", 4, 4), ("pooling", 4, 2), ("tokens", 6, 3)]
)
def test_a_section_has_its_own_checks_and_names_itself(section, checks, rows, tmp_path):
    path = tmp_path / "section.json"
    arguments = ["--quick", "--section", section, "--only", "eager", "--out", str(path)]
    assert device.main(arguments) == 0
    document = json.loads(path.read_text())
    assert document["command"] == f"python -m benchmarks.device --quick --section {section}"
    measured = [row for row in document["rows"] if row["status"] != "skipped"]
    assert [row["contender"] for row in measured] == ["eager"] * rows
    assert len(document["checks"]) == checks


def feature_row(contender, milliseconds, batch, dim=768, status="ok", **changes):
    work = FeatureWorkload("clip_contrastive_loss", "forward+backward", batch, dim, "bfloat16")
    row = dict(
        contender=contender, status=status, reason=None, parity={"loss": 0.0},
        median_ms=milliseconds, low_ms=milliseconds, high_ms=milliseconds, repeats=3,
        extra_bytes=10, tflop_s=1.0, share_of_gemm=0.5,
    )  # fmt: skip
    return {**work.as_json(), **row, **changes}


def test_a_contender_whose_next_call_would_take_too_long_is_stopped():
    work = FeatureWorkload("clip_contrastive_loss", "forward+backward", 65_536, 768, "bfloat16")
    rows = [
        feature_row("inf-cl", 40.0, 8_192),
        feature_row("inf-cl", 300.0, 32_768),
        feature_row("inf-cl", 9000.0, 32_768, dim=1024),
        fake_row("inf-cl", 9000.0),
        feature_row("memeff", 100.0, 32_768),
        feature_row("open_clip", None, 32_768, status="out of memory"),
    ]
    reason = device.too_slow(work, "inf-cl", rows)
    assert reason == "a call would take about 1.2 s, going by B 32,768"
    for name in ("memeff", "open_clip", "eager"):
        assert device.too_slow(work, name, rows) is None
    assert device.too_slow(sweep(cuda=True, quick=False)[0], "inf-cl", rows) is None


def test_a_contender_that_fails_or_is_wrong_is_a_row_not_a_crash(monkeypatch):
    work = sweep(cuda=False, quick=True)[0]
    cpu = torch.device("cpu")
    options = {"gemm_tflop_s": 1.0, "seconds": 0.01}

    def fails(inputs):
        raise ValueError("no such tile\nand a long story")

    monkeypatch.setattr(device, "build", lambda *_: fails)
    row = device.try_row(work, "eager amax", cpu, **options)
    assert row["status"] == "failed" and row["reason"] == "ValueError: no such tile"

    def out_of_memory(inputs):
        raise torch.OutOfMemoryError("tried to allocate 1 TB")

    monkeypatch.setattr(device, "build", lambda *_: out_of_memory)
    assert device.try_row(work, "eager amax", cpu, **options)["status"] == "out of memory"

    def wrong(inputs):
        return {"text_to_image": torch.ones(work.images, work.texts)}

    monkeypatch.setattr(device, "build", lambda *_: wrong)
    row = device.try_row(work, "eager amax", cpu, **options)
    assert row["status"] == "wrong" and row["median_ms"] is None and "scores" in row["reason"]


def test_the_page_renders_from_a_sweep(quick_result, tmp_path):
    _, document, path = quick_result
    out = tmp_path / "docs" / "benchmarks.md"
    assert report.main(["--results", str(path.parent), "--out", str(out)]) == 0
    text = out.read_text()
    assert document["device"]["name"] in text and "Honest non-wins" in text
    assert "maxsim_contrastive_loss, both, forward+backward" in text
    assert "sigmoid_contrastive_loss, forward+backward: B 24, D 16" in text
    assert list((tmp_path / "docs" / "benchmarks").glob("*.png"))
    if not torch.cuda.is_available():
        assert "not yet measured" in text


def test_the_page_claims_no_gpu_figure_without_a_gpu_result(tmp_path):
    out = tmp_path / "benchmarks.md"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    promised = [line for line in out.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(promised) > 35
    assert any("text-conditioned loss" in line for line in promised)
    assert any("farthest_point_sampling" in line for line in promised)
    assert any("softmax loss of plain features" in line for line in promised)
    assert all("not yet measured" in line for line in promised)


def fake_row(contender, milliseconds, **changes):
    work = dict(
        op="maxsim_scores", direction="text_to_image", stage="inference", images=1024, texts=1024,
        text_tokens=77, image_tokens=196, dim=512, dtype="bfloat16", layout="full", fill=1.0,
    )  # fmt: skip
    row = dict(
        contender=contender, status="ok", reason=None, parity={"scores": 0.0},
        median_ms=milliseconds, low_ms=milliseconds, high_ms=milliseconds, repeats=5,
        extra_bytes=10, tflop_s=1.0, share_of_gemm=0.5,
    )  # fmt: skip
    return {**work, **row, **changes}


def test_promises_and_lost_races_are_read_from_the_rows():
    rows = [
        fake_row("fastgoal triton", 10.0),
        fake_row("fastgoal torch", 8.0),
        fake_row("flash-maxsim", 50.0, extra_bytes=5),
        fake_row("late-interaction-kernels", 45.0),
        fake_row("fastgoal triton", 12.0, direction="both", stage="forward"),
    ]
    found = report.promises(rows)
    share, peers, torch_backend, both = found[:4]
    assert share.measured == 0.5 and share.cells()[3] == "no"
    assert peers.measured == 4.5 and peers.cells()[3] == "yes"
    assert torch_backend.measured == 0.8 and torch_backend.cells()[3] == "no"
    assert both.measured == pytest.approx(1.2) and both.cells()[3] == "yes"
    assert all(promise.measured is None for promise in found[4:])
    lost = report.losses({"rows": rows, "device": {"type": "cuda"}})
    assert len(lost) == 2
    assert "fastgoal torch takes 0.80 of our time" in lost[0]
    assert "flash-maxsim takes 0.50 of our memory" in lost[1]


def test_promises_of_plain_features_are_read_from_the_rows():
    rows = [
        feature_row("fastgoal triton", 100.0, 65_536, extra_bytes=700e6),
        feature_row("fastgoal torch", 50.0, 65_536),  # ours as well: not a rival
        feature_row("memeff", 300.0, 65_536),
        feature_row("torch.compile of open_clip", 120.0, 65_536),
        feature_row("memeff", 9.0, 65_536, dim=512),
        feature_row("fastgoal triton", 80.0, 65_536, op="sigmoid_contrastive_loss"),
        feature_row("siglip-kernel", 60.0, 65_536, op="sigmoid_contrastive_loss"),
    ]
    softmax, share, memory, sigmoid, sigmoid_memory = report.feature_promises(rows)
    assert softmax.measured == pytest.approx(1.2) and softmax.cells()[3] == "yes"
    assert share.measured == 0.5 and share.cells()[3] == "no"
    assert memory.measured == 700 and memory.target == pytest.approx(805.3, abs=0.1)
    assert sigmoid.measured == 0.75 and sigmoid.cells()[3] == "no"
    assert sigmoid_memory.cells()[3] == "yes"
    assert all(promise.measured is None for promise in report.feature_promises([]))
    lost = report.losses({"rows": rows, "device": {"type": "cuda"}})
    assert any("siglip-kernel takes 0.75 of our time" in line for line in lost)
    assert any("B 65,536, D 768" in line for line in lost)


def measured(work, contender, milliseconds, extra_bytes=10, **changes):
    row = dict(
        contender=contender, status="ok", reason=None, parity={"loss": 0.0},
        median_ms=milliseconds, low_ms=milliseconds, high_ms=milliseconds, repeats=3,
        extra_bytes=extra_bytes, tflop_s=1.0, share_of_gemm=0.5,
    )  # fmt: skip
    return {**work.as_json(), **row, **changes}


def test_promises_of_the_text_conditioned_loss_are_read_from_the_rows():
    def work(negatives, size):
        return PoolingWorkload(negatives, *size, 64, 512, 8, "bfloat16")

    sampled, every, large = work(SAMPLE, PROMISED), work(ALL, PROMISED), work(ALL, LARGE)
    rows = [
        measured(sampled, "fastgoal triton", 10.0, 100),
        measured(every, "fastgoal triton", 30.0, 1000),
        measured(large, "fastgoal triton", 300.0, 5e9),
        measured(sampled, PUBLISHED, 60.0, 900),
        measured(every, PUBLISHED, 1.0, 1),
        measured(sampled, "eager", 15.0),
        measured(sampled, "torch.compile of eager", 20.0),
        measured(work(SAMPLE, (16, 8)), "eager", 1.0),
    ]
    speed, memory, all_memory, all_time, large_time, large_memory = report.pooling_promises(rows)
    assert speed.measured == 6 and speed.cells()[3] == "yes"
    assert memory.measured == pytest.approx(1 / 9) and memory.cells()[3] == "no"
    assert all_memory.measured == pytest.approx(10 / 9) and all_memory.cells()[3] == "no"
    assert all_time.measured == 2 and all_time.cells()[3] == "yes"  # of the fastest vectorised
    assert large_time.measured == 300 and large_time.cells()[3] == "no"
    assert large_memory.measured == 5000 and large_memory.cells()[3] == "yes"
    assert all(promise.measured is None for promise in report.pooling_promises([]))
    lost = report.losses({"rows": rows, "device": {"type": "cuda"}})
    start = "text_conditioned_sigmoid_loss, all, forward+backward: 256 × 2,048"
    assert any(line.startswith(start) and "takes 0.03 of our time" in line for line in lost)


def test_promises_of_the_token_ops_are_read_from_the_rows():
    points = TokenWorkload(FARTHEST, "inference", 256, 197, 65, 768, "bfloat16")
    tsl = TokenWorkload(SIMILARITY, "forward+backward", 256, 196, 248, 768, "bfloat16")
    rows = [
        measured(points, "fastgoal triton", 0.5, tflop_s=None),
        measured(points, GRAM, 2.0, tflop_s=None),
        measured(tsl, "fastgoal triton", 0.25, tflop_s=None),
    ]
    time, faster, similarity = report.token_promises(rows)
    assert (time.measured, time.cells()[3]) == (0.5, "yes")
    assert (faster.measured, faster.cells()[3]) == (4.0, "no")
    assert (similarity.measured, similarity.cells()[3]) == (0.25, "yes")
    assert all(promise.measured is None for promise in report.token_promises([]))


def test_of_the_many_sizes_of_plain_features_the_picture_shows_the_promised_one():
    rows = [feature_row("fastgoal triton", 1.0, b, d) for b in (8_192, 65_536) for d in (512, 768)]
    rows.append(feature_row("memeff", None, 65_536, status="failed"))
    rows.append(fake_row("fastgoal triton", 1.0, stage="forward+backward"))
    (maxsim, features) = sorted(
        report.panels({"kind": "device", "rows": rows}), key=lambda panel: "B 65" in panel.title
    )
    assert "1024 × 1024" in maxsim.title
    assert "B 65,536, D 768" in features.title and features.names == ["fastgoal triton"]
    small = report.panels({"kind": "device", "rows": rows[:2]})
    assert len(small) == 2

"""The one-shot sweep, run whole at tiny sizes, and the page that is made of it."""

import json
import math

import pytest
import torch

pytest.importorskip("rich", reason="rich is not installed (extra: bench)")

from benchmarks import device, report
from benchmarks.workloads import CONTENDERS, sweep, takes_part


@pytest.fixture(scope="module")
def quick_result(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "device-quick.json"
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
    assert len(rows) == sum(takes_part(*pair) for pair in pairs) > len(pairs) / 2
    for row in rows:
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


def test_quick_sweep_measures_the_torch_backend_and_eager_everywhere(quick_result):
    _, document, _ = quick_result
    status = {}
    for row in document["rows"]:
        status.setdefault(row["contender"], []).append((row["layout"], row["status"]))
    assert all(each == "ok" for _, each in status["fastgoal torch"])
    for name in ("eager amax", "eager max"):
        for layout, each in status[name]:
            assert each == ("unavailable" if layout == "packed" else "ok")
    checks = {check["name"]: check for check in document["checks"]}
    assert len(checks) == 6
    assert all(checks[f"torch {layout}"]["status"] == "ok" for layout in ("full", "packed"))


def test_a_spent_budget_skips_rows_and_says_so(tmp_path):
    path = tmp_path / "late.json"
    status = device.main(["--quick", "--budget", "0", "--only", "eager", "--out", str(path)])
    document = json.loads(path.read_text())
    assert status == 0 and document["finished"] and document["rows"]
    assert all("time budget" in row["reason"] for row in document["rows"])


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
    assert list((tmp_path / "docs" / "benchmarks").glob("*.png"))
    if not torch.cuda.is_available():
        assert "not yet measured" in text


def test_the_page_claims_no_gpu_figure_without_a_gpu_result(tmp_path):
    out = tmp_path / "benchmarks.md"
    report.main(["--results", str(tmp_path), "--out", str(out)])
    promised = [line for line in out.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(promised) > 20
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

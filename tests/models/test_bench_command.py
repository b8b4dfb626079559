"""`fastgoal bench`: what it shows and writes of a sweep, and what it says where there is none."""

import io
import json
import os
import signal
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: models)")

from benchmarks import device as sweep
from benchmarks import report
from fastgoal_models import bench_command
from fastgoal_models.bench_command import BenchOptions, run_bench
from fastgoal_models.cli import app

FEW = ("fastgoal triton", "fastgoal torch", "eager amax", "eager", "torch.compile")


@pytest.fixture(autouse=True)
def _few_contenders(monkeypatch):
    names = sweep.contenders()
    assert set(FEW) <= set(names)
    monkeypatch.setattr(sweep, "contenders", lambda: [name for name in names if name in FEW])


def bench(out: Path, **options) -> tuple[bench_command.Outcome, str]:
    console = Console(record=True, width=120, force_terminal=False, file=io.StringIO())
    options = {"quick": True, "device": "cpu", **options}
    return run_bench(BenchOptions(out, **options), console), console.export_text()


def document_of(out: Path) -> dict:
    return json.loads((out / "bench.json").read_text())


def test_a_quick_sweep_is_shown_and_written(tmp_path):
    out = tmp_path / "new" / "bench"
    outcome, text = bench(out, command="fastgoal bench --quick")
    assert outcome == (True, True)
    document = document_of(out)
    assert document["kind"] == "device" and document["command"] == "fastgoal bench --quick"
    assert document["finished"] and document["checks"] and document["ceilings"]
    assert len(document["rows"]) == len(sweep.planned(cuda=False, quick=True))
    assert document["device"]["name"] in text and f"torch {document['versions']['torch']}" in text
    titles = [line for line in text.splitlines() if line.endswith(", float32")]
    assert "forward+backward" in titles[0]  # what people want to know comes first
    for op in ("maxsim_scores", "maxsim_contrastive_loss", "clip_contrastive_loss", "sigmoid_"):
        assert any(title.startswith(op) for title in titles)
    assert not any(", forward:" in title for title in titles)
    assert "fastgoal torch, packed" in text and "eager amax, padded" in text
    assert "× faster" in text or "× slower" in text
    assert "not on a CUDA device: fastgoal triton × " in text  # who is missing, and why
    assert "mostly the fixed cost" in text
    assert "Lost races" not in text and "nobody was faster" not in text
    with Image.open(out / "bench.png") as picture:
        picture.load()
        assert min(picture.size) > 300
    assert report.load(out)[0]["stem"] == "bench"  # the page can be made of it


def test_rivals_follow_each_other_on_a_cpu_and_compiling_comes_last():
    rows = sweep.planned(cuda=False, quick=False)
    names = [name for name, _ in rows]
    first = names.index("torch.compile")
    assert set(names[first:]) == {"torch.compile"} and first > 20
    works = [work for _, work in rows[:first]]
    assert len([*groupby(works)]) == len({*works})  # all rivals of one, then the next
    trains = [work.stage == "forward+backward" for work in works]
    assert trains == sorted(trains, reverse=True) and True in trains and False in trains
    on_a_gpu = [name for name, _ in sweep.planned(cuda=True, quick=False)]
    assert [name for name, _ in groupby(on_a_gpu)] == sweep.contenders()


def test_ctrl_c_shows_and_writes_what_there_is(monkeypatch, tmp_path):
    measure, measured = sweep.try_row, []

    def press(work, contender, device, **options):
        measured.append(contender)
        if len(measured) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(work, contender, device, **options)

    monkeypatch.setattr(sweep, "try_row", press)
    outcome, text = bench(tmp_path)
    assert not outcome.finished
    assert "Interrupted" in text and "fastgoal torch" in text
    document = document_of(tmp_path)
    assert not document["finished"] and len(document["rows"]) == 2 and measured[2:]
    assert (tmp_path / "bench.png").exists()
    measured.clear()
    found = command("--quick", "--device", "cpu", "--out", tmp_path / "again")
    assert found.exit_code == 130


def command(*arguments: object):
    arguments = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "300"})


def test_a_spent_budget_says_so(tmp_path):
    found = command("--quick", "--device", "cpu", "--budget", "0", "--out", tmp_path)
    assert found.exit_code == 0
    assert "skipped: the time budget of 0 s was used up" in found.output
    assert "No picture" in found.output and "nobody" not in found.output


def test_a_wrong_backend_of_ours_is_exit_code_1(monkeypatch, tmp_path):
    def wrong(work, contender, device, **options):
        row = {**work.as_json(), "contender": contender, **sweep.EMPTY_ROW}
        return {**row, "status": "wrong", "reason": "relative error of loss 0.3"}

    monkeypatch.setattr(sweep, "try_row", wrong)
    found = command("--quick", "--device", "cpu", "--out", tmp_path)
    assert found.exit_code == 1
    assert "wrong: relative error of loss 0.3" in found.output


def test_without_the_repository_it_says_what_to_do(monkeypatch, tmp_path):
    installed = tmp_path / "site-packages" / "fastgoal_models" / "bench_command.py"
    monkeypatch.setattr(bench_command, "__file__", str(installed))
    found = command("--quick", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "git clone" in found.output and "pip install -e '.[bench]'" in found.output
    assert not (tmp_path / "out").exists()


def test_the_checkout_s_benchmarks_win_over_another_package_of_that_name(monkeypatch):
    root = str(Path(bench_command.__file__).parents[1])
    monkeypatch.setattr(sys, "path", ["/elsewhere", *(p for p in sys.path if p != root), root])
    bench_command.require_checkout()
    assert sys.path[0] == root


def test_without_matplotlib_there_is_no_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome, text = bench(tmp_path)
    assert outcome.finished and "No picture" in text and "pip install matplotlib" in text
    assert (tmp_path / "bench.json").exists() and not (tmp_path / "bench.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [(["--device", "toaster"], "device 'toaster'"), (["--device", "meta"], "only CPUs and CUDA")],
)
def test_bad_devices(tmp_path, arguments, words):
    found = command(*arguments, "--out", tmp_path / "out")
    assert found.exit_code == 2 and words in found.output
    assert not (tmp_path / "out").exists()


# -- the table ------------------------------------------------------------------------------------


def row(contender: str, milliseconds: float, megabytes: float, **changes) -> dict:
    work = sweep.planned(cuda=False, quick=True)[0][1].as_json()
    times = dict.fromkeys(("median_ms", "low_ms", "high_ms"), milliseconds)
    known = {"contender": contender, "status": "ok", "reason": None, "parity": {"loss": 0.0}}
    return {**work, **known, **times, "extra_bytes": megabytes * 1e6, **changes}


def lines_of(rows: list[dict], ours: str) -> dict[str, str]:
    console = Console(record=True, width=120, file=io.StringIO())
    for race in report.races(rows):
        bench_command._show_race(race, ours, "title", console)
    lines = console.export_text().splitlines()
    return {name: line for line in lines for name in FEW if line.strip().startswith(name)}


def test_times_and_memory_are_compared_with_ours():
    rows = [row("eager amax", 30, 50), row("torch.compile", 5, 2), row("fastgoal torch", 10, 5)]
    lines = lines_of(rows, "fastgoal torch")
    assert next(iter(lines)) == "fastgoal torch" and "×" not in lines["fastgoal torch"]
    assert "3.0 × faster" in lines["eager amax"] and "1/10.0" in lines["eager amax"]
    assert "2.0 × slower" in lines["torch.compile"] and "2.5 ×" in lines["torch.compile"]


def test_packed_and_padded_captions_race_each_other():
    ragged = [
        row("fastgoal torch", 20, 5, layout="padded", fill=0.55),
        row("fastgoal torch", 10, 5, layout="packed", fill=0.55),
        row("eager amax", 40, 50, layout="padded", fill=0.55),
        row("eager amax", 7, 9),
    ]
    races = report.races(ragged)
    assert [len(race) for race in races] == [3, 1]
    assert [r["label"] for r in races[0]] == [
        "fastgoal torch, padded", "fastgoal torch, packed", "eager amax, padded",
    ]  # fmt: skip
    assert "4.0 × faster" in lines_of(ragged[:3], "fastgoal torch")["eager amax"]  # than packed
    assert "captions 55% full" in report.describe_race(ragged[0])


@pytest.mark.parametrize("load, is_said", [(64.0, True), (1.0, False)])
def test_a_busy_machine_is_said_to_be(monkeypatch, load, is_said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    console = Console(record=True, width=120, file=io.StringIO())
    bench_command._say_if_busy(console)
    assert ("a load of 64.0 on 8 cores" in console.export_text()) == is_said


def test_a_machine_is_described_in_one_line(tmp_path):
    document = {
        "device": {"name": "A CPU", "threads": 1}, "source": {"commit": "0" * 40, "modified": True},
        "versions": {"torch": "2.9.0", "triton": None},
    }  # fmt: skip
    described = report.describe_machine(document)
    assert described == "A CPU, 1 thread, torch 2.9.0, commit 000000000000 with local changes"


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    outcome, text = bench(tmp_path, device="cuda")
    assert outcome == (True, True) and torch.cuda.get_device_name() in text

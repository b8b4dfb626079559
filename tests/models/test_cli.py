"""The `fastgoal` command: what a person types, what the screen says, and the exit code."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastgoal_kernels
import fastgoal_models.demo.run
from fastgoal_models import progress
from fastgoal_models.checkpoints import latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.training import read_log

TINY = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16
    },
    "text_cfg": {"context_length": 24, "width": 8, "heads": 2, "layers": 1},
}  # fmt: skip


def run(*arguments: object):
    # Rich wraps at the width of the terminal; none of these tests is about line breaks.
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def data(tmp_path) -> Path:
    """Six small pictures with two sentences each; the annotation file's path."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        caption = f"Noise number {number}. Its colours are random."
        rows.append({"id": str(number), "image": f"{number}.png", "caption": caption})
    return write(folder / "pairs.jsonl", rows)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def train_arguments(data, tiny, tmp_path) -> list[object]:
    return [
        "train", "fast-goal", "--data", data, "--model", tiny, "--out", tmp_path / "out",
        "--context-length", 24, "--batch-size", 2, "--steps", 3, "--device", "cpu",
    ]  # fmt: skip


def test_version():
    found = run("--version")
    assert (found.exit_code, found.stdout.strip()) == (
        0,
        f"fastgoal {fastgoal_kernels.__version__}",
    )


@pytest.mark.parametrize(
    "command, words",
    [
        ([], ["demo", "train", "--version", "--install-completion"]),
        (["prepare"], ["--detector", "--shard", "--published"]),
        (["eval"], ["--set", "--before", "--trained-on"]),
        (["search"], ["--score", "--out", "-k"]),
        (["maps"], ["--before", "--limit", "fastgoal hierarchy"]),
        (["embed"], ["--out", "--model"]),
        (["demo"], ["--steps", "--pretrained", "--resume"]),
        (["train", "fast-goal"], ["--data", "--strict", "--preset"]),
        (["train", "caft"], ["--data", "--superpixels", "--negatives"]),
    ],
)
def test_help(command, words):
    found = run(*command, "--help")
    assert found.exit_code == 0
    for word in words:
        assert word in plain(found.stdout)


def test_train_trains_and_resumes(train_arguments, tmp_path):
    found = run(*train_arguments)
    assert found.exit_code == 0, found.output
    assert "6 records read, none skipped" in found.output
    assert "which pairs they match is arbitrary" in found.output
    assert "step 3/3" in found.output and "steps/s" in found.output
    checkpoint = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert checkpoint is not None and str(checkpoint) in found.output
    assert load_checkpoint(checkpoint).step == 3
    again = run(*train_arguments)
    assert again.exit_code == 2 and "already holds checkpoints" in again.output
    resumed = run(*train_arguments, "--resume")
    assert resumed.exit_code == 0 and "3 of 3 steps done" in resumed.output


def test_a_different_resume_is_refused(train_arguments):
    assert run(*train_arguments).exit_code == 0
    found = run(*train_arguments, "--lr", "0.5", "--resume")
    assert found.exit_code == 2
    assert "learning_rate was 1e-05, is now 0.5" in found.output
    assert "Traceback" not in found.output


def test_changed_data_is_not_resumed(train_arguments, data):
    assert run(*train_arguments).exit_code == 0
    rows = rows_of(data)
    rows[0]["caption"] = "Another caption. Of two sentences."
    write(data, rows)
    found = run(*train_arguments, "--resume")
    assert found.exit_code == 2 and "data was" in found.output


def test_weights_of_a_run_start_the_next(train_arguments, tmp_path):
    """The second of two stages: a checkpoint's weights file as --pretrained."""
    assert run(*train_arguments).exit_code == 0
    weights = tmp_path / "out/checkpoints/step-00000003/model.safetensors"
    again = [*train_arguments, "--pretrained", weights]
    again[again.index("--out") + 1] = tmp_path / "second"
    found = run(*again)
    assert found.exit_code == 0, found.output
    assert "arbitrary" not in found.output


def test_the_published_preset(train_arguments, tmp_path):
    assert run(*train_arguments, "--preset", "published").exit_code == 0
    config = load_checkpoint(tmp_path / "out/checkpoints/step-00000003").config
    assert (config["learning_rate"], config["decay_all"], config["clip_norm"]) == (5e-6, True, None)


def test_ctrl_c_says_how_to_resume(train_arguments, monkeypatch, tmp_path):
    show = progress.StepPrinter.__call__

    def press(printer, record):
        show(printer, record)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.StepPrinter, "__call__", press)
    monkeypatch.setattr("sys.argv", ["fastgoal", *map(str, train_arguments)])
    found = run(*train_arguments)
    assert found.exit_code == 130
    assert "--device cpu --resume" in plain(found.output)
    assert len(read_log(tmp_path / "out")) == 1
    monkeypatch.undo()
    assert run(*train_arguments, "--resume").exit_code == 0
    assert len(read_log(tmp_path / "out")) == 3


# -- bad input ------------------------------------------------------------------------------------


def assert_refused(found, *words: str) -> None:
    assert found.exit_code == 2, found.output
    text = plain(found.output)
    assert "error:" in text and "Traceback" not in text
    for word in words:
        assert word in text


def assert_nothing_written(out: Path) -> None:
    assert not out.exists() or not any(out.iterdir())


BAD_RECORDS = {
    "image is missing": {"image": "gone.png", "caption": "A picture. It is gone."},
    "image is corrupt": {"image": "corrupt.png", "caption": "A picture. It is broken."},
    "image leaves the data folder": {"image": "../outside.png", "caption": "Outside. Not ours."},
    "caption is empty": {"image": "0.png", "caption": "  "},
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_records_are_skipped_or_refused(train_arguments, data, tmp_path, reason):
    whole = (data.parent / "1.png").read_bytes()
    (data.parent / "corrupt.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "outside.png").write_bytes(whole)
    write(data, [*rows_of(data), {"id": "bad"} | BAD_RECORDS[reason]])
    refused = run(*train_arguments, "--strict")
    assert_refused(refused, reason, "line 7", BAD_RECORDS[reason]["image"])
    assert_nothing_written(tmp_path / "out")
    skipped = run(*train_arguments)
    assert skipped.exit_code == 0, skipped.output
    assert "6 records read, 1 skipped" in skipped.output
    assert reason in skipped.output and "line 7" in skipped.output


def test_missing_annotations(train_arguments, data):
    data.unlink()
    assert_refused(run(*train_arguments), "pairs.jsonl")


def test_missing_image_folder(train_arguments, tmp_path):
    found = run(*train_arguments, "--root", tmp_path / "nowhere")
    assert_refused(found, "no usable record")
    assert "6 × image is missing" in found.output


def test_too_few_records(train_arguments, data):
    write(data, rows_of(data)[:1])
    assert_refused(run(*train_arguments), "do not fill one batch")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no-such-model"], ["open_clip has no model 'no-such-model'"]),
        (["--pretrained", "gone.safetensors"], ["gone.safetensors"]),
        (["--device", "toaster"], ["device 'toaster' can not be used"]),
        (["--epochs", "1"], ["steps or epochs"]),
        (["--resume"], ["no complete checkpoint"]),
    ],
)
def test_bad_options(train_arguments, tmp_path, arguments, words):
    assert_refused(run(*train_arguments, *arguments), *words)
    assert latest_checkpoint(tmp_path / "out" / "checkpoints") is None


@pytest.mark.parametrize(
    "arguments", [["--precision", "fp64"], ["--steps", "0"], ["--no-such-option"]]
)
def test_mistyped_options(train_arguments, arguments):
    assert run(*train_arguments, *arguments).exit_code == 2


def test_trackers_that_are_not_installed(train_arguments, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused(run(*train_arguments, "--wandb"), "pip install wandb")
    assert_nothing_written(tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(train_arguments, tmp_path):
    assert run(*train_arguments).exit_code == 0
    weights = tmp_path / "out/checkpoints/step-00000003/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(run(*train_arguments, "--resume"), "is damaged", "model.safetensors")


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.md").write_text("mine")
    assert_refused(run("demo", "--out", tmp_path), "holds other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.md"]
    assert_refused(run("demo", "--out", tmp_path / "thesis.md"), "is a file")


def test_demo_stopped_by_ctrl_c(monkeypatch, tmp_path):
    monkeypatch.setattr(fastgoal_models.demo.run, "run_demo", lambda options, console: None)
    monkeypatch.setattr("sys.argv", ["fastgoal", "demo", "--steps", "5"])
    found = run("demo", "--steps", "5")
    assert found.exit_code == 130
    assert "fastgoal demo --steps 5 --resume" in plain(found.output)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(options, console):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(fastgoal_models.demo.run, "run_demo", broken)
    found = run("demo", "--out", tmp_path / "new")
    assert found.exit_code == 1 and isinstance(found.exception, ZeroDivisionError)

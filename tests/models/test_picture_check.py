"""Pictures of training data are decoded once; a resumed run leaves out the same records unread."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastgoal_models import pictures
from fastgoal_models.caft.data import read_caft
from fastgoal_models.caft.shards import read_shards
from fastgoal_models.checkpoints import latest_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.picture_check import SKIPPED, PictureCheck, lines_in
from fastgoal_models.skips import Unusable
from tests.models.caft.test_train import TINY
from tests.models.small_models import CONFIG

CAPTION = "A rectangle. It is plain."


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), (number, 9, 99)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures, of which the header of the third is all that is whole; and as a shard."""
    rows = []
    for number in range(5):
        content = png(number)[:60] if number == 2 else png(number)
        (tmp_path / f"{number}.png").write_bytes(content)
        pair = {"sentence": 0, "box": [0, 0, 9, 9], "region": "all", "score": 0.5}
        row = {"id": str(number), "image": f"{number}.png", "caption": CAPTION}
        rows.append(json.dumps(row | {"pairs": [pair]}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for number, row in enumerate(rows):
            (tmp_path / f"{number}.json").write_text(row)
            for ending in ("json", "png"):
                tar.add(tmp_path / f"{number}.{ending}", f"{number}.{ending}")
    (tmp_path / "clip.json").write_text(json.dumps(CONFIG))
    (tmp_path / "caft.json").write_text(json.dumps(TINY))
    return tmp_path


def run(folder: Path, method: str, data: str, *words: object, code: int = 0) -> str:
    model = {
        "fast-goal": ["--model", folder / "clip.json", "--context-length", 24],
        "caft": ["--model", folder / "caft.json"],
    }[method]
    command = [
        "train", method, "--data", folder / data, "--out", folder / "run", "--steps", 2,
        "--batch-size", 2, "--device", "cpu", "--save-every", 1, *model, *words,
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in command], env={"COLUMNS": "300"})
    assert done.exit_code == code, done.output
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output)


@pytest.mark.parametrize("method", ["fast-goal", "caft"])
@pytest.mark.parametrize("data", ["data.jsonl", "data.tar"])
def test_a_resumed_run_decodes_nothing_and_leaves_out_the_same(folder, monkeypatch, method, data):
    first = run(folder, method, data)
    assert "4 records read, 1 skipped" in first and (folder / "run" / SKIPPED).is_file()
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    (newest / "checkpoint.json").unlink()  # as if it had been killed while it saved
    decoded, read = [], pictures._read_image

    def reading(file, name, decode):
        decoded.append(decode)
        return read(file, name, decode)

    monkeypatch.setattr(pictures, "_read_image", reading)
    again = run(folder, method, data, "--resume")
    assert "4 records read, 1 skipped" in again and "2 of 2 steps done" in again
    assert decoded.count(True) == 2  # the batch of its one step
    said = [line for line in first.splitlines() if " × " in line]
    assert said == [line for line in again.splitlines() if " × " in line]


def test_data_that_were_touched_are_checked_anew(folder):
    run(folder, "fast-goal", "data.jsonl")
    (folder / "2.png").write_bytes(png(2))
    assert "1 skipped" in run(folder, "fast-goal", "data.jsonl", "--resume")  # as it began
    os.utime(folder / "data.jsonl", (1, 1))
    said = run(folder, "fast-goal", "data.jsonl", "--resume", code=2)
    assert "records was 4, is now 5" in said


def test_a_picture_that_is_gone_is_still_refused(folder):
    for method in ("fast-goal", "caft"):
        run(folder, method, "data.jsonl", "--out", folder / method)
    (folder / "4.png").unlink()
    for method in ("fast-goal", "caft"):
        said = run(folder, method, "data.jsonl", "--out", folder / method, "--resume", code=2)
        assert "records was 4, is now 3" in said


def test_a_note_that_can_not_be_read_is_no_note(folder, tmp_path):
    data = folder / "data.jsonl"
    for text in ("{", "[]", "{}"):
        (tmp_path / SKIPPED).write_text(text)
        check = PictureCheck.of_run(tmp_path, data, None, resume=True)
        assert check.judge("1", lambda decode: decode) is True


def test_what_is_judged_is_counted(folder):
    console = Console(force_terminal=True, file=io.StringIO())
    check = PictureCheck()
    with check.watch(console):
        check.expect(lines_in(folder / "data.jsonl"))
        records, _ = read_caft(folder / "data.jsonl", check=check)
        assert check._bar is not None
        (task,) = check._bar.tasks
        assert (task.completed, task.total, task.description) == (5, 5, "checking")
    assert len(records) == 4
    with check.watch(console):
        read_shards(folder / "data.tar", check=check)
        (task,) = check._bar.tasks
        assert (task.completed, task.total) == (5, 5)


def test_of_samples_with_one_id_the_first_stays(folder):
    """As of FAST-GOAL's records: in one batch they would be negatives of themselves."""
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    rows[3]["id"] = "0"
    for row in (rows[1], rows[4]):
        del row["id"]
    rows[4]["image"] = "1.png"
    (folder / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, report = read_caft(folder / "twice.jsonl")
    assert [record.image.name for record in records] == ["0.png", "1.png"]
    assert report.counts["id appears twice"] == 2 and report.names["id appears twice"] == [
        "0", "1.png",
    ]  # fmt: skip
    with tarfile.open(folder / "more.tar", "w") as tar:
        for ending in ("json", "png"):
            tar.add(folder / f"0.{ending}", f"other.{ending}")
    samples, report = read_shards(folder / "*a.tar")
    assert len(samples) == 4
    samples, report = read_shards(folder / "*.tar")
    assert len(samples) == 4 and report.names["id appears twice"] == ["0"]


def test_why_a_record_is_left_out_is_kept(tmp_path, folder):
    def refuse(decode: bool) -> str:
        raise Unusable("image is corrupt", "line 7")

    check = PictureCheck.of_run(tmp_path, folder / "data.jsonl", None, resume=False)
    assert isinstance(check.judge("7", refuse), Unusable)
    check.save()
    again = PictureCheck.of_run(tmp_path, folder / "data.jsonl", None, resume=True)
    skip = again.judge("7", lambda decode: "a record")
    assert isinstance(skip, Unusable)
    assert (skip.reason, skip.name) == ("image is corrupt", "line 7")
    assert again.judge("8", lambda decode: decode) is False

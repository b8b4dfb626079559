"""`--json` of every command: whole or not at all, and `-` is the standard output alone."""

import json
import tarfile
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from fastgoal_models.cli import app
from fastgoal_models.json_output import console_beside, write_json
from fastgoal_models.training import read_evaluations, read_log
from tests.models.small_models import CONFIG, coloured_records

TRAIN = [
    "--data", "captions.jsonl", "--out", "run", "--steps", "2", "--batch-size", "2",
    "--eval-data", "captions.jsonl", "--keep-best",
]  # fmt: skip
CHECKPOINT = "run/checkpoints/step-00000002"
RUN = {
    "checkpoint": CHECKPOINT, "best_checkpoint": CHECKPOINT, "steps": 2, "total_steps": 2,
    "interrupted": False,
}  # fmt: skip
FOUND = {
    "prepare": {
        "out": "pairs.jsonl", "done": True, "pictures": 3, "skipped": {}, "images": 3, "pairs": 6
    },
    "embed": {"out": "index.safetensors", "count": 3, "width": 16, "skipped": {}},
    "train fast-goal": RUN,
    "train caft": RUN,
}  # fmt: skip


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "found.json"
    write_json({"a": 1}, path, Console())
    assert json.loads(path.read_text()) == {"a": 1}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_json({"a": 2}, path, Console())
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]
    write_json({"a": 2}, None, Console())


def test_people_are_talked_to_elsewhere(capsys):
    assert not console_beside(None).stderr and not console_beside(Path("a.json")).stderr
    console = console_beside(Path("-"))
    console.print("hello")
    write_json({"a": 1}, Path("-"), console)
    said = capsys.readouterr()
    assert json.loads(said.out) == {"a": 1} and said.err == "hello\n"


COMMANDS = ["eval", "unpack", "doctor", "prepare", "embed", "train fast-goal", "train caft"]


@pytest.mark.parametrize("command", COMMANDS)  # of search see its own tests
def test_a_commands_standard_output_is_json(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    rows = [{"image": r.image.name, "caption": r.caption} for r in coloured_records(tmp_path)]
    Path("captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("model.json").write_text(json.dumps(CONFIG))
    words = {
        "eval": ["--model", "model.json", "--data", "captions.jsonl", "--device", "cpu"],
        "unpack": ["shard.tar", "--out", "out"],
        "doctor": ["--device", "cpu"],
        "prepare": ["--model", "model.json", "--data", "captions.jsonl", "--out", "pairs.jsonl"],
        "embed": [".", "--model", "model.json", "--out", "index.safetensors"],
        "train fast-goal": [*TRAIN, "--model", "model.json", "--context-length", "24"],
        "train caft": [*TRAIN, "--model", "caft-xs"],
    }
    if command == "unpack":
        with tarfile.open("shard.tar", "w") as tar:
            Path("red.txt").write_text("A red rectangle.")
            for name in ("red.png", "red.txt"):
                tar.add(name)
    done = CliRunner().invoke(app, [*command.split(), *words[command], "--json", "-"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["schema"] == 1 and document["kind"]
    assert command == "doctor" or document["command"].startswith("fastgoal")
    assert done.stderr and not Path("-").exists()
    for name, value in FOUND.get(command, {}).items():
        assert document[name] == value, name
    if command.startswith("train"):
        assert Path(document["checkpoint"]).is_dir() and document["seconds"] > 0
        assert document["losses"]["loss"] == read_log(Path("run"))[-1].losses["loss"]
        assert document["evaluation"] == read_evaluations(Path("run"))[-1]._asdict()


def test_all_commands_with_it_are_tested():
    commands = get_command(app).commands  # pyrefly: ignore
    commands |= {f"train {name}": c for name, c in commands["train"].commands.items()}
    found = {name for name, c in commands.items() if any("--json" in p.opts for p in c.params)}
    assert found == {*COMMANDS, "search"}

"""A run of one step, as the command leaves it, for the tests of what reads runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from fastgoal_models import GlitRecord, write_glit
from fastgoal_models.cli import app
from tests.models.small_models import CONFIG


def fastgoal(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})


def train(data: str, out: str, model: str, *words: object) -> None:
    done = fastgoal(
        "train", "fast-goal", "--data", data, "--out", out, "--model", model, "--steps", 1,
        "--batch-size", 2, "--device", "cpu", *words,
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def tuned_run(records: Sequence[GlitRecord]) -> list[str]:
    """A run on the first two pictures, and the command that evaluates one on all three.

    In the current folder, where their pictures are.
    """
    write_glit(records[:2], Path("trained.jsonl"))
    write_glit(records, Path("data.jsonl"))
    Path("model.json").write_text(json.dumps(CONFIG))
    train("trained.jsonl", "run", "model.json", "--context-length", 36)
    return ["eval", "--data", "data.jsonl", "--device", "cpu", "--json", "e.json", "--model"]

"""What is imported when: the command answers at once, and the package's names are there when asked.

Each test runs in a process of its own, since this one has imported everything.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgoal_models

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "open_clip", "triton", "transformers", "fastgoal_kernels")


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_waits_for_nothing_heavy():
    """Of the command, and of every subcommand."""
    code = f"""
import sys
from typer.main import get_command
from typer.testing import CliRunner
from fastgoal_models.cli import app
names = list(get_command(app).commands)
for arguments in ([], *([name] for name in names)):
    found = CliRunner().invoke(app, [*arguments, "--help"])
    assert found.exit_code == 0 and "--help" in found.output, arguments
print(len(names), [name for name in {HEAVY} if name in sys.modules])
"""
    number, imported = python(code).split(" ", 1)
    assert int(number) >= 4
    assert imported.strip() == "[]"


def test_a_missing_package_is_one_line_that_names_the_extra():
    code = """
import sys
from typer.testing import CliRunner
from fastgoal_models.cli import app
sys.modules["open_clip"] = None
found = CliRunner().invoke(app, ["train", "fast-goal", "--data", "x", "--out", "y"])
print(found.exit_code, found.output)
"""
    said = python(code)
    assert said.startswith("2 ") and "pip install 'fastgoal[models]'" in said
    assert "Traceback" not in said


def test_every_public_name_is_found():
    for name in fastgoal_models.__all__:
        assert getattr(fastgoal_models, name) is not None
    assert (
        set(fastgoal_models._HOME_OF) == set(fastgoal_models.__all__) <= set(dir(fastgoal_models))
    )
    with pytest.raises(AttributeError, match="has no attribute 'FastGoalModle'"):
        _ = fastgoal_models.FastGoalModle  # type: ignore[attr-defined]

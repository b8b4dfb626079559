"""What is imported when: the command answers at once, and the package's names are there when asked.

Each test runs in a process of its own, since this one has imported everything.
"""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import fastgoal_models

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "open_clip", "triton", "transformers", "fastgoal_kernels")


def start(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def python(code: str) -> str:
    done = start(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(first: str) -> subprocess.CompletedProcess[str]:
    """`fastgoal --version`, after some code of ours."""
    return start(
        f"import sys\n{first}\nsys.argv = ['fastgoal', '--version']\n"
        "from fastgoal_models.__main__ import main\nmain()\n"
    )


def test_help_waits_for_nothing_heavy():
    """Of the command, and of every subcommand; nor does the version."""
    code = f"""
import sys
from typer.main import get_command
from typer.testing import CliRunner
from fastgoal_models.cli import app
names = list(get_command(app).commands)
for arguments in ([], *([name] for name in names)):
    found = CliRunner().invoke(app, [*arguments, "--help"])
    assert found.exit_code == 0 and "--help" in found.output, arguments
assert CliRunner().invoke(app, ["--version"]).exit_code == 0
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
    assert said.startswith("2 ") and "Fix: pip install '.[models]' in your clone" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_without_what_it_is_made_of_is_one_line(missing):
    """As `pip install .` leaves it, which installs the kernels alone."""
    done = command(f"sys.modules[{missing!r}] = None")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and missing in done.stderr
    assert "pip install '.[models]'" in done.stderr and done.stderr.count("\n") == 1


def test_ctrl_c_before_the_command_began_is_no_traceback():
    press = """
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Press())
"""
    done = command(press)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_bug_in_the_commands_own_imports_keeps_its_traceback():
    done = command("sys.modules['fastgoal_models.cli'] = None")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_the_installed_command_is_that_one():
    (found,) = entry_points(group="console_scripts", name="fastgoal")
    assert found.value == "fastgoal_models.__main__:main"


def test_every_public_name_is_found():
    for name in fastgoal_models.__all__:
        assert getattr(fastgoal_models, name) is not None
    assert (
        set(fastgoal_models._HOME_OF) == set(fastgoal_models.__all__) <= set(dir(fastgoal_models))
    )
    with pytest.raises(AttributeError, match="has no attribute 'FastGoalModle'"):
        _ = fastgoal_models.FastGoalModle  # type: ignore[attr-defined]

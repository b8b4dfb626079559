"""Who needs matplotlib, what is said without it, and that nobody's notebook is changed by us.

Each test runs in a process of its own, since this one has imported everything.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWING = {
    "caft.picture_command", "caft.pictures", "demo.pictures", "demo.run", "drawing", "fonts",
    "map_pictures", "maps_command", "sheets",
}  # fmt: skip


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    environment.pop("MPLBACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_what_draws_imports_matplotlib():
    """Every module of the package, and with them what every command runs."""
    code = """
import importlib, pkgutil, sys
import fastgoal_models
sys.modules["matplotlib"] = None
for module in pkgutil.walk_packages(fastgoal_models.__path__, "fastgoal_models."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "matplotlib":
            raise
        print(module.name.removeprefix("fastgoal_models."))
"""
    assert set(python(code).split()) == DRAWING


def test_without_matplotlib_a_command_that_draws_says_how_to_install_it(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    code = f"""
import sys
from typer.testing import CliRunner
from fastgoal_models.cli import app
sys.modules["matplotlib"] = None
for arguments in (
    ["hierarchy", "cat.jpg", "A cat.", "--checkpoint", "run"],
    ["maps", "--model", "run", "--data", {str(tmp_path / "pairs.jsonl")!r}, "--out", "maps"],
    ["search", "A cat.", {str(tmp_path)!r}, "--model", "run", "--out", "sheet.png"],
    ["demo"],
):
    found = CliRunner().invoke(app, arguments)
    print(found.exit_code, found.output.strip())
"""
    said = python(code).splitlines()
    assert len(said) == 4
    for line in said:
        assert line.startswith("2 error: ") and "matplotlib" in line and "Fix: pip install" in line
    assert all("'.[models]'" in line for line in said[:3])


def test_drawing_leaves_the_backend_of_a_notebook():
    code = f"""
import importlib, sys
import matplotlib
matplotlib.use("svg")
for name in {sorted(DRAWING)}:
    importlib.import_module(f"fastgoal_models.{{name}}")
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    assert python(code).split() == ["svg", "False"]

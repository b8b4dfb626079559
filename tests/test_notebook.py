"""The notebook runs from top to bottom, and shows what it says it shows."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "photographs.ipynb"


@pytest.fixture
def backend():
    """What a notebook draws with: not what a file is drawn with by default, and no window."""
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    yield "svg"
    matplotlib.use(before)


@pytest.mark.slow
def test_every_cell_runs(monkeypatch, tmp_path, capsys, backend):
    import tempfile

    from matplotlib import pyplot as plt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "committed without outputs: clear them"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert matplotlib.get_backend() == backend, "the package has switched the notebook's"
    assert len(plt.get_fignums()) == 4
    plt.close("all")
    said = capsys.readouterr().out
    assert "19 records read, none skipped" in said and "after: R@5" in said
    assert sum(names["right"]) == 1, "of so few photographs the right one is among the first eight"
    losses = names["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

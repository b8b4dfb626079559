"""A picture with several captions: evaluation reads all of them, training and pairs the first."""

import json

import pytest
from typer.testing import CliRunner

from fastgoal_models import read_glit
from fastgoal_models.cli import app
from fastgoal_models.evaluation import caption_set
from fastgoal_models.sets import read_set
from fastgoal_models.unpack.samples import caption_fields
from tests.models.small_models import CONFIG, coloured_records

TEXTS = {"red": ["Red.", "All red.", "A red one."], "green": ["Green."], "blue": ["Blue.", "Sky."]}


@pytest.fixture
def folder(tmp_path):
    coloured_records(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write(folder, name, with_caption):
    """Rows as `unpack` writes them, or with nothing but `captions`."""
    rows = []
    for colour, texts in TEXTS.items():
        fields = caption_fields({"c": texts}, ["c"], "x") if with_caption else {"captions": texts}
        rows.append({"id": colour, "image": f"{colour}.png"} | fields)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fastgoal(folder, *words):
    words = [*words, "--model", folder / "model.json", "--device", "cpu"]
    done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("with_caption", [True, False])
def test_data_is_evaluated_as_the_set_of_the_same_file(folder, with_caption):
    path = write(folder, "captions.jsonl", with_caption)
    ours, theirs = caption_set(read_glit(path)[0], "x"), read_set("jsonl", path)
    assert ours.images == theirs.images and ours.num_captions == 6
    found = []
    for source in (["--data", path], ["--set", "jsonl", "--root", folder]):
        said = fastgoal(folder, "eval", *source, "--json", folder / "e.json")
        assert "3 images, 6 captions" in said
        found.append(json.loads((folder / "e.json").read_text())["models"])
    assert found[0] == found[1]


@pytest.mark.parametrize("with_caption", [True, False])
def test_pairs_are_of_the_first_and_the_others_stay(folder, with_caption):
    path, out = write(folder, "captions.jsonl", with_caption), folder / "pairs.jsonl"
    assert "3 records read, none skipped" in fastgoal(
        folder, "prepare", "--data", path, "--out", out
    )
    records, _ = read_glit(out)
    assert [record.caption for record in records] == [texts[0] for texts in TEXTS.values()]
    assert all(record.pairs for record in records)
    assert caption_set(records, "x").images == read_set("jsonl", path).images
    said = fastgoal(
        folder, "train", "fast-goal", "--data", out, "--out", folder / "run", "--steps", 1,
        "--batch-size", 2, "--context-length", 24, "--eval-data", path, "--eval-every", 1,
    )  # fmt: skip
    assert "--eval-data: 3 records read, none skipped" in said

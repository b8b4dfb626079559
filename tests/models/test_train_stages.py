"""A run that starts from what another one left, and weights given to a model not their own."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer.testing

from fastgoal_models import write_glit
from fastgoal_models.checkpoints import latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import ConfigError
from fastgoal_models.loading import load_fast_goal, load_model
from tests.models.small_models import CONFIG, coloured_records

QUICK = CONFIG | {"quick_gelu": True}


def fastgoal(*words: object):
    found = typer.testing.CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "400"})
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def train(folder: Path, out: str, *words: object, lr: float = 1e-3):
    return fastgoal(
        "train", "fast-goal", "--data", folder / "data.jsonl", "--out", folder / out, "--steps", 2,
        "--batch-size", 2, "--device", "cpu", "--lr", lr, *words,
    )  # fmt: skip


def newest(out: Path):
    return load_checkpoint(latest_checkpoint(out / "checkpoints"))


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    """A folder with data and a run of a QuickGELU model in `one`."""
    folder = tmp_path_factory.mktemp("stages")
    write_glit(coloured_records(folder), folder / "data.jsonl")
    (folder / "quick.json").write_text(json.dumps(QUICK))
    (folder / "plain.json").write_text(json.dumps(CONFIG))
    code, said = train(folder, "one", "--model", folder / "quick.json", "--context-length", 24)
    assert code == 0, said
    return folder


@pytest.fixture
def folder(first_stage, tmp_path) -> Path:
    return Path(shutil.copytree(first_stage, tmp_path / "copy"))


def test_a_second_stage_starts_from_the_first_ones_weights(folder):
    one = newest(folder / "one")
    code, said = train(folder, "two", "--model", folder / "one", lr=0)
    assert code == 0, said
    assert f"{folder / 'one'}, step 2" in said and "random weights" not in said
    two = newest(folder / "two")
    assert all(torch.equal(two.weights[name], tensor) for name, tensor in one.weights.items())
    assert two.config["architecture"] == one.config["architecture"] == QUICK
    assert two.config["context_length"] == 24
    assert two.config["model"] == one.config["model"]
    assert two.config["initial_weights"] != one.config.get("initial_weights")
    code, said = train(folder, "three", "--model", two.path)
    assert code == 0, said
    three = newest(folder / "three")
    assert three.config["architecture"] == QUICK


def test_both_ways_to_start_are_the_same(folder):
    weights = newest(folder / "one").path / "model.safetensors"
    assert train(folder, "a", "--model", folder / "one")[0] == 0
    code, said = train(
        folder, "b", "--model", folder / "quick.json", "--pretrained", weights,
        "--context-length", 24,
    )  # fmt: skip
    assert code == 0, said
    a, b = newest(folder / "a").weights, newest(folder / "b").weights
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_stage_resumes_from_the_same_weights_alone(folder):
    stage = ["--model", folder / "one", "--save-every", 1]
    assert train(folder, "two", *stage)[0] == 0
    whole = newest(folder / "two").weights
    shutil.rmtree(newest(folder / "two").path)
    moved = folder / "moved"
    (folder / "one").rename(moved)
    stage[1] = moved
    code, said = train(folder, "two", *stage, "--resume")
    assert code == 0, said
    again = newest(folder / "two").weights
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    # The first stage goes on, and the second one is no longer what it was.
    code, said = fastgoal(
        "train", "fast-goal", "--data", folder / "data.jsonl", "--out", folder / "other", "--steps",
        1, "--batch-size", 2, "--device", "cpu", "--lr", 1e-2, "--model", moved,
    )  # fmt: skip
    assert code == 0, said
    code, said = train(folder, "two", "--model", folder / "other", "--resume")
    assert code == 2 and "initial_weights was" in said, said


def test_lora_starts_from_a_run_too(folder):
    pytest.importorskip("peft")
    code, said = train(folder, "two", "--model", folder / "one", "--lora", 2)
    assert code == 0, said
    code, said = train(folder, "three", "--model", folder / "two")
    assert code == 0, said
    assert load_model(str(folder / "three")).notes["architecture"] == QUICK


def test_what_does_not_go_with_a_run(folder):
    run = folder / "one"
    code, said = train(folder, "two", "--model", run, "--pretrained", "openai")
    assert code == 2 and "leave --pretrained out" in said
    code, said = train(folder, "two", "--model", run, "--context-length", 30)
    assert code == 2 and "Fix: --context-length 24" in said
    assert train(folder, "two", "--model", run, "--context-length", 24)[0] == 0
    code, said = train(folder, "two", "--model", folder)
    assert code == 2 and "holds no checkpoint" in said


def test_what_a_preset_or_a_file_says_of_another_models_weights_does_not_count(folder):
    code, said = train(folder, "two", "--preset", "fast-goal-b16", "--model", folder / "one")
    assert code == 0, said
    (folder / "other.yaml").write_text("pretrained: openai\ncontext_length: 248\n")
    code, said = train(
        folder, "three", "--config", folder / "other.yaml", "--model", folder / "one"
    )
    assert code == 0, said
    assert "context_length: 24" in (folder / "three/config.yaml").read_text()
    again = fastgoal(
        "train", "fast-goal", "--config", folder / "three/config.yaml", "--out", folder / "four"
    )
    assert again[0] == 0, again[1]
    three, four = newest(folder / "three"), newest(folder / "four")
    assert all(torch.equal(three.weights[name], four.weights[name]) for name in three.weights)


@pytest.mark.parametrize("command", ["train", "eval", "prepare"])
def test_a_runs_weights_in_another_model_are_refused(folder, command):
    checkpoint = newest(folder / "one").path
    chosen = ["--model", folder / "plain.json", "--pretrained", checkpoint / "model.safetensors"]
    data = ["--data", folder / "data.jsonl"]
    if command == "train":
        code, said = train(folder, "two", *chosen, "--context-length", 24)
    elif command == "eval":
        code, said = fastgoal("eval", *data, *chosen, "--device", "cpu")
    else:
        out = ["--out", folder / "pairs.jsonl"]
        code, said = fastgoal("prepare", *data, *out, *chosen, "--device", "cpu")
    assert code == 2, said
    assert f"quick_gelu is True there and False in {folder / 'plain.json'}" in said
    assert f"Fix: --model {checkpoint} without --pretrained" in said


def test_only_what_makes_a_difference_is_refused(folder):
    weights = newest(folder / "one").path / "model.safetensors"

    def load(**changes):
        path = folder / "changed.json"
        path.write_text(json.dumps(QUICK | changes))
        return load_fast_goal(str(path), str(weights))

    text = CONFIG["text_cfg"]
    assert load().model.context_length == 24
    # Said as it is by default; and text positions, which the weights have a number of themselves.
    assert load(custom_text=False, text_cfg=text | {"mlp_ratio": 4.0})
    assert load(text_cfg=text | {"context_length": 22})
    with pytest.raises(ConfigError, match=r"text_cfg.heads is 2 there and 4 in"):
        load(text_cfg=text | {"heads": 4})


def test_weights_without_a_note_are_taken_as_they_are(folder):
    checkpoint = newest(folder / "one").path
    plain = str(folder / "plain.json")
    alone = shutil.copy(checkpoint / "model.safetensors", folder / "alone.safetensors")
    assert load_fast_goal(plain, str(alone))
    manifest = checkpoint / "checkpoint.json"
    content = json.loads(manifest.read_text())
    del content["config"]["architecture"]  # as older versions wrote it
    for text in (json.dumps(content), "{", "[]"):
        manifest.write_text(text)
        assert load_fast_goal(plain, str(checkpoint / "model.safetensors"))

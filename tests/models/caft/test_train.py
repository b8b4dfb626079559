"""Training CAFT: exact resume, recipes, scales in bounds, and the commands from end to end."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from fastgoal_models.caft import Caft, CaftConfig
from fastgoal_models.caft.train_command import METHOD
from fastgoal_models.caft.training import RECIPES, TERMS, CaftTrainConfig
from fastgoal_models.checkpoints import Checkpoint, latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.cli.train_caft import CaftPreset
from fastgoal_models.errors import ConfigError
from fastgoal_models.evaluation import caption_set, evaluate_set
from fastgoal_models.glit import read_glit
from fastgoal_models.loading import load_model
from fastgoal_models.synthetic import SyntheticCaft, draw, scene
from fastgoal_models.training import best_checkpoint, read_evaluations, read_log, train

TINY = {
    "embed_dim": 32, "pool_heads": 2,
    "vision_cfg": {"image_size": 32, "width": 32, "heads": 2, "layers": [1, 1, 1, 1],
                   "tokens": [4, 3, 2]},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
                 "parts": 4, "whole_layers": 1, "adapter_width": 16},
}  # fmt: skip


def make_model() -> Caft:
    torch.manual_seed(0)
    return Caft.create(TINY, superpixels="slic")


def make_config(out: Path, **changes) -> CaftTrainConfig:
    return CaftTrainConfig(
        **{"out": out, "steps": 4, "batch_size": 4, "save_every": 2, "keep": None} | changes
    )


@pytest.mark.parametrize("negatives", ["all", "sample"])
def test_resumed_is_undisturbed_bit_for_bit(tmp_path, negatives):
    """Dropout, sampled negatives and the parts of each epoch's captions included."""
    dataset = SyntheticCaft(8, 32, make_model().tokenizer)
    train(make_model(), dataset, make_config(tmp_path / "a", negatives=negatives), device="cpu")
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000002"
    torch.manual_seed(99)
    config = make_config(tmp_path / "b", negatives=negatives)
    train(make_model(), dataset, config, device="cpu", resume=checkpoint)
    one, two = (load_checkpoint(tmp_path / run / "checkpoints" / "step-00000004") for run in "ab")
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    logs = [[(record.step, record.losses) for record in read_log(tmp_path / run)] for run in "ab"]
    assert logs[1] == logs[0][2:] and set(logs[0][0][1]) == {"loss", *TERMS}


def test_terms_can_be_left_out_and_scales_stay_in_bounds(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.logit_scale_coarse.fill_(4.0)
    dataset = SyntheticCaft(8, 32, model.tokenizer)
    config = make_config(tmp_path, steps=2, terms=("whole_loss",), learning_rate=0.5, warmup=0.0)
    train(model, dataset, config, device="cpu")
    assert set(read_log(tmp_path)[0].losses) == {"loss", "whole_loss"}
    assert 0 <= model.logit_scale_coarse.item() <= 4
    assert 0 <= model.logit_scale.item() <= math.log(100) + 1e-6


def test_published_recipes():
    found = {name: CaftTrainConfig.published(Path("run"), name) for name in RECIPES}
    for config in found.values():
        assert (config.betas, config.warmup, config.epochs) == ((0.9, 0.98), 2000, 32)
        assert (config.precision, config.negatives, config.batch_size) == ("fp16", "sample", 2048)
    table = {
        name: (c.learning_rate, c.weight_decay, c.eps, c.clip_norm) for name, c in found.items()
    }
    assert table == {
        "caft-b-3m": (5e-4, 0.5, 1e-8, None),
        "caft-b-12m": (5e-4, 0.5, 1e-8, 1.0),
        "caft-b-15m": (1.67e-4, 0.5, 1e-6, 1.0),
        "caft-b-30m": (5e-4, 0.2, 1e-6, None),
    }
    with pytest.raises(ConfigError, match=r"recipe must be one of .*got '5m'"):
        CaftTrainConfig.published(Path("run"), "5m")
    with pytest.raises(ConfigError, match="negatives must be"):
        make_config(Path("run"), negatives="hard")
    with pytest.raises(ConfigError, match="terms must be some of"):
        make_config(Path("run"), terms=("part_loss",))


def test_from_a_folder_to_a_checkpoint_and_a_picture(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CaftConfig.load(TINY).as_json()))
    rows = []
    for number in range(6):
        draw(scene(number), 64).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "longSV_captions": scene(number).caption})
    rows.append({"image": "gone.png", "caption": "A cat."})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        "train", "caft", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run",
        "--model", tmp_path / "tiny.json", "--steps", 3, "--batch-size", 3, "--save-every", 2,
        "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert "6 records read, 1 skipped" in done.output and "image can not be used" in done.output
    again = CliRunner().invoke(app, [str(word) for word in [*command, "--resume"]])
    assert again.exit_code == 0, again.output
    picture = tmp_path / "seen.png"
    command = [
        "hierarchy", tmp_path / "0.png", scene(0).caption, "--out", picture, "--checkpoint",
        tmp_path / "run" / "checkpoints" / "step-00000003",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    with Image.open(picture) as drawn:
        assert drawn.width > 800
    command[-1] = tmp_path / "nowhere.pt"
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 2 and "there is no file" in done.output


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six pictures with captions, and a tiny configuration."""
    (tmp_path / "tiny.json").write_text(json.dumps(CaftConfig.load(TINY).as_json()))
    rows = []
    for number in range(6):
        draw(scene(number), 64).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": scene(number).caption})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def train_caft(folder: Path, *words: object) -> tuple[int, str]:
    command = ["train", "caft", "--device", "cpu", "--steps", 2, *words]
    found = CliRunner().invoke(app, [str(word) for word in command], env={"COLUMNS": "300"})
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def newest(out: Path) -> Checkpoint:
    found = latest_checkpoint(out / "checkpoints")
    assert found is not None
    return load_checkpoint(found)


def test_the_options_of_a_run_repeat_it(folder):
    data = ["--data", folder / "data.jsonl", "--model", folder / "tiny.json"]
    out = folder / "run"
    code, said = train_caft(folder, *data, "--out", out, "--lr", 1e-3, "--save-every", 1)
    assert code == 0 and "6 records do not fill a batch of 32: it is 6" in said, said
    assert "cpu, float32" in said
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["batch_size"], saved["learning_rate"], saved["terms"]) == (6, 1e-3, list(TERMS))
    code, said = train_caft(folder, "--config", out / "config.yaml", "--out", folder / "again")
    assert code == 0, said
    one, two = newest(out).weights, newest(folder / "again").weights
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert train_caft(folder, "--config", out / "config.yaml", "--resume")[0] == 0
    # A run is where another one starts.
    code, said = train_caft(
        folder, *data, "--out", folder / "next", "--checkpoint", out, "--lr", 0, "--batch-size", 2
    )
    assert code == 0 and f"from {out}, step 2" in said, said
    next_one = newest(folder / "next").weights
    moved = [name for name in one if not torch.equal(one[name], next_one[name])]
    assert all("running_" in name or "num_batches" in name for name in moved)  # of BatchNorms

    for words, complaint in (
        ([*data, "--out", folder / "new", "--batch-size", 7], "do not fill one batch of 7"),
        (["--out", folder / "new"], "--data missing"),
        (["--data", folder / "no.jsonl", "--out", folder / "new"], "--data: there is no file"),
        ([*data, "--out", folder / "new", "--checkpoint", folder], "--checkpoint: "),
        ([*data, "--out", folder / "new", "--keep-best"], "Fix: --eval-data FILE"),
    ):
        code, said = train_caft(folder, *words)
        assert code == 2 and complaint in said, said
    assert not (folder / "new").exists()


def test_presets_by_name():
    given = {"data": Path("data.jsonl"), "out": Path("run")}
    for name in RECIPES:
        options, config = METHOD.resolve(given | {"preset": name})
        assert config == CaftTrainConfig.published(Path("run"), name) and options.fit_batch
        assert options.model == "caft-b"
    assert {preset.value for preset in CaftPreset} == {"default", *RECIPES}
    # They name the model, too; another one is asked for by name.
    options, _ = METHOD.resolve(given | {"preset": "caft-b-3m", "model": "caft-s"})
    assert options.model == "caft-s"
    assert METHOD.resolve(given)[1] == CaftTrainConfig(out=Path("run"), epochs=10)
    _, config = METHOD.resolve(given | {"preset": "caft-b-15m", "steps": 5, "lr": 1.0})
    assert config == CaftTrainConfig.published(
        Path("run"), "caft-b-15m", steps=5, learning_rate=1.0
    )


def test_it_is_evaluated_as_it_trains(folder):
    data = ["--data", folder / "data.jsonl", "--model", folder / "tiny.json", "--ema", 0.5]
    data += ["--batch-size", 3, "--lr", 1e-2]
    code, said = train_caft(
        folder, *data, "--out", folder / "seen", "--eval-data", folder / "data.jsonl",
        "--eval-every", 1, "--keep-best",
    )  # fmt: skip
    assert code == 0 and "evaluation of the moving average at step 1/2" in said, said
    records = read_evaluations(folder / "seen")
    assert [record.step for record in records] == [1, 2] and all(x.averaged for x in records)
    assert best_checkpoint(folder / "seen") is not None
    # It is what `fastgoal eval` finds of the run, and changes nothing else.
    loaded = load_model(str(folder / "seen")).model
    captioned = caption_set(read_glit(folder / "data.jsonl")[0], "data")
    recalls = evaluate_set(loaded, captioned).retrieval
    assert records[-1].values["text_to_image_r1"] == recalls.text_to_image[1]
    assert train_caft(folder, *data, "--out", folder / "blind")[0] == 0
    seen, blind = newest(folder / "seen").weights, newest(folder / "blind").weights
    assert all(torch.equal(seen[name], blind[name]) for name in seen)


@pytest.mark.slow
def test_compiled_towers_train_alike_and_keep_their_names(tmp_path):
    """Dynamo traces both towers as they train, beside a moving average, which copies the model."""
    plain, compiled = make_model(), make_model()
    compiled.visual.compile(backend="eager")
    compiled.transformer.compile(backend="eager")
    dataset = SyntheticCaft(8, 32, plain.tokenizer)
    for out, model in (("a", plain), ("b", compiled)):
        config = make_config(tmp_path / out, steps=2, ema=0.9)
        train(model, dataset, config, device="cpu")
    one, two = (load_checkpoint(tmp_path / run / "checkpoints" / "step-00000002") for run in "ab")
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        torch.testing.assert_close(two.weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert one.state["ema"].keys() == two.state["ema"].keys()

"""A model from what a person types."""

import json

import open_clip
import pytest
import torch

from fastgoal_models import FastGoalDataset, match_pairs
from fastgoal_models.caft import Caft
from fastgoal_models.checkpoints import latest_checkpoint, load_checkpoint
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.loading import architecture, load_fast_goal, load_model
from fastgoal_models.training import train
from tests.models.small_models import CONFIG, coloured_records, small_clip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_random_and_given_weights(config, tmp_path):
    assert load_model(config).random
    weights = tmp_path / "weights.pt"
    torch.save(small_clip().clip.state_dict(), weights)
    loaded = load_fast_goal(config, str(weights))
    assert not loaded.random and loaded.name == f"{config}, {weights}"
    positions = loaded.model.clip.positional_embedding
    assert torch.equal(positions, small_clip().clip.positional_embedding)


def test_long_clips_second_table_of_positions_is_the_one_that_counts(config, tmp_path):
    state = small_clip().clip.state_dict()
    first = torch.randn(36, 16)
    second = torch.randn(36, 16)
    state |= {"positional_embedding": first, "positional_embedding_res": second}
    state.pop("attn_mask", None)
    torch.save(state, tmp_path / "long.pt")
    loaded = load_fast_goal(config, str(tmp_path / "long.pt"))
    assert loaded.model.context_length == 36
    positions = loaded.model.clip.positional_embedding
    assert torch.equal(positions, torch.cat([first[:20], second[20:]]))


def test_a_runs_folder(config, tmp_path):
    from typer.testing import CliRunner

    from fastgoal_models import write_glit
    from fastgoal_models.cli import app

    write_glit(coloured_records(tmp_path), tmp_path / "data.jsonl")
    command = [
        "train", "fast-goal", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run",
        "--model", config, "--context-length", 24, "--steps", 1, "--batch-size", 2,
        "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001"):
        loaded = load_model(str(folder))
        assert loaded.name == f"{folder}, step 1" and not loaded.random
        assert loaded.notes["context_length"] == loaded.model.tokenizer.context_length == 24
    with pytest.raises(ConfigError, match="weights of its own"):
        load_model(str(tmp_path / "run"), "openai")


def test_a_run_that_kept_an_average_is_judged_by_it(config, tmp_path):
    records = match_pairs(small_clip(), coloured_records(tmp_path), progress=False)
    model = small_clip()
    dataset = FastGoalDataset(records, model.tokenizer, 32, 24)
    options = FastGoalTrainConfig(
        tmp_path / "run", steps=2, batch_size=2, learning_rate=0.1, ema=0.5
    )
    identity = {"model": config, "architecture": CONFIG, "context_length": 24}
    train(model, dataset, options, device="cpu", identity=identity)
    loaded = load_model(str(tmp_path / "run"))
    assert loaded.name.endswith("step 2, averaged")
    average = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).state["ema"]
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, average[f"module.{name}"]), name
    assert not torch.equal(loaded.model.clip.ln_final.weight, model.clip.ln_final.weight)


def test_names_and_files_that_lead_nowhere(config, tmp_path):
    for pretrained in (None, "openai"):
        with pytest.raises(ConfigError, match=r"no model 'nothing', nor .* nor a folder of a run"):
            load_model("nothing", pretrained)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load_model(str(tmp_path))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_model(str(tmp_path / "bad.json"))
    for content in ("{}", "[]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match="needs vision_cfg and text_cfg"):
            load_model(str(tmp_path / "bad.json"))
    assert isinstance(load_model("caft-xs").model, Caft)
    with pytest.raises(ConfigError, match="is a CAFT"):
        load_fast_goal("caft-xs")


@pytest.mark.parametrize(
    "name, tag, why",
    [
        ("ViT-B-16-SigLIP", "webli", r"timm's.* \(vit_base.* tokenizer .* \(timm/ViT-B-16-SigLIP"),
        ("ViT-L-14-CLIPA", "datacomp1b", r"a tokenizer of its own.* \(bert-base-uncased\)"),
        ("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k", "a text tower of Hugging Face's"),
        ("MobileCLIP-B", "datacompdr", "an image tower of timm's"),
    ],
)
def test_families_that_can_not_be_read_are_refused_before_a_download(monkeypatch, name, tag, why):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("downloads"))
    for pretrained in (tag, None):
        with pytest.raises(ConfigError, match=f"{name} has .*{why}.* Fix: .*ViT-B-16"):
            load_model(name, pretrained)


def test_a_tag_that_wants_quick_gelu_gets_it():
    assert architecture("ViT-B-32", "openai")["quick_gelu"]
    assert not architecture("ViT-B-32", "laion2b_s34b_b79k").get("quick_gelu")

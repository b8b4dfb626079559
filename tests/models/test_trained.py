"""What a run left: every command reads the same weights, its moving average where it kept one."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastgoal_models.caft import Caft, picture_command
from fastgoal_models.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import ConfigError
from fastgoal_models.hf_checkpoints import open_clip_from_hf
from fastgoal_models.loading import load_fast_goal, load_model
from fastgoal_models.trained import is_trained, load_trained, notes_on
from tests.models.caft.test_train import TINY as CAFT
from tests.models.small_models import CONFIG, small_clip

QUICK = CONFIG | {"quick_gelu": True}
GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def fastgoal(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "400"})
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def save_run(out: Path, module: torch.nn.Module, average: bool, **notes: object) -> Path:
    """A run of which this model, or with `average` another one, is what is evaluated."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights = state
    if average:
        weights = {name: x + 1 if x.is_floating_point() else x for name, x in state.items()}
    kept = {"n_averaged": torch.tensor(3)} | {f"module.{name}": x for name, x in state.items()}
    return save_checkpoint(out / "checkpoints", 7, weights, {"ema": kept} if average else {}, notes)


def save_clip_run(out: Path, seed: int = 0, average: bool = False, **changes: object) -> Path:
    notes = {"model": "tiny", "architecture": CONFIG | changes, "context_length": 24}
    return save_run(out, small_clip(seed), average, **notes)


@pytest.mark.parametrize("of", ["run", "checkpoints", "checkpoint"])
@pytest.mark.parametrize("average", [True, False])
def test_every_command_takes_what_would_be_evaluated(tmp_path, of, average):
    checkpoint = save_clip_run(tmp_path / "run", average=average)
    folder = {"run": tmp_path / "run", "checkpoints": checkpoint.parent, "checkpoint": checkpoint}
    source, judged = folder[of], small_clip().clip.state_dict()

    loaded = load_fast_goal(str(source))
    assert loaded.name == f"{source}, step 7" + ", averaged" * average
    code, said = fastgoal("convert", source, tmp_path / "hf.safetensors", "--to", "hf")
    assert code == 0 and (f"{source}, step 7, averaged" in said) == average, said
    mixed = tmp_path / "mixed.safetensors"
    code, said = fastgoal("interpolate", source, source, mixed, "--alpha", 1)
    assert code == 0 and (said.count(f"{source}, step 7, averaged") == 2) == average, said
    for found in (
        loaded.model.clip.state_dict(),
        open_clip_from_hf(load_file(tmp_path / "hf.safetensors")),
        load_file(mixed),
    ):
        assert all(torch.equal(found[name], judged[name]) for name in found)


@pytest.mark.parametrize("average", [True, False])
def test_hierarchy_draws_what_would_be_evaluated(tmp_path, monkeypatch, average):
    torch.manual_seed(0)
    caft = Caft.create(CAFT, superpixels="slic")
    notes = {"model": CAFT, "superpixels": "slic", "published": False}
    save_run(tmp_path / "run", caft, average, **notes)
    drawn = []
    maps = picture_command.caft_maps
    monkeypatch.setattr(
        picture_command, "caft_maps", lambda model, *rest: drawn.append(model) or maps(model, *rest)
    )
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "teal.png")
    picture = ["hierarchy", tmp_path / "teal.png", "All is teal.", "--out", tmp_path / "seen.png"]
    code, said = fastgoal(*picture, "--checkpoint", tmp_path / "run")
    assert code == 0 and ("averaged" in said) == average, said
    wanted = caft.state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in drawn[0].state_dict().items())

    save_clip_run(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    for folder, words in (("clip", "of no `fastgoal train caft`"), ("empty", "no checkpoint")):
        code, said = fastgoal(*picture, "--checkpoint", tmp_path / folder)
        assert code == 2 and words in said and "elete" not in said, said


def test_a_folder_without_a_manifest_is_no_damaged_checkpoint(tmp_path):
    (tmp_path / "other").mkdir()
    save_file(small_clip().clip.state_dict(), tmp_path / "other" / "model.safetensors")
    assert not is_trained(tmp_path / "other")
    for read in (load_model, lambda name: load_trained(Path(name))):
        with pytest.raises(ConfigError, match=r"no checkpoint.json beside it. Fix: name that file"):
            read(str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no checkpoint.json$"):
        load_checkpoint(tmp_path / "other")
    # Its weights are those of a file, to what takes files.
    assert fastgoal("convert", tmp_path / "other", tmp_path / "a.safetensors", "--to", "hf")[0] == 0


# -- which model a file is of ---------------------------------------------------------------------


def test_mixed_weights_know_their_model(tmp_path):
    model = tmp_path / "half.json"
    model.write_text(json.dumps(CONFIG))
    notes = {"model": str(model), "architecture": CONFIG | {"preprocess_cfg": GREY}}
    for seed in (0, 1):
        save_run(tmp_path / str(seed), small_clip(seed), False, **notes, context_length=24)
    mixed = tmp_path / "mixed.safetensors"
    code, said = fastgoal("interpolate", tmp_path / "0", tmp_path / "1", mixed)
    assert code == 0 and f"--model {model} --pretrained {mixed}" in said, said
    loaded = load_fast_goal(str(model), str(mixed))
    assert loaded.model.normalisation == ((0.5,) * 3, (0.25,) * 3)
    again = tmp_path / "again.safetensors"
    code, said = fastgoal("interpolate", mixed, tmp_path / "1", again)
    assert code == 0 and notes_on(again) == notes_on(mixed)

    quick = tmp_path / "quick.json"
    quick.write_text(json.dumps(QUICK))
    with pytest.raises(ConfigError, match=rf"quick_gelu is False there.* Fix: --model {model}$"):
        load_model(str(quick), str(mixed))
    save_clip_run(tmp_path / "quick", **QUICK)
    save_clip_run(tmp_path / "plain")
    for other, words in (("quick", "quick_gelu is False"), ("plain", "preprocess_cfg is {")):
        out = tmp_path / f"{other}.safetensors"
        code, said = fastgoal("interpolate", tmp_path / "0", tmp_path / other, out)
        assert code == 2 and "is of another model" in said and words in said and not out.exists(), (
            said
        )


def test_the_name_that_is_told_is_one_that_loads(tmp_path, monkeypatch):
    """A run of `ViT --pretrained openai` is of a ViT-quickgelu."""
    import open_clip

    for name, config in (("tiny", CONFIG), ("tiny-quickgelu", QUICK)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    for name, config in (("plain", CONFIG), ("quick", QUICK)):
        save_clip_run(tmp_path / name, **config)
        mixed = tmp_path / f"{name}.safetensors"
        code, said = fastgoal("interpolate", tmp_path / name, tmp_path / name, mixed)
        told = {"plain": "tiny", "quick": "tiny-quickgelu"}[name]
        assert code == 0 and f"--model {told} --pretrained" in said, said


def test_mixed_cafts_keep_their_superpixels(tmp_path):
    (tmp_path / "caft.json").write_text(json.dumps(CAFT))
    notes = {"model": CAFT, "superpixels": "slic", "published": False}
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_run(tmp_path / str(seed), Caft.create(CAFT, superpixels="slic"), False, **notes)
    mixed = tmp_path / "mixed.safetensors"
    code, said = fastgoal("interpolate", tmp_path / "0", tmp_path / "1", mixed)
    assert code == 0, said
    assert isinstance(load_model(str(tmp_path / "caft.json"), str(mixed)).model, Caft)


def test_a_second_stages_activation_is_converted(tmp_path):
    """Its run notes the first one's name, without the tag that made it a QuickGELU."""
    save_run(
        tmp_path / "run", small_clip(), False,
        model="ViT-B-16", pretrained=None, architecture=QUICK, context_length=24,
    )  # fmt: skip
    code, said = fastgoal("convert", tmp_path / "run", tmp_path / "hf", "--to", "hf")
    assert code == 0 and "activation  quick_gelu" in said, said
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["text_config"]["hidden_act"] == "quick_gelu"


def test_a_file_of_somebody_elses_has_no_notes(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("a.safetensors", "broken.safetensors", "nowhere.pt"):
        assert notes_on(tmp_path / name) == {}

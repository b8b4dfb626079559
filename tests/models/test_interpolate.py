"""WiSE-FT: weights between two models, and what is refused."""

import json
import re

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastgoal_models import FastGoalModel
from fastgoal_models.checkpoints import save_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import ConfigError
from fastgoal_models.interpolate import interpolate
from fastgoal_models.loading import load_model
from fastgoal_models.positional import stretch_positional_embedding

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16
    },
    "text_cfg": {"context_length": 24, "width": 8, "heads": 2, "layers": 1},
}  # fmt: skip


def run(*arguments: object):
    found = CliRunner().invoke(app, ["interpolate", *map(str, arguments)], env={"COLUMNS": "300"})
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def said(found) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", found.output)


def make_model(seed: int, context_length: int = 24) -> FastGoalModel:
    torch.manual_seed(seed)
    return FastGoalModel.create(CLIP, context_length=context_length)


def checkpoint(folder, step: int, seed: int, context_length: int = 24):
    model = make_model(seed, context_length)
    noted = {"model": "tiny", "architecture": CLIP, "context_length": context_length}
    save_checkpoint(folder / "checkpoints", step, model.state_dict(), {}, noted)
    return model


def test_between():
    old = {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor(3)}
    new = {"w": torch.tensor([3.0, 2.0]), "n": torch.tensor(5)}
    found = interpolate(old, new, 0.25)
    assert found["w"].tolist() == [1.5, -1.0] and found["n"].item() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_ends_are_the_models_to_the_bit(dtype):
    old, new = ({"w": torch.randn(999).mul(10).to(dtype)} for _ in range(2))
    assert torch.equal(interpolate(old, new, 0)["w"], old["w"])
    assert torch.equal(interpolate(old, new, 1)["w"], new["w"])
    exact = 0.3 * new["w"].double() + 0.7 * old["w"].double()
    found = interpolate(old, new, 0.3)["w"]
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_half_precision_is_widened_first():
    """1 and 1 + 2^-7 are neighbours in bf16: the mean of the products would round twice."""
    old = {"w": torch.tensor([1.0, 3.0], dtype=torch.float32)}
    new = {"w": torch.tensor([1.0078125, 3.0], dtype=torch.bfloat16)}
    assert interpolate(old, new, 0.75)["w"].tolist() == [1.0078125, 3.0]


def test_two_runs(tmp_path):
    checkpoint(tmp_path / "old", 1, seed=7)
    before = checkpoint(tmp_path / "old", 2, seed=1)  # the newest counts
    after = checkpoint(tmp_path / "new", 3, seed=2)
    out = tmp_path / "deep" / "between.safetensors"
    found = run(tmp_path / "old", tmp_path / "new", out, "--alpha", 0.25)
    assert found.exit_code == 0, found.output
    assert "0.75" in said(found) and str(out) in said(found)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(CLIP))
    loaded = load_model(str(config), str(out)).model
    wanted, old, new = (dict(m.named_parameters()) for m in (loaded, before, after))
    for name, value in wanted.items():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * new[name])


def test_a_checkpoint_and_a_plain_file(tmp_path):
    """The file has open_clip's own names, and fewer text positions."""
    old = make_model(1)
    save_file(old.clip.state_dict(), tmp_path / "old.safetensors")
    new = checkpoint(tmp_path / "new", 3, seed=2, context_length=36)
    folder = tmp_path / "new/checkpoints/step-00000003"
    out = tmp_path / "between.safetensors"
    found = run(tmp_path / "old.safetensors", folder, out)
    assert found.exit_code == 0, found.output
    assert "stretched to 36 positions" in said(found)
    positions = stretch_positional_embedding(old.clip.positional_embedding.detach(), 36)
    torch.testing.assert_close(
        load_file(out)["positional_embedding"],
        (0.5 * positions + 0.5 * new.clip.positional_embedding).detach(),
    )
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(CLIP))
    load_model(str(config), str(out), context_length=36)


def test_a_model_by_its_name(tmp_path, monkeypatch):
    """As --model and --pretrained name it: a tag, here without the network, or a file."""
    name = "tiny-clip"
    old = make_model(1)
    real = FastGoalModel.create

    def create(model, pretrained=None, **options):
        assert (model, pretrained) == (name, "some-tag")
        made = real(CLIP, None, **options)
        made.load_state_dict(old.state_dict())
        return made

    monkeypatch.setattr(FastGoalModel, "create", create)
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda model: dict(CLIP) if model == name else None
    )
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {})
    monkeypatch.setattr(
        open_clip,
        "list_pretrained_tags_by_model",
        lambda model: ["some-tag", "other-tag"] if model == name else [],
    )
    monkeypatch.setattr(open_clip, "list_models", lambda: [name])
    with monkeypatch.context() as patched:
        patched.setattr(FastGoalModel, "create", real)
        new = checkpoint(tmp_path / "new", 3, seed=2, context_length=36)
    out = tmp_path / "between.safetensors"
    found = run(name, tmp_path / "new", out)
    assert found.exit_code == 2 and not out.exists()
    assert f"OLD: {name} is the name of a model" in said(found)
    assert "Fix: --old-pretrained TAG, one of some-tag, other-tag" in said(found)
    found = run(name, tmp_path / "new", out, "--old-pretrained", "some-tag")
    assert found.exit_code == 0, found.output
    assert f"0.5 · ({name}, some-tag)" in said(found) and f"--model {name}" in said(found)
    mixed = load_file(out)["visual.proj"]
    torch.testing.assert_close(mixed, (old.clip.visual.proj + new.clip.visual.proj).detach() / 2)
    save_file(old.clip.state_dict(), tmp_path / "old.safetensors")
    found = run(
        tmp_path / "old.safetensors", tmp_path / "new", out, "--old-pretrained", "some-tag",
        "--force",
    )  # fmt: skip
    assert found.exit_code == 2 and "Fix: leave it out" in said(found)


def test_differences_are_named():
    old = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1), "e": torch.zeros(1)}
    new = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1), "f": torch.zeros(1)}
    with pytest.raises(ConfigError) as refused:
        interpolate(old, new, 0.5)
    message = str(refused.value)
    assert "b has shape (3,) in the old one, (4,) in the new" in message
    assert "only the old one has c; only the new one has d; and 2 more" in message
    with pytest.raises(ConfigError, match=r"a is torch.float32 in the old one, torch.int64"):
        interpolate({"a": torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.long)}, 0.5)
    with pytest.raises(ConfigError, match="--alpha must be"):
        interpolate({}, {}, 1.5)


def test_refusals(tmp_path):
    checkpoint(tmp_path / "old", 1, seed=1)
    checkpoint(tmp_path / "new", 1, seed=2)
    out = tmp_path / "between.safetensors"
    both = tmp_path / "old", tmp_path / "new"
    for arguments, words in (
        ((tmp_path / "gone", both[1], out), f"OLD: there is no file {tmp_path / 'gone'}"),
        ((tmp_path, both[1], out), "no weights file"),
        ((*both, tmp_path / "between.pt"), "must be a .safetensors file"),
        ((*both, out, "--alpha", 2), "alpha"),
    ):
        found = run(*arguments)
        assert found.exit_code == 2 and words in said(found), found.output
        assert not out.exists()
    assert run(*both, out).exit_code == 0
    again = run(*both, out)
    assert again.exit_code == 2 and "--force" in said(again)
    assert run(*both, out, "--force").exit_code == 0

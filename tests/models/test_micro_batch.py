"""`--micro-batch`: the towers see a few records at a time, the loss all of them."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from fastgoal_models import FastGoalModel, write_glit
from fastgoal_models.caft.training import CaftTrainConfig
from fastgoal_models.checkpoints import latest_checkpoint, load_checkpoint
from fastgoal_models.cli import app
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.lora import LoraAdapters
from fastgoal_models.training import read_log, train
from tests.models.small_models import CONFIG, coloured_records
from tests.models.test_training import CLIP, CONTEXT, assert_same_bits, make_items

BATCH, STEPS = 6, 4
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def make_model(dtype: torch.dtype = torch.float32) -> FastGoalModel:
    torch.manual_seed(3)
    return FastGoalModel.create(CLIP, context_length=CONTEXT).to(dtype)


@dataclass(frozen=True)
class SeenConfig(FastGoalTrainConfig):
    """Notes how many records are encoded at once."""

    seen: tuple = ()

    def encode(self, model, batch):
        self.seen.append(len(batch.images))
        return super().encode(model, batch)


def make_config(out, **changes) -> SeenConfig:
    return SeenConfig(
        **{"out": out, "steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3} | changes
    )


def run(out, *, dtype=torch.float32, device="cpu", resume=False, adapters=None, **changes):
    """The weights after STEPS steps, the log, and the sizes that were encoded."""
    model = make_model(dtype)
    adapters = None if adapters is None else adapters(model)
    items = make_items(2 * BATCH + 1)
    floats = ("images", "local_images")
    items = [item._replace(**{n: getattr(item, n).to(dtype) for n in floats}) for item in items]
    config = make_config(out, **changes)
    object.__setattr__(config, "seen", [])
    result = train(model, items, config, device=device, resume=resume, adapters=adapters)
    return load_checkpoint(result.checkpoint).weights, read_log(out), config.seen


@pytest.mark.parametrize("size", [1, 2, 4, 6, 50])
def test_gradients_are_those_of_the_whole_batch(tmp_path, size):
    """After AdamW's first step, whose size the gradient's scale does not change, and the rest."""
    weights, log, seen = run(tmp_path / "whole", dtype=torch.float64)
    assert seen == [BATCH] * STEPS
    cut, cut_log, seen = run(tmp_path / "cut", dtype=torch.float64, micro_batch=size)
    assert max(seen) == min(size, BATCH)
    for name, tensor in weights.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-9, atol=1e-10)
    for one, two in zip(log, cut_log, strict=True):
        assert two.losses == pytest.approx(one.losses, rel=1e-6)  # logged as float32
        assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
def test_every_precision(tmp_path, device, precision, tolerance):
    more = {"precision": precision, "device": device, "clip_norm": 0.5}
    _, log, _ = run(tmp_path / "whole", **more)
    _, cut, _ = run(tmp_path / "cut", micro_batch=2, **more)
    measured = [record for record in log if math.isfinite(record.gradient_norm)]
    assert min(record.gradient_norm for record in measured) > 0.5, "nothing is clipped"
    # A sum over all records can overflow fp16 where the parts of it do not: from there on the one
    # run leaves out a step that the other makes.
    compared = 0
    for one, two in zip(log, cut, strict=True):
        if one.skipped_steps != two.skipped_steps:
            break
        assert two.losses["loss"] == pytest.approx(one.losses["loss"], rel=tolerance)
        if one in measured:
            assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=tolerance)
            compared += 1
    assert compared == STEPS if precision != "fp16" else compared > 0


def test_lora(tmp_path):
    pytest.importorskip("peft")
    more = {"adapters": lambda model: LoraAdapters(model, 2), "learning_rate": 1e-2}
    whole, log, _ = run(tmp_path / "whole", **more)
    cut, cut_log, seen = run(tmp_path / "cut", micro_batch=4, **more)
    assert set(seen) == {4, 2}
    for one, two in zip(log, cut_log, strict=True):
        assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
    for name, tensor in whole.items():
        # Adam divides by the gradient: where that is all rounding, so is the step.
        torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-3)


def test_locked_towers(tmp_path):
    """What does not train gets no gradient, and stays to the bit."""
    model = make_model()
    model.clip.visual.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = FastGoalTrainConfig(tmp_path, steps=2, batch_size=BATCH, micro_batch=2)
    train(model, make_items(BATCH), config, device="cpu")
    for name, tensor in model.state_dict().items():
        if name.startswith("clip.visual."):
            assert torch.equal(tensor, before[name])
    assert not torch.equal(model.clip.text_projection, before["clip.text_projection"])


def test_resumed_is_undisturbed(tmp_path):
    run(tmp_path / "a", micro_batch=4, save_every=1, keep=None)
    checkpoint = tmp_path / "a" / "checkpoints" / "step-00000002"
    run(tmp_path / "b", micro_batch=4, resume=checkpoint)
    last = f"checkpoints/step-{STEPS:08d}"
    assert_same_bits(tmp_path / "b" / last, tmp_path / "a" / last)
    with pytest.raises(RuntimeError, match="micro_batch was 4, is now None"):
        run(tmp_path / "c", resume=checkpoint)


def test_what_makes_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="micro_batch must be at least 1"):
        make_config(tmp_path, micro_batch=0)
    with pytest.raises(ConfigError, match="CaftTrainConfig can not cut a batch"):
        CaftTrainConfig(tmp_path, steps=1, micro_batch=2)


def test_the_command(tmp_path):
    write_glit(coloured_records(tmp_path), tmp_path / "data.jsonl")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    weights = []
    for name, more in (("whole", []), ("cut", ["--micro-batch", "2"])):
        found = CliRunner().invoke(
            app,
            [
                "train", "fast-goal", "--data", str(tmp_path / "data.jsonl"), "--out",
                str(tmp_path / name), "--model", str(tmp_path / "model.json"), "--steps", "2",
                "--batch-size", "3", "--context-length", "24", "--device", "cpu", *more,
            ],
        )  # fmt: skip
        assert found.exit_code == 0, found.output
        weights.append(load_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints")).weights)
    assert "micro_batch: 2" in (tmp_path / "cut/config.yaml").read_text()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-4)

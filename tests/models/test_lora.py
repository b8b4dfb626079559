"""LoRA: the right layers train, gradients are those of W + B A, checkpoints are plain models."""

import sys
from pathlib import Path

import pytest
import torch

from fastgoal_models import FastGoalModel, collate
from fastgoal_models.checkpoints import CheckpointError, load_checkpoint
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.lora import LoraAdapters, LoraError, check_lora
from fastgoal_models.training import train
from tests.models.small_models import deep_clip, random_items

pytest.importorskip("peft")

LAYERS, RANK = 2, 3
ADAPTED = ("attn.in_proj_weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def make_config(out: Path, **changes) -> FastGoalTrainConfig:
    return FastGoalTrainConfig(
        **({"out": out, "steps": 4, "batch_size": 2, "learning_rate": 1e-2} | changes)
    )


def loss_of(model: FastGoalModel) -> torch.Tensor:
    return sum(make_config(Path("run")).losses(model, collate(random_items())).values())


def shake(model: FastGoalModel) -> None:
    """B is zero at first, and with it the gradient of A."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def plain(name: str) -> str:
    """The weight that an adapter's matrix belongs to."""
    layer = name.partition(".lora_")[0]
    return f"{layer}.in_proj_weight" if layer.endswith("attn") else f"{layer}.weight"


def test_at_first_nothing_changes():
    model = deep_clip(LAYERS)
    wanted = loss_of(model)
    LoraAdapters(model, RANK)
    assert torch.equal(loss_of(model), wanted)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_weights(custom_text, checkpointing):
    """dL/dB = dL/dW A^T and dL/dA = B^T dL/dW, with dL/dW from a model of the merged weights."""
    model = deep_clip(LAYERS, custom_text=custom_text)
    adapters = LoraAdapters(model, RANK)
    shake(model)
    model.set_grad_checkpointing(checkpointing)
    merged = deep_clip(LAYERS, custom_text=custom_text)
    merged.load_state_dict(adapters.merged())
    loss, wanted = loss_of(model), loss_of(merged)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    gradient = {name: parameter.grad for name, parameter in merged.named_parameters()}
    parameters = dict(model.named_parameters())
    seen = set()
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif "lora_A" in name:
            b = parameters[name.replace("lora_A", "lora_B")]
            weight = gradient[plain(name)]
            torch.testing.assert_close(parameter.grad, b.T @ weight, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(b.grad, weight @ parameter.T, rtol=1e-3, atol=1e-6)
            assert parameter.shape[0] == b.shape[1] == RANK
            seen.add(plain(name))
    assert seen == {name for name in gradient if name.endswith(ADAPTED)}
    assert len(seen) == 2 * LAYERS * len(ADAPTED)
    torch.testing.assert_close(
        model.clip.logit_scale.grad, merged.clip.logit_scale.grad, rtol=1e-3, atol=1e-6
    )


def test_the_model_s_own_weights_stay_and_the_checkpoint_is_a_plain_model(tmp_path):
    before = deep_clip(LAYERS).state_dict()
    model = deep_clip(LAYERS)
    adapters = LoraAdapters(model, RANK)
    result = train(model, random_items(), make_config(tmp_path), device="cpu", adapters=adapters)
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name and not name.endswith("logit_scale"):
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    saved = load_checkpoint(result.checkpoint)
    changed = {name for name in before if not torch.equal(before[name], saved.weights[name])}
    assert changed == {n for n in before if n.endswith((*ADAPTED, "logit_scale"))}
    loaded = deep_clip(LAYERS)
    loaded.load_state_dict(saved.weights)
    torch.testing.assert_close(loss_of(loaded), loss_of(model))
    number = 2 * 2 * LAYERS * len(ADAPTED) + 1  # A and B, two towers; the scale
    assert len(saved.state["optimizer"]["state"]) == number
    assert len(saved.state["adapters"]["weights"]) == number


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}])
def test_resumed_is_undisturbed_bit_for_bit(tmp_path, changes):
    def run(out: str, **how) -> Path:
        model = deep_clip(LAYERS)
        adapters = LoraAdapters(model, RANK)
        config = make_config(tmp_path / out, save_every=1, keep=None, **changes)
        return train(
            model, random_items(), config, device="cpu", adapters=adapters, **how
        ).checkpoint

    whole = load_checkpoint(run("a"))
    resumed = load_checkpoint(run("b", resume=tmp_path / "a/checkpoints/step-00000002"))
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, resumed.weights[name]), name
    for name, tensor in whole.state["adapters"]["weights"].items():
        assert torch.equal(tensor, resumed.state["adapters"]["weights"][name]), name


def test_adapters_of_other_weights_are_refused(tmp_path):
    model = deep_clip(LAYERS)
    adapters = LoraAdapters(model, RANK)
    train(model, random_items(), make_config(tmp_path), device="cpu", adapters=adapters)
    other = deep_clip(LAYERS)
    with torch.no_grad():
        other.clip.visual.proj.add_(1e-3)
    with pytest.raises(CheckpointError, match="trained beside other weights"):
        train(
            other, random_items(), make_config(tmp_path), device="cpu", resume=True,
            adapters=LoraAdapters(other, RANK),
        )  # fmt: skip
    plain_model = deep_clip(LAYERS)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train(plain_model, random_items(), make_config(tmp_path), device="cpu", resume=True)


def test_the_seed_decides_alone():
    def a_of(seed: int) -> torch.Tensor:
        model = deep_clip(LAYERS)
        torch.manual_seed(int(torch.randint(9, ())))
        LoraAdapters(model, RANK, seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(a_of(1), a_of(1)) and not torch.equal(a_of(1), a_of(2))


def test_a_moving_average_is_refused(tmp_path):
    model = deep_clip(LAYERS)
    adapters = LoraAdapters(model, RANK)
    config = make_config(tmp_path, ema=0.5)
    with pytest.raises(ConfigError, match="ema does not go with adapters"):
        train(model, random_items(), config, device="cpu", adapters=adapters)


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="--lora must be at least 1; got 0"):
        check_lora(0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LoraError, match=r"Fix: pip install '\.\[lora\]'"):
        check_lora(2)

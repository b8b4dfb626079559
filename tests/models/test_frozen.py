"""Locked towers: no gradient, no optimizer state, the same weights; and the rest trains."""

from pathlib import Path

import pytest
import torch

from fastgoal_models import collate
from fastgoal_models.checkpoints import CheckpointError, load_checkpoint
from fastgoal_models.errors import ConfigError
from fastgoal_models.fast_goal_training import FastGoalTrainConfig
from fastgoal_models.frozen import lock_towers
from fastgoal_models.training import train
from tests.models.small_models import deep_clip, random_items

LAYERS = 3


def make_config(out: Path, **changes) -> FastGoalTrainConfig:
    return FastGoalTrainConfig(
        **({"out": out, "steps": 4, "batch_size": 2, "learning_rate": 1e-3} | changes)
    )


def trains(name: str, image_blocks: int | None, text_blocks: int | None) -> bool:
    """What the documentation promises, spelt out by name."""
    name = name.removeprefix("clip.")
    if name == "logit_scale":
        return True
    image = name.startswith("visual.")
    name = name.removeprefix("visual.").removeprefix("text.")
    unlocked = image_blocks if image else text_blocks
    if unlocked is None:
        return True
    if name.startswith("transformer.resblocks."):
        return int(name.split(".")[2]) >= LAYERS - unlocked
    heads = {"ln_post.weight", "ln_post.bias", "proj"}
    heads |= {"ln_final.weight", "ln_final.bias", "text_projection"}
    return unlocked > 0 and name in heads


SETTINGS = [(None, None), (0, None), (None, 0), (1, 0), (0, 2), (2, 1), (LAYERS, LAYERS)]


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("image_blocks, text_blocks", SETTINGS)
def test_what_is_locked_has_no_gradient(custom_text, image_blocks, text_blocks):
    model = deep_clip(LAYERS, custom_text=custom_text)
    lock_towers(model, image_blocks, text_blocks)
    config = make_config(Path("run"))
    sum(config.losses(model, collate(random_items())).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == trains(name, image_blocks, text_blocks), name


@pytest.mark.parametrize("image_blocks, text_blocks", [(0, None), (1, 0), (2, 1)])
def test_what_is_locked_stays_and_the_rest_moves(tmp_path, image_blocks, text_blocks):
    model = deep_clip(LAYERS)
    lock_towers(model, image_blocks, text_blocks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = make_config(tmp_path, decay_all=True, weight_decay=0.5)
    result = train(model, random_items(), config, device="cpu")
    saved = load_checkpoint(result.checkpoint)
    for name, tensor in saved.weights.items():
        assert torch.equal(tensor, before[name]) != trains(name, image_blocks, text_blocks), name
    number = sum(trains(name, image_blocks, text_blocks) for name in saved.weights)
    assert len(saved.state["optimizer"]["state"]) == number


def test_resumed_is_undisturbed(tmp_path):
    def run(out: str, **how) -> Path:
        model = deep_clip(LAYERS)
        lock_towers(model, 1, 0)
        config = make_config(tmp_path / out, save_every=1, keep=None)
        return train(model, random_items(), config, device="cpu", **how).checkpoint

    whole = load_checkpoint(run("a"))
    resumed = load_checkpoint(run("b", resume=tmp_path / "a/checkpoints/step-00000002"))
    for name, tensor in whole.weights.items():
        assert torch.equal(tensor, resumed.weights[name]), name


def test_another_setting_is_not_resumed(tmp_path):
    """Even where nobody noted it: the optimizer's state is of other parameters."""
    model = deep_clip(LAYERS)
    lock_towers(model, 1, 0)
    train(model, random_items(), make_config(tmp_path, steps=2), device="cpu")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train(
            deep_clip(LAYERS),
            random_items(),
            make_config(tmp_path, steps=2),
            device="cpu",
            resume=True,
        )


@pytest.mark.parametrize(
    "image_blocks, text_blocks, words",
    [
        (LAYERS + 1, None, "--unlocked-image-blocks must be 0 .* to 3 .*got 4"),
        (None, -1, "--unlocked-text-blocks must be 0 .*got -1"),
        (0, 0, "only the logit scale"),
    ],
)
def test_settings_that_make_no_sense(image_blocks, text_blocks, words):
    model = deep_clip(LAYERS)
    with pytest.raises(ConfigError, match=words):
        lock_towers(model, image_blocks, text_blocks)
    assert all(parameter.requires_grad for parameter in model.parameters())

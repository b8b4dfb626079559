"""The last block for the pooled token alone: the same features, less arithmetic, and when not."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastgoal_models.fast_goal import FastGoalModel

VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
CONFIGS = {
    "plain": {"vision_cfg": VISION, "text_cfg": TEXT},
    "QuickGELU": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "layer scale": {
        "vision_cfg": VISION | {"ls_init_value": 0.1}, "text_cfg": TEXT | {"ls_init_value": 0.1},
    },
    "text tower of its own": {"vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True},
    "one layer": {"vision_cfg": VISION | {"layers": 1}, "text_cfg": TEXT | {"layers": 1}},
    "blocks of another kind": {
        "vision_cfg": VISION | {"block_type": "custom"}, "text_cfg": TEXT,
    },
    "mean of the patches": {
        "vision_cfg": VISION | {"pool_type": "avg", "final_ln_after_pool": True}, "text_cfg": TEXT,
    },
}  # fmt: skip
SPLIT = ("plain", "QuickGELU", "layer scale", "text tower of its own", "one layer")


def make(name: str) -> FastGoalModel:
    torch.manual_seed(0)
    model = FastGoalModel.create({"embed_dim": 48, **CONFIGS[name]}, context_length=77).eval()
    for parameter in model.parameters():  # also those that start at 0 or 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(3, 3, 32, 32, dtype=dtype)
    texts = torch.zeros(3, 20, dtype=torch.int64)
    for row, length in enumerate((2, 9, 20)):  # the shortest has no word; the longest is full
        texts[row, :length] = torch.randint(1, 49406, (length,))
        texts[row, 0], texts[row, length - 1] = 49406, 49407
    return images, texts


def features_of_tokens(model, images, texts):
    """What the features are by definition: read from all tokens of the last layer."""
    return (
        F.normalize(model.image_tokens(images)[0], dim=-1),
        F.normalize(model.text_tokens(texts)[0], dim=-1),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_all_tokens(name):
    model = make(name).double()
    images, texts = inputs(torch.float64)
    with torch.no_grad():
        for ours, expected in zip(
            (model.encode_image(images), model.encode_text(texts)),
            features_of_tokens(model, images, texts),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_other_tokens_of_the_last_block_are_not_computed(name):
    model = make(name)
    images, texts = inputs(torch.float32)

    def flops(encode, *arguments) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            encode(*arguments)
        return counted.get_total_flops()

    fewer = flops(model.encode_image, images) < flops(model.image_tokens, images)
    assert fewer == (name in SPLIT)
    assert flops(model.encode_text, texts) < flops(model.text_tokens, texts)


def test_in_training_every_block_is_called():
    """Hooks, wrappers and checkpointing are the block's own; and gradients are the same."""
    model = make("plain")
    images, texts = inputs(torch.float32)
    ours, expected = [], []
    for kept, encode in ((ours, None), (expected, features_of_tokens)):
        model.zero_grad()
        v, t = (
            (model.encode_image(images), model.encode_text(texts))
            if encode is None
            else encode(model, images, texts)
        )
        (v @ t.T).square().sum().backward()
        kept += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(ours) > 40
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_last_block_sees_its_tokens(register):
    model = make("plain")
    images, texts = inputs(torch.float32)
    seen = []
    for transformer in (model.clip.visual.transformer, model.clip.transformer):
        getattr(transformer.resblocks[-1], register)(lambda *given: seen.append(given[1][0].shape))
    with torch.no_grad():
        model.encode_image(images)
        model.encode_text(texts)
    assert seen == [(3, 17, 64), (3, 20, 64)]


def test_features_under_autocast_are_bfloat16s():
    model = make("plain")
    images, texts = inputs(torch.float32)
    with torch.no_grad():
        exact = features_of_tokens(model, images, texts)
        with torch.autocast("cpu", torch.bfloat16):
            ours = model.encode_image(images), model.encode_text(texts)
            expected = features_of_tokens(model, images, texts)
    for one, other, right in zip(ours, expected, exact, strict=True):
        # As far from float32's as bfloat16's own are, give or take.
        error = (one.float() - right).abs().max()
        assert 0 < error < 4 * (other.float() - right).abs().max()

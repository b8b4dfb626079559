"""CAFT as a model: what it trains with, sizes, modes, configurations, bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastgoal_kernels import HierarchicalAlignmentLoss, reference
from fastgoal_models.caft import Caft, CaftConfig
from fastgoal_models.caft.graph_pool import sample_tokens
from fastgoal_models.errors import ConfigError


def batch(model: Caft, count: int, captions: int = 8, length: int = 12):
    size = model.config.image_size
    texts = torch.randint(1, 400, (count, captions, length))
    texts[..., -1] = 49407
    return torch.randn(count, 3, size, size), texts


def test_a_step_moves_every_parameter_that_is_not_frozen():
    torch.manual_seed(0)
    model = Caft.create("caft-xs")
    loss = HierarchicalAlignmentLoss(8)
    parts = loss(**model(*batch(model, 3)), output_dict=True)
    assert set(parts) == {"text_conditioned_loss", "fine_loss", "whole_loss"}
    sum(parts.values()).backward()
    for name, parameter in model.named_parameters():
        frozen = name == "visual.pos_embed" or name.startswith("visual.superpixel_generator.")
        assert parameter.requires_grad != frozen, name
        if not frozen:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.slow
def test_a_training_step_of_caft_b_at_batch_8():
    torch.manual_seed(1)
    model = Caft.create("caft-b").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_fn, data = HierarchicalAlignmentLoss(8, negatives="sample"), batch(model, 8)
    losses = []
    for _ in range(2):
        torch.manual_seed(2)
        loss = loss_fn(**model(*data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] and math.isfinite(losses[1])


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 48)])
def test_any_size_divisible_by_16(size):
    torch.manual_seed(3)
    model = Caft.create("caft-xs", superpixels="slic").eval()
    image = model.encode_image(torch.randn(2, 3, *size), with_hierarchy=True)
    assert image.fine_tokens.shape == (2, 16, 128)  # where there are fewer, some are taken twice
    assert image.hierarchy.superpixels.shape == (2, size[0] // 8, size[1] // 8)
    with pytest.raises(ValueError, match=r"divisible by 16; got \(1, 3, 40, 32\)"):
        model.encode_image(torch.randn(1, 3, 40, 32))


def test_the_superpixel_network_stands_still_unless_published():
    torch.manual_seed(4)
    images = torch.randn(2, 3, 96, 96)
    for published in (False, True):
        model = Caft.create("caft-xs", published=published).train()
        statistics = model.visual.superpixel_generator.conv0a[1].running_mean
        before = statistics.clone()
        model.encode_image(images)
        assert torch.equal(before, statistics) != published
        model.eval().encode_image(images)
        assert not model.visual.superpixel_generator.training


def test_scales_start_and_stay_where_they_should():
    model = Caft.create("caft-xs", superpixels="grid")
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.logit_bias.item() == model.logit_bias_coarse.item() == -10
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        model.logit_scale_coarse.fill_(9.0)
    model.clamp_scales_()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert model.logit_scale_coarse.item() == 4
    with torch.no_grad():
        model.logit_scale.fill_(-1.0)
    model.clamp_scales_()
    assert model.logit_scale.item() == 0


def test_padding_is_sampled_last():
    torch.manual_seed(5)
    tokens, live = torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    live[0, 2:5] = False
    tokens[0, 2:5] = 100.0
    chosen = sample_tokens(tokens, 3, live)
    assert set(chosen[0].tolist()) == {0, 1, 5}
    mean = tokens[1].mean(dim=0, keepdim=True)
    points = torch.cat([mean, tokens[1]])[None]
    assert torch.equal(chosen[1], reference.farthest_point_sampling(points, 4)[0, 1:] - 1)
    alike = sample_tokens(torch.ones(1, 4, 2), 3, None)
    assert ((alike >= 0) & (alike < 4)).all()


def test_the_image_tower_compiles_whole():
    torch.manual_seed(6)
    model = Caft.create("caft-xs", superpixels="slic").eval()
    compiled = torch.compile(model.visual, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        (fine, whole, _), (want, want_whole, _) = compiled(images), model.visual(images)
    torch.testing.assert_close(fine, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, want_whole, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_stays_near():
    torch.manual_seed(7)
    model = Caft.create("caft-xs", superpixels="grid").eval()
    data = batch(model, 2)
    loss = HierarchicalAlignmentLoss(8)
    with torch.no_grad():
        exact = loss(**model(*data))
        with torch.autocast("cpu", torch.bfloat16):
            near = loss(**model(*data))
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0)


def test_configurations_go_to_json_and_back(tmp_path):
    for name in ("caft-b", "caft-s", "caft-xs"):
        config = CaftConfig.load(name)
        (tmp_path / "c.json").write_text(json.dumps(config.as_json()))
        assert CaftConfig.load(tmp_path / "c.json") == CaftConfig.load(config) == config


GOOD = CaftConfig.load("caft-xs").as_json()
BAD = [
    ("caft-xl", r"no CAFT configuration 'caft-xl'; there are caft-b, caft-s, caft-xs"),
    (GOOD | {"depth": 3}, "unknown keys.*depth"),
    ({k: v for k, v in GOOD.items() if k != "embed_dim"}, "lacks a key: 'embed_dim'"),
    (GOOD | {"embed_dim": 130}, "embed_dim 130 must be divisible by its 4 heads"),
    (GOOD | {"vision_cfg": GOOD["vision_cfg"] | {"image_size": 100}}, "divisible by 16; got 100"),
    (GOOD | {"vision_cfg": GOOD["vision_cfg"] | {"tokens": [8, 4]}}, "one fewer than layers"),
    (GOOD | {"vision_cfg": GOOD["vision_cfg"] | {"tokens": [16, 32, 4]}}, "must not grow"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BAD)
def test_bad_configurations_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        Caft.create(config)


def test_bad_input_is_named():
    model = Caft.create("caft-xs", superpixels="grid")
    with pytest.raises(ValueError, match=r"at least 4 captions an image; got \(2, 3, 7\)"):
        model.encode_text(torch.ones(2, 3, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(M, at most 77\); got \(2, 80\)"):
        model.encode_parts(torch.ones(2, 80, dtype=torch.long))
    with pytest.raises(ValueError, match="superpixels must be one of"):
        Caft.create("caft-xs", superpixels="watershed")

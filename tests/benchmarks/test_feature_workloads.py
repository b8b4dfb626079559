"""Losses of plain features: what is measured, on what, by whom, and against which truth."""

from dataclasses import replace

import pytest
import torch

from benchmarks import feature_baselines, feature_parity, feature_workloads
from benchmarks.feature_peers import CLIP, FEATURE_PEERS, SIGMOID
from benchmarks.feature_workloads import (
    COMPILED,
    CONTENDERS,
    FeatureWorkload,
    Way,
    build,
    make_inputs,
    sweep,
    takes_part,
    useful_flop,
)
from benchmarks.peers import Unavailable
from fastgoal_kernels import reference

CPU = torch.device("cpu")
TRAINING = [FeatureWorkload(op, "forward+backward", 37, 24, "float32") for op in (CLIP, SIGMOID)]


@pytest.mark.parametrize("work", TRAINING, ids=lambda work: work.op)
def test_inputs_are_unit_length_matched_pairs_that_want_gradients(work):
    work = replace(work, batch=2048, dim=64)
    images, texts, scale, bias = make_inputs(work, CPU)
    for features in (images, texts):
        assert features.shape == (2048, 64) and features.requires_grad
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2048))
    cosines = (images @ texts.T).detach()
    others = cosines[~torch.eye(2048, dtype=torch.bool)].mean()
    # Any two share 0.15; a matched pair adds 0.2 of the other 0.85, on average. The mean of 2,048
    # random directions is 0.02 long, and the length of a mixed feature off by a few percent.
    assert others == pytest.approx(0.15, abs=0.01)
    assert cosines.diagonal().mean() - others == pytest.approx(0.85 * 0.2, abs=0.01)
    assert scale.item() == (100 if work.op == CLIP else 10) and scale.requires_grad
    assert (bias is None) if work.op == CLIP else (bias.item() == -10 and bias.requires_grad)


def test_inference_wants_no_gradients_and_both_losses_get_the_same_features():
    clip, sigmoid = (
        make_inputs(replace(work, stage="inference", dtype="bfloat16"), CPU) for work in TRAINING
    )
    assert clip.images.dtype == torch.bfloat16 and torch.equal(clip.images, sigmoid.images)
    assert not any(x.requires_grad for x in (*clip, *sigmoid) if x is not None)


def test_the_loss_is_neither_zero_nor_that_of_noise():
    # Of 2,048 pairs ln 2048 = 7.6 would be noise.
    work = FeatureWorkload(CLIP, "inference", 2048, 512, "float32")
    assert 0.1 < feature_baselines.exact_clip_loss(*make_inputs(work, CPU)[:3]).loss < 6


def test_useful_flop():
    product = 2 * 37**2 * 24
    clip, sigmoid = TRAINING
    assert useful_flop(clip) == 4 * product and useful_flop(sigmoid) == 3 * product
    assert useful_flop(replace(clip, stage="inference")) == product


@pytest.mark.parametrize("work", TRAINING, ids=lambda work: work.op)
@pytest.mark.parametrize("area", [1, 150, 1 << 22])
def test_the_yardstick_agrees_with_the_reference(work, area, monkeypatch):
    # However many rows it holds at a time, and with gradients of some rows only.
    monkeypatch.setitem(feature_baselines._AREA, "cpu", area)
    monkeypatch.setattr(feature_baselines, "_SAMPLE", 5)
    inputs = make_inputs(work, CPU)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs if leaf is not None]
    function = getattr(reference, work.op)
    loss = function(*wide)
    images, texts, *parameters = torch.autograd.grad(loss, wide)
    exact = getattr(
        feature_baselines, "exact_clip_loss" if work.op == CLIP else "exact_sigmoid_loss"
    )
    found = exact(*(leaf for leaf in inputs if leaf is not None))
    assert found.sample.tolist() == [0, 9, 18, 27, 36]
    pairs = [
        (found.loss, loss),
        (found.images, images[found.sample]),
        (found.texts, texts[found.sample]),
        (found.parameters, torch.stack(parameters)),
    ]
    for value, truth in pairs:
        assert feature_parity.relative_error(value, truth) < 1e-5


@pytest.mark.parametrize("work", TRAINING, ids=lambda work: work.op)
@pytest.mark.parametrize("name", ["fastgoal torch", "eager"])
def test_contenders_are_right_and_a_wrong_gradient_is_seen(work, name):
    inputs = make_inputs(work, CPU)
    way = build(name, work, inputs)
    errors = feature_parity.measure(work, way, inputs)
    assert set(errors) == {"loss", "gradients", "parameters"}
    assert max(errors.values()) < 1e-5

    def habits(images, texts, scale, bias):
        """The right value, and gradients of another size: what memeff does by default."""
        loss = way.loss(images, texts, scale, bias)
        return loss.detach() + 1.2 * (loss - loss.detach())

    errors = feature_parity.measure(work, Way(habits), inputs)
    limits = feature_parity.limits("memeff", replace(work, dtype="bfloat16"), CPU)
    assert errors["loss"] < 1e-5
    assert errors["gradients"] > limits["gradients"]
    assert errors["parameters"] > limits["parameters"]


def test_limits_depend_on_who_rounds_what():
    work = TRAINING[0]
    narrow = replace(work, dtype="bfloat16")
    for name in CONTENDERS:
        assert feature_parity.limits(name, work, CPU) is feature_parity.IEEE
    rounded = {
        name for name in CONTENDERS
        if feature_parity.limits(name, narrow, CPU) is feature_parity.ROUNDED
    }  # fmt: skip
    exact = {"fastgoal triton", "fastgoal torch", "memeff", "inf-cl"}
    assert rounded == set(CONTENDERS) - exact


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", TRAINING, ids=lambda work: work.op)
def test_plain_pytorch_keeps_its_limits(work, dtype):
    work = replace(work, dtype=dtype, batch=512, dim=64)
    inputs = make_inputs(work, CPU)
    errors = feature_parity.measure(work, build("eager", work, inputs), inputs)
    limits = feature_parity.limits("eager", work, CPU)
    assert all(error <= limits[key] for key, error in errors.items())


def test_spot_checks():
    checks = {check["name"]: check for check in feature_parity.run_checks(CPU)}
    assert len(checks) == 4
    assert checks[f"torch {CLIP}"]["status"] == checks[f"torch {SIGMOID}"]["status"] == "ok"
    assert checks[f"triton {CLIP}"]["status"] in ("ok", "unavailable")


def test_who_takes_part():
    big = FeatureWorkload(CLIP, "forward+backward", 65_536, 768, "bfloat16")
    at = {
        op: [n for n in CONTENDERS if takes_part(n, replace(big, op=op))] for op in (CLIP, SIGMOID)
    }
    assert set(at[CLIP]) - set(at[SIGMOID]) == {"memeff", "inf-cl", "sentence-transformers cached"}
    assert set(at[SIGMOID]) - set(at[CLIP]) == {"siglip-kernel", "open_clip chunked"}
    assert all(COMPILED + "open_clip" in names for names in at.values())
    with pytest.raises(Unavailable, match="CUDA"):
        build("fastgoal triton", TRAINING[0], make_inputs(TRAINING[0], CPU))


def test_the_sweep_of_a_gpu_has_every_size_and_inference_once():
    works = sweep(cuda=True, quick=False)
    for op in (CLIP, SIGMOID):
        training = [w for w in works if w.op == op and w.stage == "forward+backward"]
        sizes = {(work.batch, work.dim) for work in training}
        assert sizes == {
            (batch, dim)
            for batch in (8_192, 32_768, 65_536, 131_072)
            for dim in (512, 768, 1024)
        }  # fmt: skip
        assert [work.batch for work in training] == sorted(work.batch for work in training)
        alone = [work for work in works if work.op == op and work.stage == "inference"]
        assert [(work.batch, work.dim) for work in alone] == [feature_workloads.PROMISED]
    assert {work.dtype for work in works} == {"bfloat16"}
    assert len(sweep(cuda=True, quick=True)) == len(sweep(cuda=False, quick=False)) == 4


def test_a_way_without_the_gradient_of_the_scale_has_fewer_leaves():
    inputs = make_inputs(TRAINING[1], CPU)
    assert len(Way(lambda *_: inputs.logit_scale).leaves(inputs)) == 4
    assert Way(lambda *_: inputs.logit_scale, trains_scale=False).leaves(inputs) == inputs[:2]
    assert {peer.name for peer in FEATURE_PEERS if not peer.trains_scale} == {
        "memeff", "sentence-transformers cached",
    }  # fmt: skip

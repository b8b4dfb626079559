"""The text-conditioned loss: what is measured, on what, by whom, and against which truth."""

from dataclasses import replace

import pytest
import torch

from benchmarks import pooling_baselines, pooling_parity
from benchmarks.peers import Unavailable
from benchmarks.pooling_workloads import (
    ALL,
    COMPILED,
    CONTENDERS,
    EAGER,
    LARGE,
    PROMISED,
    PUBLISHED,
    SAMPLE,
    PoolingWorkload,
    build,
    make_inputs,
    sweep,
    useful_flop,
    worth_compiling,
)
from fastgoal_kernels import TextConditionedPool, reference

CPU = torch.device("cpu")
WORKS = [PoolingWorkload(negatives, 5, 3, 7, 24, 3, "float32") for negatives in (ALL, SAMPLE)]


def exact(inputs, work):
    return pooling_baselines.exact_loss(*inputs[:5], work.captions_per_image, inputs.offsets)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.negatives)
def test_inputs_have_gradients_everywhere_and_parameters_that_matter(work):
    inputs = make_inputs(work, CPU)
    assert inputs.images.shape == (5, 7, 24) and inputs.texts.shape == (15, 24)
    assert len(inputs.leaves) == 4 + len(list(inputs.pool.parameters())) == 14
    assert all(leaf.requires_grad for leaf in inputs.leaves)
    assert all(bool(parameter.any()) for parameter in inputs.pool.parameters())
    if work.negatives == ALL:
        assert inputs.offsets is None
    else:
        assert inputs.offsets.shape == (5, 4) and inputs.offsets.min() >= 0
        assert inputs.offsets.max() < 3
    narrow = make_inputs(replace(work, dtype="bfloat16"), CPU)
    assert narrow.images.dtype == narrow.texts.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in narrow.pool.parameters()} == {torch.float32}
    assert torch.equal(narrow.images, inputs.images.bfloat16())


def test_positives_and_negatives_both_pull():
    # A gradient of which one side is lost in rounding could be wrong there without being seen.
    work = PoolingWorkload(ALL, 32, 4, 16, 64, 4, "float32")
    inputs = make_inputs(work, CPU)
    with torch.no_grad():
        scores = inputs.pool.scores(inputs.images, inputs.texts)
        probability = (inputs.logit_scale * scores + inputs.logit_bias).sigmoid()
    own = torch.eye(32, dtype=torch.bool).repeat_interleave(4, dim=1)
    pull = probability[~own].sum() / (1 - probability[own]).sum()
    assert 1.3 < pull < 4


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.negatives)
@pytest.mark.parametrize("pairs", [1, 32, 1 << 12])
def test_the_yardstick_agrees_with_the_reference(work, pairs, monkeypatch):
    # However many images it takes at a time.
    monkeypatch.setitem(pooling_baselines._PAIRS, "cpu", pairs)
    inputs = make_inputs(work, CPU)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves[:4]]
    pool = TextConditionedPool(24, 3).double()
    pool.load_state_dict(inputs.pool.state_dict())
    loss = reference.text_conditioned_sigmoid_loss(
        wide[0], wide[1], pool.weights(), 3, wide[2], wide[3],
        captions_per_image=3, negative_offsets=inputs.offsets,
    )  # fmt: skip
    images, texts, *parameters = torch.autograd.grad(loss, [*wide, *pool.parameters()])
    found = exact(inputs, work)
    assert found.parameters[0].dtype == torch.float32 and len(found.parameters) == 12
    pairs_of = [(found.loss, loss), (found.images, images), (found.texts, texts)]
    pairs_of += zip(found.parameters, parameters, strict=True)
    for value, truth in pairs_of:
        assert pooling_parity.relative_error(value, truth) < 1e-6  # its own rounding to float32


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.negatives)
@pytest.mark.parametrize("name", ["fastgoal torch", EAGER, PUBLISHED])
def test_contenders_are_right_and_a_wrong_gradient_is_seen(work, name):
    inputs = make_inputs(work, CPU)
    way = build(name, work, inputs)
    errors = pooling_parity.measure(work, way, inputs)
    assert set(errors) == {"loss", "gradients", "parameters"}
    assert max(errors.values()) < 1e-5
    limits = pooling_parity.limits(replace(work, dtype="bfloat16"), CPU)

    def another_slope(given):
        """The right value, and another gradient of the bias."""
        return way(given) - 0.5 * (given.logit_bias - given.logit_bias.detach())

    errors = pooling_parity.measure(work, another_slope, inputs)
    assert errors["loss"] < 1e-5 and errors["parameters"] > limits["parameters"]

    def another_size(given):
        """The right value, and gradients of another size."""
        loss = way(given)
        return loss.detach() + 1.3 * (loss - loss.detach())

    errors = pooling_parity.measure(work, another_size, inputs)
    assert errors["loss"] < 1e-5
    assert errors["gradients"] > limits["gradients"]
    assert errors["parameters"] > limits["parameters"]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.negatives)
@pytest.mark.parametrize("name", ["fastgoal torch", EAGER, PUBLISHED])
def test_half_precision_keeps_its_limits(work, name):
    work = replace(work, images=16, tokens=64, dim=128, heads=2, dtype="bfloat16")
    inputs = make_inputs(work, CPU)
    errors = pooling_parity.measure(work, build(name, work, inputs), inputs)
    limits = pooling_parity.limits(work, CPU)
    assert limits is pooling_parity.ROUNDED
    assert all(error <= limits[key] for key, error in errors.items()), errors


def test_the_published_form_pairs_what_the_others_do():
    # Sorted columns: images before this one bring a column each, then come its own captions.
    work = WORKS[1]
    inputs = make_inputs(work, CPU)
    (one, other) = (build(name, work, inputs)(inputs) for name in (EAGER, PUBLISHED))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    moved = inputs._replace(offsets=(inputs.offsets + 1) % 3)
    assert abs(build(PUBLISHED, work, moved)(moved) - other) > 1e-3 * other


def test_spot_checks():
    checks = {check["name"]: check for check in pooling_parity.run_checks(CPU)}
    assert len(checks) == 4
    for negatives in (ALL, SAMPLE):
        name = f"text_conditioned_sigmoid_loss {negatives}"
        assert checks[f"torch {name}"]["status"] == "ok"
        assert checks[f"triton {name}"]["status"] in ("ok", "unavailable")


def test_useful_flop_and_columns():
    every, sampled = WORKS
    assert (every.texts, every.columns, sampled.columns) == (15, 15, 7)
    # Products of a forward: q, k and v, the pairs' attention over 7 tokens and a zero, and W_o.
    once = 15 * 24**2 + 2 * 35 * 24**2 + 75 * (2 * 8 * 24 + 24**2)
    assert useful_flop(every) == 3 * 2 * once


def test_a_row_says_what_it_measures():
    assert WORKS[1].describe() == (
        "text_conditioned_sigmoid_loss, sample, forward+backward: 5 × 15, K 3, 7 tokens, D 24, "
        "float32"
    )


def test_the_sweep_of_a_gpu_is_at_the_promised_sizes():
    works = sweep(cuda=True, quick=False)
    sizes = [(w.negatives, w.images, w.captions_per_image) for w in works]
    assert sizes == [(SAMPLE, *PROMISED), (ALL, *PROMISED), (ALL, *LARGE)]
    assert {(w.tokens, w.dim, w.dtype) for w in works} == {(64, 512, "bfloat16")}
    assert [worth_compiling(work) for work in works] == [True, True, False]
    assert CONTENDERS[0] == "fastgoal triton" and CONTENDERS[-1] == COMPILED
    for quick in sweep(cuda=True, quick=True), sweep(cuda=False, quick=False):
        assert [work.negatives for work in quick] == [SAMPLE, ALL]


def test_a_backend_that_can_not_serve_is_unavailable():
    with pytest.raises(Unavailable, match="backend 'triton'"):
        build("fastgoal triton", WORKS[0], make_inputs(WORKS[0], CPU))

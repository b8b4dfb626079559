"""CAFT's whole step: ours and the published form are the same loss with the same gradients."""

import pytest
import torch

from benchmarks import step_workloads
from benchmarks.peers import Unavailable
from benchmarks.step_baselines import published_ops, published_sigmoid_loss
from benchmarks.step_workloads import PUBLISHED, StepWorkload, build, make_inputs, measure_errors
from fastgoal_kernels import reference, sigmoid_contrastive_loss
from fastgoal_models.caft import graph_pool

CPU = torch.device("cpu")


@pytest.mark.parametrize("negatives", ["all", "sample"])
def test_contenders_agree(negatives):
    work = StepWorkload("caft-xs", "grid", 3, 8, negatives, "float32")
    inputs = make_inputs(work, CPU)
    errors = measure_errors(work, build("fastgoal torch", work, inputs), inputs)
    assert errors["loss"] < 1e-5 and errors["gradients"] < 1e-4
    wrong = build("fastgoal torch", work, inputs)
    errors = measure_errors(work, lambda own: 1.01 * wrong(own), inputs)
    assert errors["loss"] > 5e-3 and errors["gradients"] > 5e-3


def test_the_published_sigmoid_loss_is_ours():
    torch.manual_seed(0)
    images, texts = torch.randn(4, 6), torch.randn(12, 6)
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    torch.testing.assert_close(
        published_sigmoid_loss(images, texts, scale, bias, 3),
        sigmoid_contrastive_loss(images, texts, 5.0, -2.0, captions_per_image=3, normalize=True),
    )


def test_plain_ops_are_put_in_and_taken_out_again():
    work = StepWorkload("caft-xs", "grid", 2, 8, "all", "float32")
    model = make_inputs(work, CPU).model
    fused = graph_pool.soft_cluster_pool
    attention = model.visual.blocks[0].attn
    with published_ops(model):
        assert graph_pool.soft_cluster_pool is reference.soft_cluster_pool
        assert not attention.fused_attn
    assert graph_pool.soft_cluster_pool is fused and attention.fused_attn


def test_batches_are_captions_with_an_end_and_offsets_where_negatives_are_sampled():
    work = StepWorkload("caft-xs", "grid", 3, 8, "sample", "float32")
    inputs = make_inputs(work, CPU)
    ends = inputs.texts.argmax(dim=2)
    assert inputs.texts.shape == (3, 8, 77) and ends.min() >= 8 and ends.max() < 40
    assert inputs.offsets.shape == (3, 2) and inputs.offsets.max() < 8
    assert make_inputs(StepWorkload("caft-xs", "grid", 3, 8, "all", "float32"), CPU).offsets is None
    with pytest.raises(Unavailable, match="not on a CUDA device"):
        build("fastgoal triton", work, inputs)
    assert build(PUBLISHED, work, inputs)


def test_the_gpu_sweep_is_the_published_batch():
    works = step_workloads.sweep(cuda=True, quick=False)
    assert [(w.model, w.images, w.captions_per_image, w.negatives) for w in works] == [
        ("caft-b", 256, 8, "sample"), ("caft-b", 256, 8, "all"),
    ]  # fmt: skip

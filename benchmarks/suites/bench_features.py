"""The losses of plain features under pytest-benchmark, small enough for a CPU.

    pytest benchmarks/suites --benchmark-only [--benchmark-autosave --benchmark-compare]

Runs on the GPU as well when there is one, still small: `python -m benchmarks.device` is the sweep.
"""

import pytest
import torch

from benchmarks.feature_workloads import (
    COMPILED,
    CONTENDERS,
    FeatureWorkload,
    build,
    make_inputs,
    takes_part,
)
from benchmarks.measure import forward_backward, synchronize
from benchmarks.peers import Unavailable

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra: bench)")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
WORKS = [
    FeatureWorkload(op, stage, 1024, 128, "float32")
    for op in ("clip_contrastive_loss", "sigmoid_contrastive_loss")
    for stage in ("inference", "forward+backward")
]
PAIRS = [
    pytest.param(name, work, id=f"{name}, {work.op} {work.stage}")
    for name in CONTENDERS
    for work in WORKS
    if takes_part(name, work) and not name.startswith(COMPILED)
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("contender, work", PAIRS)
def test_features(benchmark, contender, work, device):
    inputs = make_inputs(work, torch.device(device))
    benchmark.group = f"{work.op} {work.stage} {device}"
    try:
        way = build(contender, work, inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))

    def step():
        if work.stage == "forward+backward":
            forward_backward(lambda: way.loss(*inputs), way.leaves(inputs))
        else:
            way.loss(*inputs)
        synchronize(inputs.images.device)

    benchmark(step)

"""The text-conditioned loss under pytest-benchmark, small enough for a CPU.

    pytest benchmarks/suites --benchmark-only [--benchmark-autosave --benchmark-compare]

Runs on the GPU as well when there is one, still small: `python -m benchmarks.device` is the sweep.
"""

import pytest
import torch

from benchmarks.measure import forward_backward, synchronize
from benchmarks.peers import Unavailable
from benchmarks.pooling_workloads import COMPILED, CONTENDERS, build, make_inputs, sweep

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra: bench)")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != COMPILED])
@pytest.mark.parametrize("work", sweep(cuda=False, quick=False), ids=lambda work: work.negatives)
def test_pooling(benchmark, work, contender, device):
    inputs = make_inputs(work, torch.device(device))
    benchmark.group = f"{work.op} {work.negatives} {device}"
    try:
        way = build(contender, work, inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))

    def step():
        forward_backward(lambda: way(inputs), inputs.leaves)
        synchronize(inputs.images.device)

    benchmark(step)

"""The token ops under pytest-benchmark, small enough for a CPU.

    pytest benchmarks/suites --benchmark-only [--benchmark-autosave --benchmark-compare]

Runs on the GPU as well when there is one, still small: `python -m benchmarks.device` is the sweep.
"""

import pytest
import torch

from benchmarks.measure import synchronize
from benchmarks.peers import Unavailable
from benchmarks.token_workloads import (
    COMPILED,
    CONTENDERS,
    build,
    make_inputs,
    sweep,
    takes_part,
)

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra: bench)")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PAIRS = [
    pytest.param(name, work, id=f"{name}, {work.op}")
    for work in sweep(cuda=False, quick=False)
    for name in CONTENDERS
    if takes_part(name, work) and name != COMPILED
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("contender, work", PAIRS)
def test_tokens(benchmark, contender, work, device):
    inputs = make_inputs(work, torch.device(device))
    benchmark.group = f"{work.op} {device}"
    try:
        way = build(contender, work, inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))

    def step():
        way(inputs)
        synchronize(inputs.leaves[0].device)

    benchmark(step)

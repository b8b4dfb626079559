"""MaxSim under pytest-benchmark, small enough for a CPU.

    pytest benchmarks/suites --benchmark-only [--benchmark-autosave --benchmark-compare]

Runs on the GPU as well when there is one, still small: `python -m benchmarks.device` is the sweep.
"""

import pytest
import torch

from benchmarks.measure import forward_backward, synchronize
from benchmarks.peers import Unavailable
from benchmarks.workloads import CONTENDERS, Workload, build, make_inputs

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra: bench)")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES = {"images": 16, "texts": 16, "text_tokens": 77, "image_tokens": 196, "dim": 128}
KINDS = [
    ("maxsim_scores", "text_to_image", "inference"),
    ("maxsim_scores", "both", "inference"),
    ("maxsim_contrastive_loss", "text_to_image", "forward+backward"),
    ("maxsim_contrastive_loss", "both", "forward+backward"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["full", "padded", "packed"])
@pytest.mark.parametrize("contender", [name for name in CONTENDERS if name != "torch.compile"])
@pytest.mark.parametrize("op, direction, stage", KINDS)
def test_maxsim(benchmark, op, direction, stage, contender, layout, device):
    fill = 1.0 if layout == "full" else 0.55
    work = Workload(op, direction, stage, dtype="float32", layout=layout, fill=fill, **SIZES)
    inputs = make_inputs(work, torch.device(device))
    benchmark.group = f"{op} {direction} {stage} {layout} {device}"
    try:
        call = build(contender, work, inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))

    def step():
        if stage == "forward+backward":
            forward_backward(lambda: call(inputs), inputs.leaves)
        else:
            call(inputs)
        synchronize(inputs.images.device)

    benchmark(step)

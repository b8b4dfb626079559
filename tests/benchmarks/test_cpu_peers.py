"""The peers of a CPU: what becomes of queries and documents, and of a library that crashes.

Stand-ins with the peers' signatures take the place of their code.
"""

import importlib.util
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import baselines, cpu_peers, parity
from benchmarks.cpu_peers import CPU_PEERS, LIBXSMM_PRODUCT
from benchmarks.peers import PEERS, Peer, Unavailable
from benchmarks.workloads import Workload, build, make_inputs

CPU = torch.device("cpu")
NATIVE = [peer for peer in CPU_PEERS if peer.native]


class MaxSimScorer:
    def __init__(self, *, normalize=True):
        assert not normalize  # the tokens have unit length already

    def __call__(self, queries, documents, q_mask=None, d_mask=None):
        similarity = torch.einsum("qtd,nrd->qntr", queries, documents)
        if d_mask is not None:
            similarity = similarity.masked_fill(~d_mask[None, :, None], -torch.inf)
        best = similarity.max(3).values
        return (best if q_mask is None else best * q_mask[:, None]).sum(2)


def maxsim_scores(query, documents):
    assert query.dtype == documents.dtype == np.float32
    return np.einsum("td,nrd->ntr", query, documents).max(2).sum(1)


STAND_INS = {
    "late-interaction-kernels": SimpleNamespace(MaxSimScorer=MaxSimScorer),
    "maxsim-cpu": SimpleNamespace(maxsim_scores=maxsim_scores),
    "fast-maxsim": SimpleNamespace(maxsim_scores=maxsim_scores),
}


def forward(tokens, regions, dim, direction="both"):
    return Workload("maxsim_scores", direction, "inference", 4, 3, tokens, regions, dim, "float32")


@pytest.mark.parametrize("peer", CPU_PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("direction", ["text_to_image", "both"])
def test_a_peer_scores_the_same(peer, direction):
    work = forward(9, 7, 16, direction)
    inputs = make_inputs(work, CPU)
    module = STAND_INS[peer.name]
    scores = peer.call(module, inputs.images, inputs.captions, work.directions)
    assert set(scores) == set(work.directions)
    errors = parity.measure(work, lambda _: scores, inputs)
    assert errors["scores"] < 1e-6


@pytest.mark.parametrize("layout", ["full", "padded"])
def test_late_interaction_kernels_differentiates_on_a_cpu(layout):
    peer = next(peer for peer in CPU_PEERS if peer.name == "late-interaction-kernels")
    fill = 1.0 if layout == "full" else 0.55
    work = Workload(
        "maxsim_contrastive_loss", "both", "forward+backward", 4, 4, 9, 7, 16, "float32", layout,
        fill,
    )  # fmt: skip
    inputs = make_inputs(work, CPU)

    def call(own):
        module = STAND_INS[peer.name]
        scores = peer.call(module, own.images, own.captions, work.directions)
        return baselines.filip_loss(scores, 1 / 0.07)

    errors = parity.measure(work, call, inputs)
    assert errors["loss"] < 1e-5 and errors["gradients"] < 1e-4


@pytest.mark.parametrize("peer", NATIVE, ids=lambda peer: peer.name)
def test_native_code_has_no_gradients(peer):
    inputs = make_inputs(
        Workload("maxsim_scores", "both", "forward", 4, 4, 9, 7, 16, "float32"), CPU
    )
    with pytest.raises(Unavailable, match="no gradients"):
        peer.call(STAND_INS[peer.name], inputs.images, inputs.captions, ("text_to_image",))


@pytest.mark.parametrize(("tokens", "regions", "dim"), [(40, 70, 512), (20, 5, 256), (3, 70, 8192)])
def test_maxsim_cpu_is_never_asked_for_a_product_that_its_wheel_gets_wrong(tokens, regions, dim):
    products = []

    def recorded(query, documents):
        products.append(len(query) * min(64, documents.shape[1]) * dim)
        return maxsim_scores(query, documents)

    peer = next(peer for peer in CPU_PEERS if peer.name == "maxsim-cpu")
    work = forward(tokens, regions, dim)
    inputs = make_inputs(work, CPU)
    module = SimpleNamespace(maxsim_scores=recorded)
    scores = peer.call(module, inputs.images, inputs.captions, work.directions)
    assert parity.measure(work, lambda _: scores, inputs)["scores"] < 1e-6
    assert max(products) <= max(LIBXSMM_PRODUCT, 64 * dim)  # a part is one token at least


def test_a_contender_is_looked_up_by_name_and_device(monkeypatch):
    work = forward(5, 7, 16)
    inputs = make_inputs(work, CPU)
    monkeypatch.setitem(
        sys.modules, "late_interaction_kernels", STAND_INS["late-interaction-kernels"]
    )
    call = build("late-interaction-kernels", work, inputs)
    assert parity.measure(work, call, inputs)["scores"] < 1e-6
    with pytest.raises(Unavailable, match="CUDA"):
        build("flash-maxsim", work, inputs)
    for peer in CPU_PEERS:
        with pytest.raises(Unavailable, match="a CPU"):
            peer.load(torch.device("cuda"))
    assert {peer.licence for peer in (*PEERS, *CPU_PEERS)} == {"Apache-2.0"}


def test_a_missing_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxsim_cpu", None)  # as if not installed
    work = forward(5, 7, 16)
    with pytest.raises(Unavailable, match="import fails: ModuleNotFoundError"):
        build("maxsim-cpu", work, make_inputs(work, CPU))


def crash(*_):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_library_that_crashes_takes_down_another_process():
    peer = Peer("crash", "json", "none", crash, device="cpu", native=True)
    with pytest.raises(Unavailable, match="dies of SIGSEGV"):
        cpu_peers.try_elsewhere(peer, 3, 5, 8)


@pytest.mark.parametrize("peer", CPU_PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_scores_as_its_stand_in_does(peer):
    if importlib.util.find_spec(peer.module) is None:
        pytest.skip(f"{peer.name} is not installed (extra: peers-cpu)")
    cpu_peers.limit_native_threads(1)
    work = forward(9, 7, 16)
    inputs = make_inputs(work, CPU)
    call = build(peer.name, work, inputs)
    assert parity.measure(work, call, inputs)["scores"] < 1e-5

"""The peers' adapters: which side is the query, who divides, what masks and offsets become.

Stand-ins with the peers' signatures, made of plain PyTorch, take the place of their kernels.
"""

import importlib.util
import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benchmarks import baselines, parity
from benchmarks.peers import PEERS, Unavailable
from benchmarks.workloads import Workload, make_inputs

CPU = torch.device("cpu")


def maxsim_sum(queries, documents, query_mask=None, document_mask=None):
    """(queries, documents) sums over query tokens of the best document token."""
    similarity = torch.einsum("qtd,nrd->qntr", queries, documents)
    if document_mask is not None:
        similarity = similarity.masked_fill(~document_mask[None, :, None], -torch.inf)
    best = similarity.max(3).values
    return (best if query_mask is None else best * query_mask[:, None]).sum(2)


def maxsim(queries, documents, q_mask=None, d_mask=None):
    return maxsim_sum(queries, documents, q_mask, d_mask)


def maxsim_varlen(queries, documents, cu_q, cu_d, max_q, max_d):
    def items(tokens, offsets, longest):
        assert offsets.dtype == torch.int32
        found = [tokens[start:end] for start, end in pairwise(offsets.tolist())]
        assert max(map(len, found)) <= longest
        return found

    rows = [
        torch.cat([maxsim_sum(q[None], d[None])[0] for d in items(documents, cu_d, max_d)])
        for q in items(queries, cu_q, max_q)
    ]
    return torch.stack(rows)


def flash(queries, documents, doc_lengths=None, query_lengths=None):
    def mask(tokens, lengths):
        if lengths is None:
            return None
        return torch.arange(tokens.shape[1]) < lengths[:, None]

    return maxsim_sum(
        queries, documents, mask(queries, query_lengths), mask(documents, doc_lengths)
    )


STAND_INS = {
    "late-interaction-kernels": SimpleNamespace(maxsim=maxsim, maxsim_varlen=maxsim_varlen),
    "flash-maxsim": SimpleNamespace(flash_maxsim_batched=flash, flash_maxsim_batched_train=flash),
}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("layout", ["full", "padded", "packed"])
@pytest.mark.parametrize("direction", ["text_to_image", "both"])
def test_a_peer_does_the_same_work(peer, layout, direction):
    fill = 1.0 if layout == "full" else 0.55
    work = Workload(
        "maxsim_contrastive_loss", direction, "forward+backward", 4, 4, 9, 7, 16, "float32",
        layout, fill,
    )  # fmt: skip
    inputs = make_inputs(work, CPU)

    def call(own):
        module = STAND_INS[peer.name]
        scores = peer.call(module, own.images, own.captions, work.directions)
        assert set(scores) == set(work.directions)
        return baselines.filip_loss(scores, 1 / 0.07)

    if peer.name == "flash-maxsim" and layout == "packed":
        with pytest.raises(Unavailable, match="packed"):
            call(inputs)
        return
    errors = parity.measure(work, call, inputs)
    assert errors["loss"] < 1e-5 and errors["gradients"] < 1e-4


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_that_can_not_run_says_why(peer):
    with pytest.raises(Unavailable, match="CUDA"):
        peer.load(CPU)
    if importlib.util.find_spec(peer.module) is None:
        with pytest.raises(Unavailable, match="import fails"):
            peer.load(torch.device("cuda"))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_has_the_signatures_that_we_call(peer):
    if importlib.util.find_spec(peer.module) is None:
        pytest.skip(f"{peer.name} is not installed (extra: peers)")
    module = importlib.import_module(peer.module)
    for name, stand_in in vars(STAND_INS[peer.name]).items():
        real = list(inspect.signature(getattr(module, name)).parameters)
        assert real[:2] == ["Q_packed" if "varlen" in name else "Q", real[1]]
        keywords = [
            p for p in inspect.signature(stand_in).parameters if p.endswith(("mask", "lengths"))
        ]
        assert set(keywords) <= set(real)

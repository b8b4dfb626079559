"""The adapters of other people's losses: at equal semantics, with their habits switched off.

Stand-ins with the peers' signatures and habits, made of plain PyTorch, take the place of their
code.
"""

import inspect
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import feature_parity, feature_peers
from benchmarks.feature_peers import CLIP, FEATURE_PEERS, SIGMOID
from benchmarks.feature_workloads import LOGIT_SCALE, FeatureWorkload, Way, make_inputs
from benchmarks.peers import Unavailable, import_peer

CPU = torch.device("cpu")
PEERS = {peer.name: peer for peer in FEATURE_PEERS}


class ClipLoss(torch.nn.Module):
    def forward(self, image_features, text_features, logit_scale, logit_bias=None):
        logits = logit_scale * image_features @ text_features.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class SigLipLoss(torch.nn.Module):
    def __init__(self, chunk_size=0):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(self, image_features, text_features, logit_scale, logit_bias):
        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(labels * logits).sum() / len(logits)


class OldSigLipLoss(SigLipLoss):
    def __init__(self):
        super().__init__()


def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    """One direction, a loss a row; the width of a head is a tile's, a power of two."""
    assert head_dim in (16, 32, 64, 128, 256) and q.shape[1] % head_dim == 0
    assert labels is None
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


class MemoryEfficientCLIPLoss(torch.nn.Module):
    """Normalises and rescales the gradients unless told not to."""

    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        super().__init__()
        assert isinstance(temperature, float)
        self.temperature, self.normalized, self.stable = temperature, normalized_inputs, stable

    def forward(self, image_features, text_features):
        assert self.normalized  # or it does work that the others do not
        loss = ClipLoss()(image_features, text_features, 1 / self.temperature)
        factor = math.sqrt(len(image_features) * self.temperature) if self.stable else 1
        return loss.detach() + factor * (loss - loss.detach())


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, backend="auto"):
    return SigLipLoss()(img_features, txt_features, log_temperature.exp(), bias)


class CachedMultipleNegativesRankingLoss(torch.nn.Module):
    """Some rows of both directions at a time; back-propagates each part at once when asked to."""

    def __init__(
        self, model, scale=20.0, similarity_fct=None, mini_batch_size=32,
        directions=("query_to_doc",), partition_mode="joint",
    ):  # fmt: skip
        super().__init__()
        assert directions == ("query_to_doc", "doc_to_query") and partition_mode == "per_direction"
        assert model[0] is not None  # it looks at the first module of an encoder
        self.scale, self.similarity, self.step = scale, similarity_fct, mini_batch_size

    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        queries, documents = (torch.cat(part) for part in reps)
        total = 0
        for at in range(0, len(queries), self.step):
            part = slice(at, at + self.step)
            rows = self.similarity(queries[part], documents) * self.scale
            columns = self.similarity(queries, documents[part]).T * self.scale
            matched = rows[torch.arange(len(rows)), torch.arange(len(queries))[part]]
            loss = (rows.logsumexp(1) + columns.logsumexp(1)).sum() / 2 - matched.sum()
            loss = loss / len(queries)
            if with_backward:
                loss.backward(retain_graph=True)
                loss = loss.detach()
            total += loss
        return total


STAND_INS = {
    "open_clip": SimpleNamespace(ClipLoss=ClipLoss, SigLipLoss=SigLipLoss),
    "open_clip chunked": SimpleNamespace(SigLipLoss=SigLipLoss),
    "memeff": SimpleNamespace(MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss),
    "siglip-kernel": SimpleNamespace(fused_siglip_loss=fused_siglip_loss),
    "sentence-transformers cached": SimpleNamespace(
        CachedMultipleNegativesRankingLoss=CachedMultipleNegativesRankingLoss
    ),
    "inf-cl": SimpleNamespace(cal_flash_loss=cal_flash_loss),
}


@pytest.mark.parametrize("stage", ["forward+backward", "inference"])
@pytest.mark.parametrize("name, op", [(peer.name, op) for peer in FEATURE_PEERS for op in peer.ops])
def test_a_peer_does_the_same_work(name, op, stage, monkeypatch):
    monkeypatch.setattr(feature_peers, "ROWS", 10)
    work = FeatureWorkload(op, stage, 37, 48, "float32")
    inputs = make_inputs(work, CPU)
    peer = PEERS[name]
    way = Way(peer.make(STAND_INS[name], op, LOGIT_SCALE[op]), peer.trains_scale)
    errors = feature_parity.measure(work, way, inputs)
    expected = {"loss"}
    if stage != "inference":
        expected |= {"gradients"} | ({"parameters"} if peer.trains_scale else set())
    assert set(errors) == expected
    assert max(errors.values()) < 1e-5


def test_gradients_found_in_the_forward_are_multiplied_in_the_backward():
    work = FeatureWorkload(CLIP, "forward+backward", 9, 16, "float32")
    images, texts, scale, bias = make_inputs(work, CPU)
    name = "sentence-transformers cached"
    loss = PEERS[name].make(STAND_INS[name], CLIP, 100.0)
    plain, tripled = (
        torch.autograd.grad(factor * loss(images, texts, scale, bias), (images, texts))
        for factor in (1, 3)
    )
    for one, three in zip(plain, tripled, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_an_open_clip_without_chunks_says_so():
    with pytest.raises(Unavailable, match="chunk_size"):
        PEERS["open_clip chunked"].make(SimpleNamespace(SigLipLoss=OldSigLipLoss), SIGMOID, 10.0)


@pytest.mark.parametrize("peer", FEATURE_PEERS, ids=lambda peer: peer.name)
def test_a_peer_that_can_not_run_says_why(peer, monkeypatch):
    top = peer.module.partition(".")[0]
    for name in [name for name in sys.modules if name.startswith(f"{top}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, top, None)  # as if it were not installed
    with pytest.raises(Unavailable, match="import fails"):
        peer.load(peer.ops[0], 10.0, torch.device("cuda"))
    if "cpu" not in peer.devices:
        with pytest.raises(Unavailable, match="CUDA"):
            peer.load(peer.ops[0], 10.0, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("peer", FEATURE_PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_has_the_signatures_that_we_call(peer):
    if peer.version() is None:
        pytest.skip(f"{peer.package} is not installed")
    try:
        module = import_peer(peer.module)
    except Unavailable as error:
        pytest.skip(str(error))
    for name, stand_in in vars(STAND_INS[peer.name]).items():
        real = getattr(module, name)
        pairs = [(stand_in, real)]
        if inspect.isclass(stand_in):
            methods = ("__init__", "forward", "calculate_loss")
            pairs = [(vars(stand_in)[m], getattr(real, m)) for m in methods if m in vars(stand_in)]
        for ours, theirs in pairs:
            given, found = (set(inspect.signature(it).parameters) for it in (ours, theirs))
            assert given - {"chunk_size"} <= found  # open_clip says so itself, see above

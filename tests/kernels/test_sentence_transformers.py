"""Patched sentence-transformers losses train as unpatched, and come back exactly."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from fastgoal_kernels.integrations import sentence_transformers as ours

STEPS, BATCH, VOCABULARY, WORDS, DIM = 20, 7, 32, 5, 8
BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    ours.unpatch_sentence_transformers()


@pytest.fixture
def losses():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    return losses


class Tower(nn.Module):
    """The mean of random word vectors through two layers, with dropout for GradCache to repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.Sequential(nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, DIM))

    def forward(self, features):
        embedding = self.layers(self.words(features["input_ids"]).mean(dim=1))
        return features | {"sentence_embedding": embedding}


def tiny_model():
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(0)  # the weights, and after them the dropout
    return SentenceTransformer(modules=[Tower()], device="cpu")


def batches(columns: int):
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield [
            {
                "input_ids": torch.randint(VOCABULARY, (BATCH, WORDS), generator=generator),
                "attention_mask": torch.ones(BATCH, WORDS, dtype=torch.int64),
            }
            for _ in range(columns)
        ]


def train(loss_class, columns: int, **options) -> list[float]:
    model = tiny_model().train()
    loss_of = loss_class(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for features in batches(columns):
        loss = loss_of(features, labels=None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def assert_trains_alike(loss_class, columns: int, fused: str, calls: int, **options) -> None:
    plain = train(loss_class, columns, **options)
    ours.patch_sentence_transformers()
    with mock.patch.object(ours, fused, wraps=getattr(ours, fused)) as spy:
        patched = train(loss_class, columns, **options)
    assert spy.call_count == calls
    # Float32 sums in another order, through 20 steps of feedback.
    assert patched == pytest.approx(plain, rel=1e-5)
    assert max(plain) - min(plain) > 1e-2, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)
@pytest.mark.parametrize(
    "columns, fused, calls, options",
    [
        (2, "row_cross_entropy", STEPS, {}),
        (4, "row_cross_entropy", STEPS, {"scale": 7.0}),  # two hard negatives
        (2, "clip_contrastive_loss", STEPS, BOTH_WAYS),
        (3, "row_cross_entropy", 2 * STEPS, BOTH_WAYS),
        (2, "row_cross_entropy", STEPS, {"similarity_fct": "dot_score", "scale": 1.0}),
        (2, "row_cross_entropy", STEPS, {"hardness_mode": "hard_negatives"}),  # of strength 0
    ],
)
def test_trains_alike(losses, name, columns, fused, calls, options):
    from sentence_transformers import util

    if "similarity_fct" in options:
        options = options | {"similarity_fct": getattr(util, options["similarity_fct"])}
    if name.startswith("Cached"):
        options = options | {"mini_batch_size": 3}
    assert_trains_alike(getattr(losses, name), columns, fused, calls, **options)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"]
)
def test_symmetric_losses_train_alike(losses, name):
    assert_trains_alike(getattr(losses, name), 2, "clip_contrastive_loss", STEPS)


@pytest.mark.parametrize(
    "name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)
def test_matryoshka_around_it_trains_alike(losses, name):
    def matryoshka(model):
        inner = getattr(losses, name)(model)
        return losses.MatryoshkaLoss(model, inner, matryoshka_dims=[DIM, 4])

    assert_trains_alike(matryoshka, 2, "row_cross_entropy", 2 * STEPS)


@pytest.mark.parametrize("name", ["Plain", "Cached"])
@pytest.mark.parametrize("options", [{}, BOTH_WAYS])
def test_gathered_across_devices(losses, monkeypatch, name, options):
    """As process 1 of 2 sees it: its own embeddings come second."""
    from sentence_transformers import util

    generator = torch.Generator().manual_seed(4)
    others = [torch.randn(BATCH, DIM, generator=generator) for _ in range(3)]
    columns = [torch.randn(BATCH, DIM, generator=generator) for _ in range(3)]

    def results():
        own = [x.clone().requires_grad_() for x in columns]
        waiting = iter(others)

        def gather(tensor):
            return torch.cat([next(waiting), tensor])

        modules = [util, *(m for n, m in sys.modules.items() if "negatives_ranking" in n)]
        for module in modules:
            if hasattr(module, "all_gather_with_grad"):
                monkeypatch.setattr(module, "all_gather_with_grad", gather)
            if hasattr(module, "get_rank"):
                monkeypatch.setattr(module, "get_rank", lambda: 1)
            if hasattr(module, "is_dist_initialized"):
                monkeypatch.setattr(module, "is_dist_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        # Dot products: what is gathered is then the embeddings themselves, normalised or not.
        common = {"gather_across_devices": True, "similarity_fct": util.dot_score, "scale": 0.5}
        if name == "Plain":
            loss_of = losses.MultipleNegativesRankingLoss(tiny_model(), **common, **options)
            loss = loss_of.compute_loss_from_embeddings(own, None)
        else:
            loss_of = losses.CachedMultipleNegativesRankingLoss(
                tiny_model(), mini_batch_size=3, **common, **options
            )
            loss = loss_of.calculate_loss([list(x.split(3)) for x in own])
        loss.backward()
        return [loss.detach(), *(x.grad for x in own)]

    plain = results()
    ours.patch_sentence_transformers()
    for got, want in zip(results(), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_evaluation_needs_no_gradients(losses):
    features = next(batches(2))
    values = []
    for change in (ours.unpatch_sentence_transformers, ours.patch_sentence_transformers):
        change()
        model = tiny_model().eval()
        loss_of = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
        with torch.no_grad():
            values.append(loss_of(features, labels=None).item())
    assert values[1] == pytest.approx(values[0], rel=1e-6)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"directions": ("query_to_doc", "doc_to_query")}, "partition_mode='joint'"),
        ({"directions": ("query_to_doc", "query_to_query")}, "query_to_query"),
        ({"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}, "in_batch_negatives"),
        ({"similarity_fct": torch.cdist}, "similarity_fct must be cos_sim or dot_score"),
    ],
)
def test_what_is_not_fused_is_refused_by_name(losses, options, named):
    loss_of = losses.MultipleNegativesRankingLoss(tiny_model(), **options)
    features = next(batches(2))
    ours.patch_sentence_transformers()
    with pytest.raises(NotImplementedError, match=named):
        loss_of(features, labels=None)
    ours.unpatch_sentence_transformers()
    assert loss_of(features, labels=None).isfinite()


def test_it_is_patched_once_and_restored(losses):
    classes = (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss)
    methods = ("compute_loss_from_embeddings", "calculate_loss")

    def current():
        return [vars(owner)[method] for owner, method in zip(classes, methods, strict=True)]

    originals = current()
    ours.patch_sentence_transformers()
    patched = current()
    assert all(now is not before for now, before in zip(patched, originals, strict=True))
    ours.patch_sentence_transformers()
    assert current() == patched
    for _ in range(2):
        ours.unpatch_sentence_transformers()
        assert current() == originals


@pytest.mark.parametrize(
    "present, message",
    [((), "is not installed"), (("sentence_transformers",), "5.4 or newer")],
)
def test_a_package_that_is_missing_or_old_is_named(present, message):
    def find_spec(name):
        return object() if name in present else None

    with mock.patch("importlib.util.find_spec", find_spec), pytest.raises(ImportError) as raised:
        ours.patch_sentence_transformers()
    assert message in str(raised.value)


def test_importing_it_does_not_import_the_package():
    code = (
        "import sys, fastgoal_kernels.integrations.sentence_transformers;"
        "assert not {'sentence_transformers', 'transformers'} & set(sys.modules)"
    )
    search = f"import sys; sys.path[:] = {sys.path!r}; "
    done = subprocess.run([sys.executable, "-c", search + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The best matches by FLAIR's and by CAFT's scores: every block and device against all pairs.

A CUDA device joins where there is one; elsewhere the meta device stands in for it where only the
way of the tensors is at stake: what mixes it with the CPU is an error there.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgoal_kernels import (
    TextConditionedPool,
    hierarchical_scores,
    hierarchical_topk,
    reference,
    text_conditioned_topk,
)
from fastgoal_kernels.functional import text_conditioned_retrieval as retrieval
from fastgoal_kernels.functional import token_blocks
from fastgoal_kernels.functional.token_blocks import Rows

# (where the images are, where the captions are, where to score) that run on this machine.
PLACES = [("cpu", "cpu", "cpu")]
if torch.cuda.is_available():
    PLACES += [("cuda", "cuda", "cuda"), ("cpu", "cuda", "cuda"), ("cuda", "cpu", "cuda"),
               ("cpu", "cpu", "cuda")]  # fmt: skip
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def randn(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device)


def random_pool(dim: int, heads: int, device: str = "cpu") -> TextConditionedPool:
    pool = TextConditionedPool(dim, heads).to(device, torch.float64)
    with torch.no_grad():
        for parameter in pool.parameters():  # also the biases and gains that start at 0 and 1
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return pool


def small_blocks(monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    monkeypatch.setattr(token_blocks, "_BLOCK_ITEMS", items)


def assert_same(got: Any, expected: Any) -> None:
    """The same order; float64 values to a thousand roundings."""
    for (values, indices), (want, want_indices) in zip(got, expected, strict=True):
        scale = max([1e-3, *want[want.isfinite()].abs().flatten().tolist()])
        torch.testing.assert_close(
            values.cpu(), want.detach().cpu(), rtol=0, atol=1e-11 * scale, equal_nan=True
        )
        assert torch.equal(indices.cpu(), want_indices.cpu())
        assert not values.requires_grad


# ---------------------------------------------------------------------------------------------
# FLAIR's scores
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("home", "text_home", "device"), PLACES)
@pytest.mark.parametrize("shape", [(5, 9, 4), (3, 2, 0), (0, 4, 2), (4, 0, 2)])
@pytest.mark.parametrize("items", [1, 2, 1 << 11])
def test_topk_is_the_reference(home, text_home, device, shape, items, monkeypatch):
    torch.manual_seed(12)
    small_blocks(monkeypatch, items)
    images, texts, length = shape
    pool = random_pool(6, 2, device)
    tokens, text = randn(images, length, 6, device=home), randn(texts, 6, device=text_home)
    mask = torch.rand(images, length).to(home) < 0.7
    got = text_conditioned_topk(pool, tokens, text, 3, image_mask=mask, device=device)
    expected = reference.topk(
        reference.text_conditioned_scores(
            tokens.to(device), text.to(device), pool.weights(), 2, image_mask=mask.to(device)
        ),
        3,
    )
    assert_same(got, expected)
    assert all(x.device.type == device for x in tree_leaves(got))


def test_a_nan_ranks_first_and_is_no_index_error():
    torch.manual_seed(5)
    pool, tokens, text = random_pool(6, 2), randn(2, 4, 6), randn(3, 6)
    tokens[0, 1, 2] = torch.nan
    text[1, 0] = torch.nan
    (values, indices), _ = text_conditioned_topk(pool, tokens, text, 2)
    assert values.isnan().tolist() == [[True, True], [True, False]]
    assert ((indices >= 0) & (indices < 3)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_topk_compiles_whole_and_once(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pool = random_pool(8, 2, device)
    compiled = torch.compile(
        lambda tokens, text: text_conditioned_topk(pool, tokens, text, 2),
        backend=counter, fullgraph=True,
    )  # fmt: skip
    counts = []
    for images, texts in ((3, 4), (5, 7), (6, 4), (8, 9)):
        tokens, text = randn(images, 5, 8, device=device), randn(texts, 8, device=device)
        got, expected = compiled(tokens, text), text_conditioned_topk(pool, tokens, text, 2)
        for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert len(set(counts[1:])) == 1, counts  # the second call makes the sizes dynamic


# ---------------------------------------------------------------------------------------------
# CAFT's scores
# ---------------------------------------------------------------------------------------------

SCALES = {
    "logit_scale": 7.0, "logit_bias": -3.0, "whole_logit_scale": torch.tensor(5.0),
    "whole_logit_bias": torch.tensor(-2.0),
}  # fmt: skip


def make_corpus(images: int, texts: int, parts: int = 4, length: int = 3) -> dict[str, Tensor]:
    return {
        "fine_tokens": randn(images, length, 6),
        "part_features": randn(texts, parts, 6),
        "whole_image_features": randn(images, 5),
        "whole_text_features": randn(texts, 5),
    }


def plain_formula(pool: TextConditionedPool, corpus: dict[str, Tensor], alpha: float) -> Tensor:
    """CAFT's blended score from its description, one pair at a time, by the pool's own forward."""
    fine, parts = corpus["fine_tokens"], corpus["part_features"]
    scores = torch.zeros(len(fine), len(parts), dtype=torch.float64)
    for i in range(len(fine)):
        for j in range(len(parts)):
            cosine = nn.functional.cosine_similarity(
                corpus["whole_image_features"][i], corpus["whole_text_features"][j], dim=0
            )
            whole = 5.0 * cosine - 2.0
            part = 0.0
            for feature in parts[j]:
                query = (feature / feature.norm())[None, None]
                pooled = pool(query, fine[i : i + 1], fine[i : i + 1])[0, 0]
                part += 7.0 * nn.functional.cosine_similarity(pooled, feature, dim=0) - 3.0
            scores[i, j] = (1 - alpha) * whole + alpha * part / parts.shape[1]
    return scores.detach()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hierarchical_scores_are_the_plain_formula(backend, alpha):
    torch.manual_seed(1)
    pool, corpus = random_pool(6, 2), make_corpus(3, 5)
    got = hierarchical_scores(pool, **corpus, **SCALES, alpha=alpha, backend=backend)
    expected = plain_formula(pool, corpus, alpha)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    definition = reference.hierarchical_scores(
        **corpus, **SCALES, weights=pool.weights(), num_heads=2, alpha=alpha
    )
    torch.testing.assert_close(definition, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("home", "text_home", "device"), PLACES)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), images=st.integers(0, 5), texts=st.integers(0, 7),
    parts=st.integers(1, 3), k=st.integers(1, 8), shortlist=st.none() | st.integers(1, 8),
    masked=st.booleans(), items=st.integers(1, 4), size=st.sampled_from([1, 5000, 1 << 20]),
    listed=st.sampled_from([1, 6, 1 << 22]),
)  # fmt: skip
def test_hierarchical_topk_is_the_reference_whatever_the_blocks(
    home, text_home, device, seed, images, texts, parts, k, shortlist, masked, items, size, listed
):
    torch.manual_seed(seed)
    pool, corpus = random_pool(6, 2, device), make_corpus(images, texts, parts)
    mask = torch.rand(images, 3) < 0.6 if masked else None
    expected = reference.topk(
        reference.hierarchical_scores(
            **{name: x.to(device) for name, x in corpus.items()}, **SCALES,
            weights=pool.weights(), num_heads=2, shortlist=shortlist,
            image_mask=None if mask is None else mask.to(device),
        ),
        k,
    )  # fmt: skip
    homes = (home, text_home, home, text_home)
    corpus = {name: x.to(at) for (name, x), at in zip(corpus.items(), homes, strict=True)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, items)
        monkeypatch.setattr(token_blocks, "_BLOCK_BYTES", size)
        monkeypatch.setattr(retrieval, "_LISTED", listed)
        got = hierarchical_topk(
            pool, **corpus, **SCALES, k=k, shortlist=shortlist, device=device,
            image_mask=None if mask is None else mask.to(home),
        )  # fmt: skip
    assert_same(got, expected)


def test_a_shortlist_scores_no_other_pair(monkeypatch):
    """16 texts an image of 64: the parts of the others are never pooled."""
    torch.manual_seed(3)
    scored = []
    original = retrieval.pool_scores

    def counting(*args: Any, text_index: Tensor, **kw: Any):
        scored.append(text_index.numel())
        return original(*args, text_index=text_index, **kw)

    monkeypatch.setattr(retrieval, "pool_scores", counting)
    hierarchical_topk(random_pool(6, 2), **make_corpus(9, 64), **SCALES, k=3, shortlist=16)
    assert scored == [9 * 16 * 4]
    # However the lists are cut: nothing is padded.
    for size, calls in ((1 << 17, 2), (1 << 13, 36)):
        scored.clear()
        monkeypatch.setattr(token_blocks, "_BLOCK_BYTES", size)
        hierarchical_topk(random_pool(6, 2), **make_corpus(9, 64), **SCALES, k=3, shortlist=16)
        assert sum(scored) == 9 * 16 * 4 and len(scored) == calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_only_the_inputs_are_rounded(device, dtype):
    """Whole logits of scale 100 that differ by less than half precision would see."""
    torch.manual_seed(6)
    pool = TextConditionedPool(16, 2).to(device)
    tokens, parts = (torch.randn(*s, 16, device=device) for s in ((4, 3), (50, 2)))
    centre = torch.randn(1, 8, device=device)
    wholes = [centre + 0.1 * torch.randn(n, 8, device=device) for n in (4, 50)]
    logits = 14.0, -10.0, 100.0, -10.0

    def all_scores(tokens, parts, images, texts, alpha) -> list[Tensor]:
        corpus = pool, tokens, parts, images, texts, *logits
        return tree_leaves([
            hierarchical_scores(*corpus, alpha=alpha),
            hierarchical_topk(*corpus, 5, alpha=alpha),
            hierarchical_topk(*corpus, 5, alpha=alpha, shortlist=7),
            text_conditioned_topk(pool, tokens, parts[:, 0], 5),
        ])  # fmt: skip

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    with torch.autocast(device, dtype):
        got = all_scores(tokens, parts, *wholes, 0.0)
        blend = hierarchical_scores(pool, tokens, parts, *wholes, *logits)
        (values, _), _ = text_conditioned_topk(pool, tokens, parts[:, 0], 5)
    expected = all_scores(tokens, parts, *map(rounded, wholes), 0.0)[:9]
    for ours, wanted in zip(got, expected, strict=False):
        assert ours.dtype == wanted.dtype and ours.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)
    # The parts, which are of unit length first: half precision of a cosine times 14 * 0.3.
    unit = rounded(reference.l2_normalize(parts))
    wanted = hierarchical_scores(pool, rounded(tokens), unit, *map(rounded, wholes), *logits)
    assert blend.dtype == values.dtype == torch.float32
    error = 0.02 if device == "cpu" else 0.1  # where the products are in half precision as well
    torch.testing.assert_close(blend, wanted, rtol=0, atol=error)
    features = rounded(tokens), rounded(parts[:, 0])
    (wanted, _), _ = text_conditioned_topk(pool, *features, 5)
    torch.testing.assert_close(values, wanted, rtol=0, atol=error)


@pytest.mark.parametrize(
    ("op", "dtype", "shortlist"),
    [
        ("text_conditioned_topk", torch.bfloat16, None),
        ("text_conditioned_topk", torch.float32, None),
        ("hierarchical_topk", torch.bfloat16, None),
        ("hierarchical_topk", torch.float32, None),
        ("hierarchical_topk", torch.bfloat16, 16),
        ("hierarchical_topk", torch.bfloat16, 500),
    ],
)
def test_memory_is_that_of_a_block_of_each_side(op, dtype, shortlist, monkeypatch):
    """And of the scores of a block and of what the engine works in, which are small beside it."""
    from benchmarks.measure import measure_memory

    block = 8 << 20
    monkeypatch.setattr(token_blocks, "_BLOCK_BYTES", block)
    small = dict.fromkeys(("cpu", "cuda"), 1 << 14)
    monkeypatch.setattr("fastgoal_kernels.ops.text_conditioned_torch._BLOCK_ELEMENTS", small)
    pool, images, texts = TextConditionedPool(128, 2).to(dtype), 600, 1200
    tokens = torch.randn(images, 32, 128).to(dtype)
    parts = torch.randn(texts, 16, 128).to(dtype)
    logits = 14.0, -10.0, 100.0, -10.0
    if op == "text_conditioned_topk":
        call = functools.partial(text_conditioned_topk, pool, tokens, parts[:, 0], 5)
    else:  # few tokens, so that the captions are what fills memory
        tokens = tokens[:40, :2] if shortlist == 16 else tokens[:8]
        wholes = (torch.randn(n, 8).to(dtype) for n in (len(tokens), texts))
        corpus = pool, tokens, parts, *wholes, *logits
        call = functools.partial(hierarchical_topk, *corpus, 5, shortlist=shortlist)
    extra = measure_memory(call, torch.device("cpu"))
    assert block / 2 < extra < 3 / 2 * block


def test_a_corpus_of_any_size_takes_no_more_memory(monkeypatch):
    """With a shortlist that grows with it, too."""
    from benchmarks.measure import measure_memory

    monkeypatch.setattr(token_blocks, "_BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(retrieval, "_LISTED", 1 << 12)
    pool, logits = TextConditionedPool(64, 2), (14.0, -10.0, 100.0, -10.0)
    extra = []
    for texts in (2000, 8000):
        tokens, wholes = torch.randn(8, 4, 64), (torch.randn(8, 16), torch.randn(texts, 16))
        corpus = pool, tokens, torch.randn(texts, 4, 64), *wholes, *logits
        for shortlist in (None, 16, texts // 2):
            extra.append(measure_memory(
                lambda c=corpus, s=shortlist: hierarchical_topk(*c, 3, shortlist=s),
                torch.device("cpu"),
            ))  # fmt: skip
    small, large = extra[:3], extra[3:]
    # A list of half the captions is a row of 32,000 bytes, several times over.
    assert all(b < 1.2 * a + (1 << 19) for a, b in zip(small, large, strict=True)), extra


def test_the_scores_have_gradients():
    torch.manual_seed(4)
    pool, corpus = random_pool(6, 2), make_corpus(2, 3, parts=2)
    inputs = [x.requires_grad_() for x in corpus.values()] + list(pool.parameters())
    ours, wanted = (
        torch.autograd.grad(
            hierarchical_scores(pool, **corpus, **SCALES, backend=backend).square().sum(), inputs
        )
        for backend in ("torch", "reference")
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rows_travel_whole_and_in_order():
    rows = Rows({"fine_tokens": torch.zeros(5, 2, 3), "image_mask": None})
    assert rows.items == 5 and rows.device == torch.device("cpu")
    block = rows.on(torch.device("meta"), slice(1, 3))
    assert block["image_mask"] is None
    assert block["fine_tokens"].shape == (2, 2, 3) and block["fine_tokens"].is_meta


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

BAD = [
    ({"k": 0}, "k must be an int of at least 1; got 0"),
    ({"shortlist": 0}, "shortlist must be None or an int of at least 1; got 0"),
    ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]; got 1.5"),
    ({"part_features": torch.zeros(3, 6)}, r"part_features must have shape \(num_texts, parts, d"),
    ({"part_features": torch.zeros(3, 0, 6)}, "must hold at least one part"),
    ({"part_features": torch.zeros(3, 4, 5)}, "same last dimension; got 6 and 5"),
    ({"whole_image_features": torch.zeros(3, 5)}, r"a row for each of the 2 items of fine_tokens"),
    ({"whole_text_features": torch.zeros(3, 4)}, "same last dimension; got 5 and 4"),
    ({"image_mask": torch.ones(2, 4) > 0}, r"image_mask has shape \(2, 4\)"),
    ({"logit_scale": torch.ones(2)}, "logit_scale must be a float or a 0-dim tensor"),
    ({"device": "gpu"}, "device must be one that is there"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_named(change, message):
    good: dict[str, Any] = {
        "pool": TextConditionedPool(6, 2), "fine_tokens": torch.ones(2, 3, 6),
        "part_features": torch.ones(3, 4, 6), "whole_image_features": torch.ones(2, 5),
        "whole_text_features": torch.ones(3, 5), "k": 1, **SCALES,
    }  # fmt: skip
    hierarchical_topk(**good)
    with pytest.raises(ValueError, match=message):
        hierarchical_topk(**good | change)


def test_bad_input_of_text_conditioned_topk_is_named():
    pool, tokens, text = TextConditionedPool(8, 2), torch.ones(2, 3, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="k must be an int of at least 1; got 0"):
        text_conditioned_topk(pool, tokens, text, 0)
    with pytest.raises(ValueError, match="same last dimension; got 8 and 6"):
        text_conditioned_topk(pool, tokens, text[:, :6], 1)
    with pytest.raises(ValueError, match=r"image_mask has shape \(2, 4\)"):
        text_conditioned_topk(pool, tokens, text, 1, image_mask=torch.ones(2, 4) > 0)
    with pytest.raises(TypeError, match="pool must be a TextConditionedPool"):
        text_conditioned_topk(nn.Linear(8, 8), tokens, text, 1)

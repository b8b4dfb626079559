"""Text-conditioned pooling: scores and sigmoid loss of the torch backend.

Against `reference.py` and against the published loss restated with nn.MultiheadAttention, in
float64; and at the edges: masks, empty batches, zero vectors, ties, half precision, autocast,
compilation, memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgoal_kernels import hierarchical_scores, reference, text_conditioned_topk
from fastgoal_kernels.functional import text_conditioned as functional
from fastgoal_kernels.functional.text_conditioned import (
    text_conditioned_loss_from_weights,
    text_conditioned_scores,
    text_conditioned_sigmoid_loss,
)
from fastgoal_kernels.modules import TextConditionedPool
from fastgoal_kernels.ops import text_conditioned as ops
from fastgoal_kernels.ops import text_conditioned_loss_torch as loss_engine
from fastgoal_kernels.ops import text_conditioned_torch as engine
from fastgoal_kernels.ops.text_conditioned_loss import (
    text_conditioned_loss,
    text_conditioned_loss_backward,
)
from fastgoal_kernels.ops.text_conditioned_pool import Need, Pool

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
seeds = st.integers(0, 2**31)


def random_pool(dim: int, heads: int, device: str = "cpu", dtype=torch.float64, zero=True):
    pool = TextConditionedPool(dim, heads, add_zero_attn=zero).to(device, dtype)
    with torch.no_grad():
        for parameter in pool.parameters():  # also the biases and gains that start at 0 and 1
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return pool


def randn(*shape: int, device: str = "cpu", dtype=torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Float64, relative to the largest entry: a thousand roundings at most, so 1e-11 is ample."""
    scale = max(float(expected.detach().abs().max()), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * scale)


def assert_same_with_gradients(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    assert_close(one, other)
    weight = torch.randn(one.shape, dtype=torch.float64).to(one.device)
    gradients = (
        torch.autograd.grad((loss * weight).sum(), inputs, materialize_grads=True)
        for loss in (one, other)
    )
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


@pytest.fixture(params=[1, 40, 1 << 30], ids=["pair by pair", "small blocks", "one block"])
def block_elements(request, monkeypatch) -> int:
    """How much of the pairs is computed at once must not matter."""
    monkeypatch.setattr(engine, "_BLOCK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), request.param))
    return request.param


# ---------------------------------------------------------------------------------------------
# Against the reference
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    seed=seeds, images=st.integers(0, 4), texts=st.integers(0, 6), tokens=st.integers(0, 5),
    heads=st.sampled_from([1, 2, 3]), head_dim=st.sampled_from([1, 3]), zero=st.booleans(),
    masked=st.booleans(), columns=st.none() | st.integers(0, 5),
    budget=st.sampled_from([1, 30, 100, 1 << 20]),
)  # fmt: skip
def test_scores_are_the_reference(
    device, seed, images, texts, tokens, heads, head_dim, zero, masked, columns, budget
):
    torch.manual_seed(seed)
    dim = heads * head_dim
    pool = random_pool(dim, heads, device, zero=zero)
    image_tokens, text = (randn(*s, dim, device=device, grad=True) for s in
                          ((images, tokens), (texts,)))  # fmt: skip
    keywords = {}
    if masked:
        keywords["image_mask"] = torch.rand(images, tokens, device=device) < 0.6
    if columns is not None:
        keywords["text_index"] = torch.randint(
            0, max(texts, 1), (images, columns if texts else 0), device=device
        )
    before = engine._BLOCK_ELEMENTS
    engine._BLOCK_ELEMENTS = dict.fromkeys(("cpu", "cuda"), budget)
    try:
        assert_same_with_gradients(
            pool.scores(image_tokens, text, **keywords),
            pool.scores(image_tokens, text, **keywords, backend="reference"),
            [image_tokens, text, *pool.parameters()],
        )
    finally:
        engine._BLOCK_ELEMENTS = before


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(
    seed=seeds, images=st.integers(0, 4), captions=st.integers(1, 3), sample=st.booleans(),
    negative_only=st.booleans(), masked=st.booleans(), scalars=st.booleans(),
)  # fmt: skip
def test_loss_is_the_reference(
    device, seed, images, captions, sample, negative_only, masked, scalars
):
    torch.manual_seed(seed)
    pool = random_pool(6, 2, device)
    image_tokens = randn(images, 4, 6, device=device, grad=True)
    text = randn(images * captions, 6, device=device, grad=True)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -2.0))
    keywords: dict = {"captions_per_image": captions, "negative_only": negative_only}
    if masked:
        keywords["image_mask"] = torch.rand(images, 4, device=device) < 0.6
    if sample:
        shape = images, max(images - 1, 0)
        keywords["negative_offsets"] = torch.randint(0, captions, shape, device=device)
        keywords["negatives"] = "sample"
    inputs = [image_tokens, text, *pool.parameters(), *(() if scalars else (scale, bias))]
    arguments = pool, image_tokens, text, *((3.0, -2.0) if scalars else (scale, bias))
    assert_same_with_gradients(
        text_conditioned_sigmoid_loss(*arguments, **keywords),
        text_conditioned_sigmoid_loss(*arguments, **keywords, backend="reference"),
        inputs,
    )


# ---------------------------------------------------------------------------------------------
# Against the published loss
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "length", "captions"),
    [(16, 32, 65, 513), (1, 128, 576, 129), (3, 48, 63, 130), (4, 96, 1, 3)],
)
def test_sizes_of_models(device, heads, head_dim, length, captions):
    """Scores and loss at the widths, tokens and captions that people have."""
    torch.manual_seed(3)
    dim = heads * head_dim
    pool = random_pool(dim, heads, device)
    tokens = randn(3, length, dim, device=device, grad=True)
    text = randn(captions, dim, device=device, grad=True)
    mask = torch.rand(3, length, device=device) < 0.7
    mask[1] = False
    inputs = [tokens, text, *pool.parameters()]
    ours, wanted = (
        pool.scores(tokens, text, image_mask=mask, backend=backend)
        for backend in (None, "reference")
    )
    assert_same_with_gradients(ours, wanted, inputs)
    captions_per_image = captions // 3
    ours, wanted = (
        text_conditioned_sigmoid_loss(
            pool, tokens, text[: 3 * captions_per_image], 10.0, -1.0, image_mask=mask,
            captions_per_image=captions_per_image, backend=backend,
        )
        for backend in (None, "reference")
    )  # fmt: skip
    assert_same_with_gradients(ours, wanted, inputs)


def published_loss(
    pool: TextConditionedPool, image_tokens: Tensor, text: Tensor, scale: Tensor, bias: Tensor,
    captions: int, offsets: Tensor,
) -> Tensor:  # fmt: skip
    """FLAIR's step in plain PyTorch, image by image: own captions, and one of each other image."""
    num_images = len(image_tokens)
    columns = captions + num_images - 1
    total = text.new_zeros(())
    for i in range(num_images):
        others = [j for j in range(num_images) if j != i]
        own = [i * captions + c for c in range(captions)]
        drawn = [j * captions + int(o) for j, o in zip(others, offsets[i], strict=True)]
        queries = text[own + drawn]  # (columns, D)
        tokens = image_tokens[i]
        pooled, _ = pool.attn(
            pool.ln_q(queries)[:, None],
            pool.ln_k(tokens).expand(columns, -1, -1),
            pool.ln_v(tokens).expand(columns, -1, -1),
            need_weights=False,
        )
        logits = scale * F.cosine_similarity(pooled[:, 0], queries, dim=1, eps=1e-12) + bias
        labels = torch.full((columns,), -1.0, dtype=text.dtype)
        labels[:captions] = 1
        total = total - F.logsigmoid(labels * logits).sum()
    return total / columns


def test_sampled_loss_is_the_published_one():
    torch.manual_seed(0)
    images, captions, dim = 5, 3, 8
    pool = random_pool(dim, 2)
    assert isinstance(pool.attn, nn.MultiheadAttention) and pool.attn.add_zero_attn
    image_tokens, text = randn(images, 6, dim, grad=True), randn(images * captions, dim, grad=True)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -3.0))
    offsets = torch.randint(0, captions, (images, images - 1))
    inputs = [image_tokens, text, scale, bias, *pool.parameters()]
    ours = text_conditioned_sigmoid_loss(
        pool, image_tokens, text, scale, bias, captions_per_image=captions, negatives="sample",
        negative_offsets=offsets,
    )  # fmt: skip
    published = published_loss(pool, image_tokens, text, scale, bias, captions, offsets)
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(published, inputs), strict=True
    ):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("negative_only", [False, True])
def test_sampled_loss_is_the_dense_one_restricted_to_its_columns(negative_only):
    torch.manual_seed(1)
    images, captions, dim = 4, 3, 6
    pool = random_pool(dim, 3)
    image_tokens, text = randn(images, 5, dim), randn(images * captions, dim)
    offsets = torch.randint(0, captions, (images, images - 1))
    sampled = text_conditioned_sigmoid_loss(
        pool, image_tokens, text, 5.0, -1.0, captions_per_image=captions, negatives="sample",
        negative_offsets=offsets, negative_only=negative_only,
    )  # fmt: skip
    logits = 5.0 * pool.scores(image_tokens, text) - 1.0
    total, columns = 0.0, captions + images - 1
    for i in range(images):
        offset = iter(offsets[i].tolist())
        for j in range(images):
            mine = i == j
            for c in range(captions) if mine else [next(offset)]:
                sign = 1 if mine and not negative_only else -1
                total -= F.logsigmoid(sign * logits[i, j * captions + c]).item()
    assert sampled.item() == pytest.approx(total / columns, rel=1e-12)


def test_offsets_are_drawn_from_the_generator():
    torch.manual_seed(2)
    pool, image_tokens, text = random_pool(6, 2), randn(5, 3, 6), randn(20, 6)

    def loss(**keywords) -> float:
        return text_conditioned_sigmoid_loss(
            pool, image_tokens, text, 5.0, -1.0, captions_per_image=4, negatives="sample",
            **keywords,
        ).item()  # fmt: skip

    drawn = loss(generator=torch.Generator().manual_seed(3))
    offsets = torch.randint(4, (5, 4), generator=torch.Generator().manual_seed(3))
    assert drawn == loss(generator=torch.Generator().manual_seed(3))
    assert drawn == loss(negative_offsets=offsets)
    assert drawn != loss(generator=torch.Generator().manual_seed(4))
    before = torch.get_rng_state()
    loss(generator=torch.Generator())
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------
# Blocks and memory
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_blocks_do_not_change_the_loss(sample, block_elements):
    torch.manual_seed(3)
    pool = random_pool(8, 2)
    image_tokens, text = randn(4, 5, 8, grad=True), randn(12, 8, grad=True)
    keywords: dict = {"captions_per_image": 3, "image_mask": torch.rand(4, 5) < 0.7}
    if sample:
        keywords |= {"negatives": "sample", "negative_offsets": torch.randint(0, 3, (4, 3))}
    assert_same_with_gradients(
        text_conditioned_sigmoid_loss(pool, image_tokens, text, 5.0, -1.0, **keywords),
        text_conditioned_sigmoid_loss(
            pool, image_tokens, text, 5.0, -1.0, **keywords, backend="reference"
        ),
        [image_tokens, text, *pool.parameters()],
    )


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made while it is on has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view with stride 0 (expand) holds nothing.
            if isinstance(leaf, Tensor) and 0 not in leaf.stride():
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("sample", [False, True])
def test_nothing_of_size_images_x_captions_x_dim_exists(sample):
    """Inside the operators too, whose insides a dispatch mode around the call does not see."""
    torch.manual_seed(4)
    images, captions, dim, heads = (96, 512, 32, 4) if not sample else (192, 384, 32, 4)
    pool = random_pool(dim, heads, dtype=torch.float32)
    image_tokens, text = randn(images, 9, dim, dtype=torch.float32), randn(captions, dim)
    text = text.float()
    index = None
    if sample:
        offsets = torch.randint(0, 2, (images, images - 1))
        index = reference.text_conditioned_columns(images, 2, offsets)
    columns = captions if index is None else index.shape[1]
    with LargestTensor() as around:
        projected = functional._projected(image_tokens, text, pool.weights(), None, "torch")
    inside = Pool(*(x.detach() for x in projected), None, heads, True)
    with LargestTensor() as forward:
        scores, norms = engine.forward(inside, index)
    with LargestTensor() as backward:
        engine.backward(inside, index, torch.ones_like(scores), scores, norms, Need(*[True] * 6))
    with LargestTensor() as whole:
        reference.text_conditioned_scores(image_tokens[:4], text, pool.weights(), heads)
    assert whole.elements >= 4 * captions * dim  # the reference does make it: the mode sees it
    bound = engine._BLOCK_ELEMENTS["cpu"]
    assert bound < images * columns * dim / 2, "too small a case to tell"
    for largest in (around, forward, backward):
        assert largest.elements <= max(bound, image_tokens.numel() * 10 // 9, images * columns)


@pytest.mark.parametrize("sample", [False, True])
def test_nor_does_it_inside_the_loss(sample):
    """Whose engine, of its own, makes the gradients in the forward."""
    torch.manual_seed(4)
    images, dim = 96, 32
    shapes = [(512, dim), (images, 9, dim), *[(dim, dim), (dim,)] * 2, (512, dim), (dim, dim)]
    inputs = [randn(*shape, dtype=torch.float32) for shape in (*shapes, (dim,))]
    index = torch.randint(0, 512, (images, 480)) if sample else None
    scalars = torch.tensor(5.0), torch.tensor(-1.0)
    given = loss_engine.Inputs(*inputs, *scalars, None, index, 4, True, 0 if sample else 5)
    columns = 480 if sample else 512
    bound = 1 << 17
    assert bound < images * columns * dim / 8, "too small a case to tell"
    budgets = dict.fromkeys(("cpu", "cuda"), bound)
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as largest:
        patch.setattr(loss_engine, "_BLOCK_ELEMENTS", budgets)
        loss_engine.loss_and_gradients(given, loss_engine.Need(*[True] * 11))
    assert 0 < largest.elements <= max(bound, inputs[1].numel())


@pytest.mark.parametrize("locked", ["image", "text", "pool", "tokens and text"])
def test_gradients_nobody_wants_are_not_computed(locked, monkeypatch):
    torch.manual_seed(5)
    pool = random_pool(8, 2)
    image_tokens = randn(3, 4, 8, grad=locked in ("text", "pool"))
    text = randn(6, 8, grad=locked in ("image", "pool"))
    pool.requires_grad_(locked != "pool")
    needs = []
    made = loss_engine.loss_and_gradients

    def watched(inputs, need):
        needs.append(need)
        return made(inputs, need)

    monkeypatch.setattr(loss_engine, "loss_and_gradients", watched)
    text_conditioned_sigmoid_loss(
        pool, image_tokens, text, 5.0, -1.0, captions_per_image=2
    ).backward()
    (need,) = needs
    assert need.tokens == image_tokens.requires_grad
    of_the_pool = need.k_weight, need.k_bias, need.v_weight, need.v_bias, need.out_weight
    assert set(of_the_pool) == {locked != "pool"}
    assert need.text == text.requires_grad
    assert need.q  # made of the texts and the pool
    assert not need.scale and not need.bias
    for tensor in (image_tokens, text, *pool.parameters()):
        assert (tensor.grad is not None) == tensor.requires_grad


@pytest.mark.parametrize("need", torch.eye(6, dtype=torch.long).tolist())
def test_each_gradient_alone_is_that_of_all_together(need):
    torch.manual_seed(6)
    q, k, v, text = randn(5, 6), randn(3, 4, 6), randn(3, 4, 6), randn(5, 6)
    pool = Pool(q, k, v, text, randn(6, 6), randn(6), None, 2, True)
    grad = randn(3, 5)
    given = pool, None, grad, *engine.forward(pool, None)
    together = engine.backward(*given, Need(*[True] * 6))
    alone = engine.backward(*given, Need(*map(bool, need)))
    for wanted, a, b in zip(need, alone, together, strict=True):
        assert torch.equal(a, b) if wanted else a.numel() == 0


# ---------------------------------------------------------------------------------------------
# Edges
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_without_tokens_scores_zero_and_gets_no_gradient(device):
    torch.manual_seed(7)
    pool = random_pool(6, 2, device)
    image_tokens = randn(3, 4, 6, device=device)
    image_tokens[1] = torch.nan  # padding may hold anything
    image_tokens[0, 3] = torch.inf
    image_tokens.requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[1], mask[0, 3] = False, False
    scores = pool.scores(image_tokens, randn(5, 6, device=device), image_mask=mask)
    assert not scores[1].any() and scores[0].all() and scores.isfinite().all()
    scores.sum().backward()
    assert image_tokens.grad is not None and image_tokens.grad.isfinite().all()
    assert not image_tokens.grad[~mask].any() and image_tokens.grad[mask].all()
    assert all(p.grad.isfinite().all() for p in pool.parameters())


def test_a_zero_text_feature_scores_zero():
    pool = random_pool(6, 2)
    text = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    scores = pool.scores(randn(2, 4, 6), text)
    assert not scores.any()
    scores.sum().backward()
    assert text.grad is not None and not text.grad.any()


def test_a_pooled_vector_of_zero_scores_zero():
    pool = random_pool(6, 2)
    with torch.no_grad():
        pool.attn.out_proj.weight.zero_()
        pool.attn.out_proj.bias.zero_()
    tokens, text = randn(2, 4, 6, grad=True), randn(3, 6, grad=True)
    scores = pool.scores(tokens, text)
    assert not scores.any()
    scores.sum().backward()
    gradients = [tokens.grad, text.grad, *(p.grad for p in pool.parameters())]
    assert all(g is not None and not g.any() for g in gradients)


def test_pooled_vectors_below_the_floor_of_the_norm_follow_the_reference():
    torch.manual_seed(8)
    pool = random_pool(6, 2)
    with torch.no_grad():
        pool.attn.out_proj.weight.mul_(1e-13)
        pool.attn.out_proj.bias.zero_()
    tokens, text = randn(2, 4, 6, grad=True), randn(3, 6, grad=True)
    assert_same_with_gradients(
        pool.scores(tokens, text), pool.scores(tokens, text, backend="reference"), [tokens, text]
    )


def test_nan_gives_nan_and_no_error():
    pool, tokens, text = random_pool(6, 2), randn(2, 4, 6), randn(3, 6)
    tokens[0, 1, 2] = torch.nan
    text[1, 0] = torch.nan
    scores = pool.scores(tokens, text)
    assert scores.isnan().tolist() == [[True] * 3, [False, True, False]]


def test_views_and_a_single_everything():
    torch.manual_seed(9)
    pool = random_pool(6, 2)
    tokens, text = randn(6, 4, 3).mT[:, ::2].mT, randn(6, 5).T
    tokens = randn(4, 6, 3).permute(2, 0, 1)
    assert not tokens.is_contiguous() and not text.is_contiguous()
    assert_close(pool.scores(tokens, text), pool.scores(tokens, text, backend="reference"))
    one = randn(1, 1, 6, grad=True)
    loss = text_conditioned_sigmoid_loss(
        pool, one, text[:1], 2.0, 0.5, captions_per_image=1, negatives="sample"
    )
    expected = F.softplus(-(2.0 * pool.scores(one, text[:1])[0, 0] + 0.5))
    assert_close(loss, expected)
    assert pool.scores(tokens[:0], text).shape == (0, 5)
    assert pool.scores(tokens, text[:0]).shape == (3, 0)
    empty = text_conditioned_sigmoid_loss(
        pool, tokens[:0], text[:0], 2.0, 0.5, captions_per_image=2
    )
    assert empty.item() == 0


@pytest.mark.parametrize("power", [0, -12, -24, -40])
def test_small_gradients_of_a_large_batch_are_not_lost_in_float16(power):
    """The engine with products in float16, as it is on a GPU; 2^-24 is the least that it has."""
    torch.manual_seed(24)
    q, k, v = (randn(*shape, dtype=torch.float16) for shape in ((5, 8), (3, 4, 8), (3, 4, 8)))
    text, weight, bias = (randn(*shape, dtype=torch.float32) for shape in ((5, 8), (8, 8), (8,)))
    pool = Pool(q, k, v, text, weight, bias, None, 2, True)
    grad, forward = randn(3, 5, dtype=torch.float32), engine.forward(pool, None)
    whole = engine.backward(pool, None, grad, *forward, Need(*[True] * 6))
    small = engine.backward(pool, None, grad * 2.0**power, *forward, Need(*[True] * 6))
    for name in ("text", "out_weight", "out_bias"):  # the others' own dtype is float16
        place = Need._fields.index(name)
        assert torch.equal(small[place], whole[place] * 2.0**power), name


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_a_gradient_without_a_size_is_taken_as_it_is(bad):
    assert engine._size(torch.tensor([1.0, bad])) == 1
    assert engine._size(torch.zeros(0)) == 1 and engine._size(torch.zeros(2)) == 1
    assert engine._size(torch.tensor([-6.0, bad if bad == 0 else 1.0])) == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), *((d, a) for d in (torch.bfloat16, torch.float16) for a in (0, 1))],
)
def test_precision(device, dtype, autocast):
    """At most 1.1 times the error that the published block itself has in this dtype."""
    torch.manual_seed(10)
    pool = TextConditionedPool(64, 4).to(device)
    tokens, text = randn(8, 16, 64, device=device), randn(12, 64, device=device)
    inputs = [x.to(torch.float32 if autocast else dtype) for x in (tokens, text)]
    # The same rounded numbers, in float64.
    exact_pool = TextConditionedPool(64, 4).to(device).double()
    exact_pool.load_state_dict(pool.state_dict())
    if not autocast:
        pool = pool.to(dtype)
        exact_pool.load_state_dict(pool.state_dict())
    exact_inputs = [x.to(dtype).double().requires_grad_() for x in inputs]

    def published(block: nn.Module, tokens: Tensor, text: Tensor) -> Tensor:
        rows = [block(text[None], one[None], one[None])[0] for one in tokens]
        pooled = F.normalize(
            torch.stack(rows).to(torch.promote_types(text.dtype, torch.float32)), dim=-1
        )
        return (pooled * F.normalize(text.to(pooled.dtype), dim=-1)).sum(dim=-1)

    def run(scores: Callable[[], Tensor], inputs: list[Tensor]) -> list[Tensor]:
        with torch.autocast(device, dtype if autocast else None, enabled=bool(autocast)):
            value = scores()
        gradients = torch.autograd.grad(value.square().sum(), inputs)
        assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
        return [value.double(), *(g.double() for g in gradients)]

    inputs = [x.requires_grad_() for x in inputs]
    exact = published(exact_pool, *exact_inputs)
    exact = [exact, *torch.autograd.grad(exact.square().sum(), exact_inputs)]
    got = run(lambda: pool.scores(*inputs), inputs)
    eager = run(lambda: published(pool, *inputs), inputs)
    assert pool.scores(*inputs).dtype == torch.float32
    for ours, theirs, right in zip(got, eager, exact, strict=True):
        error, eager_error = ((x - right).norm() / right.norm() for x in (ours, theirs))
        assert error <= 1.1 * eager_error + 1e-7


@pytest.mark.parametrize("device", DEVICES)
def test_backward_under_autocast_is_the_same(device):
    """Autocast would reach into the operator's backward and round its products."""
    pool = TextConditionedPool(16, 2).to(device)
    tokens, text = (randn(*s, 16, device=device, dtype=torch.float32) for s in ((3, 5), (6,)))
    gradients = []
    for around in (False, True):
        pool.zero_grad()
        loss = text_conditioned_sigmoid_loss(pool, tokens, text, 5.0, -1.0, captions_per_image=2)
        with torch.autocast(device, torch.bfloat16, enabled=around):
            loss.backward()
        gradients.append(pool.attn.out_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_mixed_dtypes_promote():
    pool = TextConditionedPool(8, 2)
    tokens, text = randn(2, 3, 8, dtype=torch.bfloat16, grad=True), randn(4, 8, grad=True)
    scores = pool.scores(tokens, text)
    assert scores.dtype == torch.float64
    scores.sum().backward()
    assert tokens.grad is not None and tokens.grad.dtype == torch.bfloat16
    assert pool.ln_q.weight.grad is not None and pool.ln_q.weight.grad.dtype == torch.float32
    assert pool.scores(tokens, text.half()).dtype == torch.float32


def test_the_same_bits_again():
    torch.manual_seed(11)
    pool = random_pool(16, 2, dtype=torch.float32)
    tokens, text = (randn(*s, 16, dtype=torch.float32, grad=True) for s in ((9, 5), (27,)))
    offsets = torch.randint(0, 3, (9, 8))

    def run() -> tuple[Tensor, ...]:
        loss = text_conditioned_sigmoid_loss(
            pool, tokens, text, 5.0, -1.0, captions_per_image=3, negatives="sample",
            negative_offsets=offsets,
        )  # fmt: skip
        return (loss, *torch.autograd.grad(loss, [tokens, text, *pool.parameters()]))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ---------------------------------------------------------------------------------------------
# An operator like PyTorch's own
# ---------------------------------------------------------------------------------------------


def operator_arguments(device: str) -> list[tuple]:
    torch.manual_seed(13)
    q, text = (randn(5, 6, device=device, grad=True) for _ in range(2))
    k, v = (randn(3, 4, 6, device=device, grad=True) for _ in range(2))
    weights = randn(6, 6, device=device, grad=True), randn(6, device=device, grad=True)
    mask = torch.rand(3, 4, device=device) < 0.7
    index = torch.randint(0, 5, (3, 4), device=device)
    return [
        (q, k, v, text, *weights, None, None, 2, True, "torch"),
        (q, k, v, text, *weights, mask, index, 3, False, "torch"),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for arguments in operator_arguments(device):
        torch.library.opcheck(ops.text_conditioned_scores, arguments)
    for arguments in operator_arguments(device):
        tensors = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        scores, norms = ops.text_conditioned_scores(*tensors)
        given = torch.ones_like(scores), scores, norms, *tensors
        need = [True, False, True, True, False, True]
        torch.library.opcheck(ops.text_conditioned_scores_backward, (*given, need))


def loss_inputs(device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(21)
    shapes = [(6, 6), (3, 4, 6), (6, 6), (6,), (6, 6), (6,), (6, 6), (6, 6), (6,), (), ()]
    inputs = [randn(*(shape or [1]), device=device).reshape(shape) for shape in shapes]
    inputs[6] = reference.l2_normalize(inputs[6])
    return inputs


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_the_loss(device):
    inputs = [x.requires_grad_() for x in loss_inputs(device)]
    mask = torch.rand(3, 4, device=device) < 0.7
    index = torch.randint(0, 6, (3, 4), device=device)
    for more in ((None, None, 2, True, 2), (mask, index, 3, False, 0)):
        torch.library.opcheck(text_conditioned_loss, (*inputs, *more, [True] * 11))
        constants = [x.detach() for x in inputs]
        some = [True, False] * 5 + [True]
        torch.library.opcheck(text_conditioned_loss, (*constants, *more, some))
    gradients = [x.detach() for x in inputs]
    torch.library.opcheck(text_conditioned_loss_backward, (gradients[-1], *gradients))


@pytest.mark.parametrize("need", torch.eye(11, dtype=torch.long).tolist())
def test_each_gradient_of_the_loss_alone_is_that_of_all_together(need):
    given = loss_engine.Inputs(*loss_inputs(), None, None, 2, True, 2)
    total, *together = loss_engine.loss_and_gradients(given, loss_engine.Need(*[True] * 11))
    same, *alone = loss_engine.loss_and_gradients(given, loss_engine.Need(*map(bool, need)))
    assert torch.equal(total, same)
    for wanted, a, b in zip(need, alone, together, strict=True):
        assert torch.equal(a, b) if wanted else a.numel() == 0


@pytest.fixture(params=[True, False], ids=["host asks", "host does not ask"])
def may_ask(request, monkeypatch) -> bool:
    """The loss's engine on a CPU, and as it goes about it on a GPU."""
    monkeypatch.setattr(loss_engine, "_may_ask", lambda device: request.param)
    return request.param


def test_a_gpu_is_never_waited_for(may_ask):
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            asked.extend([name] if name in ("nonzero", "_local_scalar_dense", "item") else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        given = loss_engine.Inputs(*loss_inputs(), None, None, 2, True, 2)
        loss_engine.loss_and_gradients(given, loss_engine.Need(*[True] * 11))
    assert bool(asked) == may_ask


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("budget", "rows"), [(1, 1), (30, 9), (1 << 20, 1 << 20)])
def test_how_much_is_computed_at_once_does_not_matter(sample, budget, rows, may_ask, monkeypatch):
    """The loss beside that of the scores, whose own test does the same."""
    monkeypatch.setattr(loss_engine, "_BLOCK_ELEMENTS", dict.fromkeys(("cpu", "cuda"), budget))
    monkeypatch.setattr(loss_engine, "_GROUP_ROWS", rows)
    torch.manual_seed(22)
    pool = random_pool(6, 2)
    tokens, text = randn(5, 4, 6, grad=True), randn(10, 6, grad=True)
    keywords = dict(captions_per_image=2, image_mask=torch.rand(5, 4) < 0.6)
    if sample:
        keywords |= dict(negatives="sample", negative_offsets=torch.randint(0, 2, (5, 4)))
    one, other = (
        text_conditioned_sigmoid_loss(pool, tokens, text, 5.0, -1.0, **keywords, backend=backend)
        for backend in ("torch", "reference")
    )
    assert_same_with_gradients(one, other, [tokens, text, *pool.parameters()])


def test_a_projection_that_nearly_cancels(may_ask):
    """|o|^2 is a difference of terms 10^8 times its size, and no digit of it may be lost."""
    torch.manual_seed(23)
    pool = random_pool(6, 2, zero=False)
    with torch.no_grad():  # the values, and so what is pooled, are one constant
        pool.attn.in_proj_weight[12:] *= 1e-5
        pooled = pool.attn.in_proj_bias[12:]
        pool.attn.out_proj.bias.copy_(-pool.attn.out_proj.weight @ pooled + 1e-4 * randn(6))
    tokens, text = randn(3, 4, 6, grad=True), randn(6, 6, grad=True)
    one, other = (
        text_conditioned_sigmoid_loss(
            pool, tokens, text, 5.0, -1.0, captions_per_image=2, backend=backend
        )
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    for inputs in ([pool.attn.out_proj.weight], [text]):
        ours, wanted = (torch.autograd.grad(x, inputs, retain_graph=True)[0] for x in (one, other))
        # Each of the terms has 10^-16 of itself, which is 10^-12 of what they leave.
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-9


def test_the_loss_below_the_floor_of_the_norm_follows_the_reference(may_ask):
    """|o| < 1e-12 is divided by 1e-12, and has no gradient of its own."""
    torch.manual_seed(25)
    pool = random_pool(6, 2)
    with torch.no_grad():
        pool.attn.out_proj.weight.mul_(1e-13)
        pool.attn.out_proj.bias.zero_()
    tokens, text = randn(3, 4, 6, grad=True), randn(6, 6, grad=True)
    ours, wanted = (
        text_conditioned_sigmoid_loss(
            pool, tokens, text, 5.0, -1.0, captions_per_image=2, backend=backend
        )
        for backend in ("torch", "reference")
    )
    assert_same_with_gradients(ours, wanted, [tokens, text, *pool.parameters()])


def test_the_losses_operator_reads_no_caption_that_is_not_there():
    inputs = loss_inputs()
    index = torch.tensor([[0, 10**12], [-(10**12), 5], [6, -1]])
    given = loss_engine.Inputs(*inputs, None, index, 2, True, 2)
    clamped = given._replace(text_index=index.clamp(0, 5))
    need = loss_engine.Need(*[True] * 11)
    both = (loss_engine.loss_and_gradients(x, need) for x in (given, clamped))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sample", [False, True])
def test_gradcheck(sample):
    torch.manual_seed(14)
    pool = random_pool(4, 2)
    tokens, text = randn(2, 3, 4, grad=True), randn(4, 4, grad=True)
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0))
    keywords: dict = {
        "captions_per_image": 2,
        "image_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]) > 0,
    }
    if sample:
        keywords |= {"negatives": "sample", "negative_offsets": torch.tensor([[1], [0]])}

    def loss(tokens: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        return text_conditioned_loss_from_weights(
            tokens, text, reference.PoolWeights(*weights), 2, scale, bias, **keywords
        )

    assert torch.autograd.gradcheck(loss, (tokens, text, scale, bias, *pool.weights()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("negatives", ["all", "sample"])
def test_compiles_whole_and_once(device, negatives):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pool = random_pool(8, 2, device)

    def loss(tokens: Tensor, text: Tensor, scale: Tensor, offsets: Tensor | None) -> Tensor:
        return text_conditioned_sigmoid_loss(
            pool, tokens, text, scale, -1.0, captions_per_image=2, negatives=negatives,
            negative_offsets=offsets,
        )  # fmt: skip

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    counts = []
    for images, length in ((3, 4), (4, 5), (6, 7), (9, 3)):
        torch.manual_seed(images)
        tokens = randn(images, length, 8, device=device, grad=True)
        text = randn(images * 2, 8, device=device, grad=True)
        scale = torch.tensor(3.0, device=device, requires_grad=True)
        offsets = torch.randint(0, 2, (images, images - 1), device=device)
        offsets = None if negatives == "all" else offsets
        one, other = (f(tokens, text, scale, offsets) for f in (compiled, loss))
        assert_same_with_gradients(one, other, [tokens, text, scale, *pool.parameters()])
        counts.append(counter.frame_count)
    assert len(set(counts[1:])) == 1, counts  # the second call makes the sizes dynamic


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

BAD = {
    "another dim": ({"text_features": torch.ones(4, 5)}, "same last dimension"),
    "weights of another dim": (
        {"image_tokens": torch.ones(2, 3, 6), "text_features": torch.ones(4, 6)},
        r"weights.in_proj_weight \(24, 8\) must have shape \(18, 6\)",
    ),
    "2-D tokens": ({"image_tokens": torch.ones(2, 8)}, r"image_tokens must have shape"),
    "a caption missing": ({"text_features": torch.ones(3, 8)}, "4 rows"),
    "mask of another shape": ({"image_mask": torch.ones(2, 4) > 0}, r"image_mask.*\(2, 4\)"),
    "unknown negatives": ({"negatives": "hard"}, "negatives must be one of"),
    "offsets for all": ({"negative_offsets": torch.zeros(2, 1).long()}, 'negatives="sample"'),
    "offsets of the wrong shape": (
        {"negatives": "sample", "negative_offsets": torch.zeros(2, 2).long()},
        r"negative_offsets must have shape",
    ),
    "offsets past K": (
        {"negatives": "sample", "negative_offsets": torch.full((2, 1), 2)},
        r"negative_offsets.*\[0, 2\)",
    ),
    "no captions": ({"captions_per_image": 0}, "captions_per_image must be at least 1"),
    "a scale per text": ({"logit_scale": torch.ones(4)}, "logit_scale"),
    "unknown backend": ({"backend": "cuda"}, "unknown backend"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    good: dict = {
        "pool": TextConditionedPool(8, 2), "image_tokens": torch.ones(2, 3, 8),
        "text_features": torch.ones(4, 8), "logit_scale": 1.0, "logit_bias": 0.0,
        "captions_per_image": 2,
    }  # fmt: skip
    text_conditioned_sigmoid_loss(**good)
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        text_conditioned_sigmoid_loss(**good | changes)


def test_other_bad_input_is_named():
    pool, tokens, text = TextConditionedPool(8, 2), torch.ones(2, 3, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"text_index.*\[0, 4\)"):
        pool.scores(tokens, text, text_index=torch.full((2, 1), 4))
    with pytest.raises(TypeError, match="pool must be a TextConditionedPool"):
        text_conditioned_sigmoid_loss(nn.Linear(8, 8), tokens, text, 1.0, 0.0, captions_per_image=2)
    without_bias = TextConditionedPool(8, 2)
    without_bias.attn = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with pytest.raises(TypeError, match=r"weights.in_proj_bias must be a tensor.*bias=True"):
        without_bias.scores(tokens, text)
    with pytest.raises(ValueError, match="num_heads must divide"):
        text_conditioned_scores(tokens, text, pool.weights(), 3)


class Adapted(nn.Module):
    """A layer with an adapter around it, as PEFT makes them: its weight is not all there is."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def set_eps(pool: TextConditionedPool) -> None:
    pool.ln_k.eps = 1e-6


def set_bias_kv(pool: TextConditionedPool) -> None:
    pool.attn = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)


def set_dropout(pool: TextConditionedPool) -> None:
    pool.attn.dropout = 0.1


def set_adapter(pool: TextConditionedPool) -> None:
    pool.attn.out_proj = Adapted(pool.attn.out_proj)  # type: ignore[assignment]


def set_adapted_attention(pool: TextConditionedPool) -> None:
    pool.attn = Adapted(pool.attn)  # type: ignore[assignment]


SETTINGS = {
    set_eps: (ValueError, r"pool.ln_k.eps is 1e-06; only 1e-5 .* Fix: pool.ln_k.eps = 1e-5"),
    set_bias_kv: (ValueError, r"pool.attn has add_bias_kv=True.* Fix: build .*add_bias_kv=False"),
    set_dropout: (ValueError, r"pool.attn.dropout is 0.1 in training.* Fix: pool.attn.dropout = 0"),
    set_adapter: (TypeError, r"not a MultiheadAttention with a Adapted, .* Fix: merge the adapter"),
    set_adapted_attention: (TypeError, r"not a Adapted with a .* Fix: merge the adapter"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_changes_what_is_pooled_is_refused(setting):
    pool, tokens, text = TextConditionedPool(8, 2), torch.ones(2, 3, 8), torch.ones(4, 8)
    setting(pool)
    error, message = SETTINGS[setting]
    logits = 1.0, 0.0, 1.0, 0.0
    for call in (
        lambda: text_conditioned_sigmoid_loss(pool, tokens, text, 1.0, 0.0, captions_per_image=2),
        lambda: pool.scores(tokens, text),
        lambda: text_conditioned_topk(pool, tokens, text, 1),
        lambda: hierarchical_scores(pool, tokens, text[:, None], tokens[:, 0], text, *logits),
    ):
        with pytest.raises(error, match=message):
            call()


def test_dropout_that_drops_nothing_is_served():
    pool, tokens, text = TextConditionedPool(8, 2), torch.ones(2, 3, 8), torch.randn(4, 8)
    expected = pool.scores(tokens, text)
    pool.attn.dropout = 0.1
    assert torch.equal(pool.eval().scores(tokens, text), expected)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_a_generator_in_torch_compile_is_refused_or_drawn_from_outside(fullgraph):
    torch._dynamo.reset()
    pool, tokens, text = random_pool(6, 2), randn(4, 3, 6), randn(8, 6)

    def loss(tokens: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * text_conditioned_sigmoid_loss(
            pool, 2 * tokens, text, 5.0, -1.0, captions_per_image=2, negatives="sample",
            generator=generator,
        )  # fmt: skip

    def run(function: Callable[..., Tensor]) -> Tensor:
        return function(tokens, text, torch.Generator().manual_seed(3))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=fullgraph)
    if fullgraph:
        message = r"generator can not be drawn from in torch.compile. Fix: draw outside and pass"
        # Torch 2.6 names the line that raised, and not what it said.
        with pytest.raises(Exception, match=f"{message}|Observed exception"):
            run(compiled)
    else:
        torch.testing.assert_close(run(compiled), run(loss))


def test_a_bad_text_index_that_nobody_looked_at_reads_nothing_outside(monkeypatch):
    monkeypatch.setattr("fastgoal_kernels.checks.values_are_checked", lambda _: False)
    pool, tokens, text = TextConditionedPool(8, 2), torch.ones(2, 3, 8), torch.ones(4, 8)
    index = torch.tensor([[-(10**12), 10**12], [4, -1]])
    assert pool.scores(tokens, text, text_index=index).isfinite().all()
    loss = text_conditioned_sigmoid_loss(
        pool, tokens, text, 1.0, 0.0, captions_per_image=2, negatives="sample",
        negative_offsets=torch.tensor([[-(10**12)], [10**12]]),
    )  # fmt: skip
    assert loss.isfinite()

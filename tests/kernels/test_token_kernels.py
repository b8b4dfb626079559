"""The Triton engines of the token ops: under the interpreter, or on a CUDA device.

The public functions' own behaviour (checks, values by hand, autocast) is tested in
`test_token_ops.py`; here is what blocks, masks and rounding can get wrong.
"""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("these kernels want a CUDA device or the interpreter", allow_module_level=True)

from fastgoal_kernels import explain_backend, reference  # noqa: E402
from fastgoal_kernels.functional.token_ops import (  # noqa: E402
    farthest_point_sampling,
    region_mean,
    soft_cluster_pool,
    span_mean,
    token_similarity_loss,
)
from fastgoal_kernels.ops import cluster_pool_triton, farthest_points_triton  # noqa: E402
from fastgoal_kernels.ops.cluster_pool import cluster_pool, cluster_pool_backward  # noqa: E402
from fastgoal_kernels.ops.farthest_points import farthest_points  # noqa: E402
from fastgoal_kernels.ops.item_rows import item_rows  # noqa: E402
from fastgoal_kernels.ops.token_means import token_means, token_means_backward  # noqa: E402
from fastgoal_kernels.ops.token_similarity import (  # noqa: E402
    token_similarity,
    token_similarity_backward,
)

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 10 if INTERPRETED else 100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# One rounding of a result. The interpreter cuts digits off where a device rounds.
ROUNDING = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-10 if INTERPRETED else 2.0**-11,
}

# Sizes that cross the blocks a GPU takes, where the interpreter would take minutes.
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


@pytest.fixture
def gpu_blocks(monkeypatch):
    """The interpreter, too, runs the blocks that a GPU would."""
    for module in (cluster_pool_triton, farthest_points_triton):
        monkeypatch.setattr(module, "INTERPRETED", False)


seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)


def randn(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


# Outside what is asked for, and of infinities on purpose, NumPy warns where a device does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values (N, L, D) in memory of another order."""
    if layout == "transposed":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "after a CLS token":
        return torch.cat([x[:, :1], x], dim=1)[:, 1:]
    if layout == "every other channel":
        return x.repeat_interleave(2, dim=2)[..., ::2]
    return x


def gradients(out: Tensor, weight: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(out, inputs, weight.to(out.dtype), allow_unused=True))


def leaf(x: Tensor, wanted: bool = True) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted)


def assert_near(got: Tensor, exact: Tensor, tolerance: float) -> None:
    """|got - exact| <= tolerance |exact| as a whole; dtypes are another matter."""
    assert got.shape == exact.shape
    error = (got.double() - exact).norm()
    assert error <= tolerance * exact.norm(), f"{error / exact.norm():.2e} > {tolerance:.2e}"


layouts = st.sampled_from(["contiguous", "transposed", "after a CLS token", "every other channel"])


def test_rows_are_copied_only_where_they_have_gaps():
    x = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    for given_, rows_per_item, copied in (
        (x, 5, False), (x[:, 1:], 5, False), (x[::2], 10, False), (x[:1].expand(4, 5, 3), 0, False),
        (x[:, ::2], 3, True), (x[..., 1:], 5, True), (x.transpose(0, 1), 2, True),
    ):  # fmt: skip
        rows, between = item_rows(given_)
        assert (rows.data_ptr() != given_.data_ptr()) == copied and between == rows_per_item
        assert torch.equal(rows, given_)


# ---------------------------------------------------------------------------------------------
# farthest_point_sampling
# ---------------------------------------------------------------------------------------------


def farthest(points: Tensor, samples: int, backend: str = "triton", **options) -> Tensor:
    return farthest_point_sampling(points, samples, backend=backend, **options)


def test_triton_is_the_default_for_farthest_points():
    assert explain_backend("farthest_point_sampling", randn(1, 2, 3).float()).startswith("triton")
    assert explain_backend("farthest_point_sampling", randn(1, 2, 3)).startswith("torch")


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds, batch=st.integers(0, 3), count=st.integers(1, 25), samples=st.integers(1, 28),
    dim=st.sampled_from([1, 2, 3, 8, 13, 16, 20, 34]), spread=st.integers(1, 3),
    masked=st.sampled_from([None, 0.1, 0.6]), dtype=dtypes, layout=layouts,
)  # fmt: skip
def test_farthest_points_are_the_reference(
    seed, batch, count, samples, dim, spread, masked, dtype, layout
):
    """Small integer points: exact distances in every dtype, many ties and many duplicates."""
    torch.manual_seed(seed)
    columns = torch.randint(-spread, spread + 1, (batch, count, min(dim, 2)))
    points = columns.repeat(1, 1, dim)[..., :dim].to(DEVICE, dtype)
    mask = None if masked is None else (torch.rand(batch, count) < masked).to(DEVICE)
    options = dict(start=int(torch.randint(0, count, ())), mask=mask)
    got = farthest(laid_out(points, layout), samples, **options)
    assert torch.equal(got, farthest(points, samples, "reference", **options))


def check_farthest(batch: int, count: int, samples: int, dim: int, dtype: torch.dtype) -> None:
    """Masked or not: integer points, whose distances are exact in every dtype."""
    torch.manual_seed(5)
    points = torch.randint(-9, 10, (batch, count, dim)).to(DEVICE, dtype)
    for mask in (None, (torch.rand(batch, count) < 0.7).to(DEVICE)):
        options = dict(start=count // 2, mask=mask)
        got = farthest(points, samples, **options)
        assert torch.equal(got, farthest(points, samples, "reference", **options))


@pytest.mark.parametrize(
    ("count", "samples", "dim", "dtype"),
    [
        (50, 9, 40, torch.float16),
        (257, 4, 33, torch.float32),
        (300, 4, 70, torch.bfloat16),
        (1024, 3, 70, torch.bfloat16),  # the second block of columns is not kept near
        (70, 4, 35, torch.bfloat16),
    ],
)
def test_farthest_points_in_the_blocks_of_a_gpu(gpu_blocks, count, samples, dim, dtype):
    check_farthest(1, count, samples, dim, dtype)


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize(
    ("count", "samples", "dim", "dtype"),
    [
        (1024, 256, 768, torch.bfloat16),
        (1024, 256, 768, torch.float32),
        (300, 65, 501, torch.bfloat16),
        (300, 65, 502, torch.bfloat16),
        (257, 257, 500, torch.float16),
        (197, 65, 768, torch.bfloat16),
        (64, 66, 768, torch.float32),
        (65, 64, 501, torch.float32),
    ],
)
def test_farthest_points_of_many_blocks(count, samples, dim, dtype):
    check_farthest(3, count, samples, dim, dtype)


@pytest.mark.parametrize("near_bytes", [0, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_farthest_points_however_much_is_kept_near(dtype, near_bytes):
    torch.manual_seed(1)
    points = torch.randint(-9, 10, (2, 19, 21)).to(DEVICE, dtype)
    blocks = (
        (lambda points, config: -(-points.shape[2] // config.block_d))
        if near_bytes
        else (lambda points, config: 0)
    )
    with mock.patch.object(farthest_points_triton, "_near_blocks", blocks):
        for dim in (16, 21):
            part = points[..., :dim]
            assert torch.equal(farthest(part, 12), farthest(part, 12, "reference"))


def test_farthest_points_of_random_numbers():
    """The gaps between distances are far above their rounding, so no winner can differ."""
    torch.manual_seed(2)
    points = randn(2, 40, 20, dtype=torch.float32)
    assert torch.equal(farthest(points, 12), farthest(points.double(), 12, "reference"))


def test_farthest_points_tells_near_duplicates_apart():
    """Points 1e-3 apart, 1,000 from the origin: a float32 Gram matrix sees only noise."""
    torch.manual_seed(0)
    points = (1000 + torch.rand(4, 32, 16, dtype=torch.float64) * 1e-3).float().to(DEVICE)
    assert torch.equal(farthest(points, 16), farthest(points.double(), 16, "reference"))


def test_farthest_points_read_in_pairs_keep_neighbours_apart():
    """Every second channel is large and the same in all points: what leaks into it would decide."""
    torch.manual_seed(4)
    points = torch.full((2, 20, 24), 1024.0, device=DEVICE)
    points[..., ::2] = 1 + torch.randint(0, 128, (2, 20, 12)).to(DEVICE) / 128
    points = points.bfloat16()
    for part in (points, points[..., :23]):
        assert torch.equal(farthest(part, 9), farthest(part, 9, "reference"))


def test_farthest_points_counts_nan_and_infinity_as_argmax_does():
    torch.manual_seed(3)
    points = randn(4, 11, 5, dtype=torch.float32)
    points[0, 7] = torch.nan
    points[1, 4, 2] = torch.inf
    points[2, 9], points[2, 3] = torch.nan, torch.inf
    points[3, 0] = torch.nan  # the start: every distance is NaN
    mask = torch.rand(4, 11, device=DEVICE) < 0.8
    for options in ({}, {"mask": mask}):
        assert torch.equal(farthest(points, 9, **options), farthest(points, 9, "torch", **options))


def test_farthest_points_is_an_operator_with_the_same_bits_again():
    points, mask = randn(3, 9, 6, dtype=torch.float32), torch.rand(3, 9, device=DEVICE) < 0.7
    for options in ((4, 1, mask), (12, 0, None)):
        torch.library.opcheck(farthest_points, (points, *options, "triton"))
        one, other = (farthest_points(points, *options, "triton") for _ in range(2))
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------
# soft_cluster_pool
# ---------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds, batch=st.integers(0, 2), length=st.sampled_from([1, 3, 16, 21]),
    clusters=st.sampled_from([1, 2, 16, 19, 35]), dim=st.sampled_from([1, 5, 16, 37]),
    spread=st.sampled_from([0.1, 1.0, 3.0]), dtype=dtypes, logits_dtype=dtypes, layout=layouts,
    wanted=st.sampled_from([(True, True), (True, False), (False, True)]),
)  # fmt: skip
def test_soft_cluster_pool_and_its_gradients_are_the_reference(
    seed, batch, length, clusters, dim, spread, dtype, logits_dtype, layout, wanted
):
    torch.manual_seed(seed)
    tokens = laid_out(randn(batch, length, dim, dtype=dtype), layout)
    logits = laid_out((spread * randn(batch, length, clusters)).to(logits_dtype), layout)
    check_cluster_pool(tokens, logits, spread, wanted)


@pytest.mark.parametrize(
    ("length", "clusters", "dim", "dtype"),
    [
        (40, 33, 150, torch.float32),
        (70, 65, 20, torch.float32),
        (70, 65, 150, torch.float16),
        (40, 130, 20, torch.bfloat16),
        (70, 64, 150, torch.bfloat16),
    ],
)
def test_soft_cluster_pool_in_the_blocks_of_a_gpu(gpu_blocks, length, clusters, dim, dtype):
    torch.manual_seed(6)
    tokens, logits = randn(1, length, dim, dtype=dtype), randn(1, length, clusters, dtype=dtype)
    check_cluster_pool(tokens, logits, 1.0, (True, True))


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "clusters", "dim"), [(197, 64, 768), (197, 65, 501), (300, 300, 500), (33, 129, 768)]
)
def test_soft_cluster_pool_of_many_blocks(length, clusters, dim, dtype):
    torch.manual_seed(7)
    tokens, logits = randn(3, length, dim, dtype=dtype), randn(3, length, clusters, dtype=dtype)
    check_cluster_pool(tokens, logits, 1.0, (True, True))


def check_cluster_pool(
    tokens: Tensor, logits: Tensor, spread: float, wanted: tuple[bool, bool]
) -> None:
    """Means and the wanted gradients against the reference; logits are of size spread."""
    inputs = [leaf(x, want) for x, want in zip((tokens, logits), wanted, strict=True)]
    exact_inputs = [leaf(x.double(), want) for x, want in zip(inputs, wanted, strict=True)]
    got = soft_cluster_pool(*inputs, backend="triton")
    exact = soft_cluster_pool(*exact_inputs, backend="reference")
    dtype, length = tokens.dtype, tokens.shape[1]
    assert got.dtype == dtype
    # A weight is wrong by a few float32 roundings times its logit's distance from the largest,
    # which is at most 4 * spread where the weight counts; 16-bit tokens split it, for 2^-16. A
    # mean is then rounded once. Long sums cancel, and are wrong by more roundings of what is left.
    few = 16 + 4 * spread + max(0, length - 21)
    weights = few * 2.0**-24 + (0 if dtype == torch.float32 else 2.0**-16)
    assert_near(got, exact, weights + ROUNDING[dtype])
    upstream = randn(*got.shape, dtype=dtype)
    chosen = [x for x, want in zip(inputs, wanted, strict=True) if want]
    chosen_exact = [x for x, want in zip(exact_inputs, wanted, strict=True) if want]
    for mine, theirs in zip(
        gradients(got, upstream, chosen), gradients(exact, upstream, chosen_exact), strict=True
    ):
        assert mine is not None and theirs is not None
        # A logit's gradient is a difference of sums as large as these; one cluster's is zero.
        scale = theirs.norm() + 8 * weights_of(exact_inputs, upstream)
        error = (mine.double() - theirs).norm()
        assert error <= ROUNDING[mine.dtype] * theirs.norm() + weights * scale


def weights_of(inputs: list[Tensor], upstream: Tensor) -> Tensor:
    """The size of sum_m a_lm |q_lm| / s_m, of which a logit's gradient is a difference."""
    tokens, logits = (x.detach() for x in inputs)
    share = logits.softmax(dim=2)
    q = torch.einsum("nmd,nld->nlm", upstream.double(), tokens).abs()
    return (share * (q / share.sum(dim=1, keepdim=True))).norm()


def test_soft_cluster_pool_of_nan_infinity_and_far_clusters():
    torch.manual_seed(0)
    tokens, logits = randn(1, 20, 6).float(), randn(1, 20, 33).float()
    logits[:, :, 5] -= 60.0  # weights of e^-60, whose mean is as exact as any
    logits[0, 2, 7:] = -torch.inf
    for x in (tokens.bfloat16(), tokens.half(), tokens):
        got = soft_cluster_pool(x, logits, backend="triton")
        exact = soft_cluster_pool(x.double(), logits.double(), backend="reference")
        assert_near(got[:, 5], exact[:, 5], 80 * 2.0**-24 + 2.0**-16 + ROUNDING[x.dtype])
        assert_near(got, exact, 80 * 2.0**-24 + 2.0**-16 + ROUNDING[x.dtype])
    logits[0, 4] = -torch.inf
    assert soft_cluster_pool(tokens, logits, backend="triton").isnan().all()
    logits[0, 4] = 0
    logits[0, 4, 3] = torch.nan
    assert soft_cluster_pool(tokens, logits, backend="triton").isnan().all()


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 4, 5)])
def test_soft_cluster_pool_of_nothing(shape):
    batch, length, dim, clusters = shape
    inputs = [leaf(randn(batch, length, n, dtype=torch.float32)) for n in (dim, clusters)]
    out = soft_cluster_pool(*inputs, backend="triton")
    expected = soft_cluster_pool(*inputs, backend="reference")
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert not any(g.any() for g in gradients(out, torch.ones_like(out), inputs) if g is not None)


def test_cluster_pool_is_an_operator_with_the_same_bits_again():
    torch.manual_seed(0)
    tokens, logits = (leaf(randn(2, 18, n, dtype=torch.float32)) for n in (17, 19))
    torch.library.opcheck(cluster_pool, (tokens, logits))
    pooled, *sums = cluster_pool(tokens, logits)
    upstream = torch.ones_like(pooled)
    for need in ((True, False), (False, True)):
        saved = [x.detach() for x in (tokens, logits, *sums)]
        torch.library.opcheck(cluster_pool_backward, (upstream, *saved, *need))
    runs = [
        [pooled, *gradients(pooled, upstream, [tokens, logits])]
        for pooled in (cluster_pool(tokens, logits)[0] for _ in range(2))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---------------------------------------------------------------------------------------------
# region_mean and span_mean
# ---------------------------------------------------------------------------------------------


def check_means(op, tokens: Tensor, *arguments, **keywords) -> None:
    """Means and gradients against the reference in float64."""
    mine, exact = leaf(tokens), leaf(tokens.double())
    got = op(mine, *arguments, **keywords, backend="triton")
    expected = op(exact, *arguments, **keywords, backend="reference")
    assert got.dtype == tokens.dtype
    # Interpreted: float32 sums of at most 42 numbers, and of at most 6 gradients; one rounding.
    tolerance = ROUNDING[tokens.dtype] + (16 if INTERPRETED else 64) * 2.0**-24
    assert_near(got, expected, tolerance)
    upstream = randn(*got.shape, dtype=tokens.dtype)
    (gradient,) = torch.autograd.grad(got, mine, upstream)
    assert gradient.dtype == tokens.dtype
    if expected.requires_grad:  # the reference of no boxes is a fresh tensor
        assert_near(gradient, torch.autograd.grad(expected, exact, upstream.double())[0], tolerance)
    else:
        assert not gradient.any()


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds, images=st.integers(1, 4), boxes=st.integers(0, 6), height=st.integers(1, 6),
    width=st.integers(1, 7), dim=st.sampled_from([1, 5, 16, 35]), dtype=dtypes, layout=layouts,
    mapped=st.booleans(),
)  # fmt: skip
def test_region_means_and_their_gradients_are_the_reference(
    seed, images, boxes, height, width, dim, dtype, layout, mapped
):
    torch.manual_seed(seed)
    tokens = laid_out(randn(images, height * width, dim, dtype=dtype), layout)
    owner = torch.randint(0, images, (boxes,)) if mapped else torch.arange(images)
    sizes = torch.randint(5, 50, (images, 2))
    corners = (torch.rand(len(owner), 2, 2) * 1.4 - 0.2) * sizes[owner][:, None]
    box = corners.sort(dim=1).values.flatten(1)
    keywords = {"box_image": owner.to(DEVICE)} if mapped else {}
    given_ = tokens, box.to(DEVICE), sizes.to(DEVICE), (height, width), 8 * height
    check_means(region_mean, *given_, **keywords)


@settings(max_examples=EXAMPLES)
@given(
    seed=seeds, texts=st.integers(1, 4), count=st.integers(0, 6), context=st.integers(1, 20),
    dim=st.sampled_from([1, 5, 16, 35]), dtype=dtypes, layout=layouts, mapped=st.booleans(),
)  # fmt: skip
def test_span_means_and_their_gradients_are_the_reference(
    seed, texts, count, context, dim, dtype, layout, mapped
):
    torch.manual_seed(seed)
    tokens = laid_out(randn(texts, context, dim, dtype=dtype), layout)
    count = count if mapped else texts
    spans = torch.randint(0, context + 4, (count, 2)).sort(dim=1).values.to(DEVICE)
    keywords = {"lengths": torch.randint(0, context + 1, (texts,), device=DEVICE)}
    if mapped:
        keywords["span_text"] = torch.randint(0, texts, (count,), device=DEVICE)
    check_means(span_mean, tokens, spans, **keywords)


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [768, 501])
def test_means_of_many_blocks(dtype, dim):
    torch.manual_seed(8)
    sizes = torch.randint(200, 900, (3, 2), device=DEVICE)
    owner = torch.randint(0, 3, (700,), device=DEVICE)
    box = (torch.rand(700, 2, 2, device=DEVICE) * sizes[owner][:, None]).sort(dim=1).values
    tokens = randn(3, 24 * 24, dim, dtype=dtype)
    check_means(region_mean, tokens, box.flatten(1), sizes, (24, 24), 336, box_image=owner)
    spans = torch.randint(0, 580, (700, 2), device=DEVICE).sort(dim=1).values
    check_means(span_mean, tokens, spans, span_text=owner)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_boxes_are_placed_as_the_reference_places_them(backend, dtype):
    """Corners on, just before and just after halves of a pixel, thin boxes, boxes outside."""
    torch.manual_seed(9)
    count = 20 if INTERPRETED else 4000
    for grid, side in (((14, 14), 224), ((3, 50), 225), ((7, 1), 1)):
        sizes = torch.randint(1, 2000, (5, 2))
        owner = torch.randint(0, 5, (count,))
        corners = torch.randint(-3, 2 * side + 4, (count, 2, 2)) / 2 * sizes[owner][:, None] / side
        corners = corners.double() * (1 + torch.randint(-2, 3, (count, 2, 2)) * 2.0**-52)
        corners[::4, 1] = corners[::4, 0] + 0.01
        box = corners.sort(dim=1).values.flatten(1).to(dtype)
        _, placed = token_means(
            torch.zeros(5, grid[0] * grid[1], 1, device=DEVICE), owner.to(DEVICE),
            box.to(DEVICE), sizes.to(DEVICE), (*grid, side), backend,
        )  # fmt: skip
        c1, r1, c2, r2 = reference.region_grid(box, sizes[owner], grid, side).T
        assert torch.equal(placed.cpu().long(), torch.stack([c1, c2, r1, r2], dim=1))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_nan_or_an_unused_gradient_outside_a_rectangle_stays_there(backend):
    tokens = torch.ones(2, 6, 3, device=DEVICE)
    tokens[0, 2:] = torch.nan
    tokens.requires_grad_()
    spans = torch.tensor([[0, 2], [1, 3]], device=DEVICE)
    mean = span_mean(tokens, spans, backend=backend)
    assert mean.detach().eq(1).all()
    upstream = torch.tensor([[torch.nan] * 3, [1.0] * 3], device=DEVICE)
    (gradient,) = torch.autograd.grad(mean, tokens, upstream)
    assert gradient[0, :2].isnan().all() and not gradient[0, 2:].any()
    assert gradient[1, :, 0].tolist() == [0, 0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("count", "texts", "dim"), [(0, 0, 3), (0, 2, 3), (2, 2, 0)])
def test_means_of_nothing(count, texts, dim, backend):
    tokens = torch.zeros(texts, 4, dim, device=DEVICE, requires_grad=True)
    spans = torch.tensor([[0, 2]] * count, dtype=torch.long, device=DEVICE).view(count, 2)
    owner = torch.zeros(count, dtype=torch.long, device=DEVICE)
    mean = span_mean(tokens, spans, span_text=owner, backend=backend)
    assert mean.shape == (count, dim)
    (gradient,) = torch.autograd.grad(mean.sum(), tokens)
    assert gradient.shape == tokens.shape and not gradient.any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_token_means_is_an_operator_with_the_same_bits_again(backend):
    torch.manual_seed(0)
    tokens = leaf(randn(3, 12, 20, dtype=torch.float32))
    item = torch.tensor([2, 0, 2, 2], device=DEVICE)
    boxes = torch.tensor([[0, 0, 8, 6], [2, 2, 4, 6], [4, 0, 8, 2], [0, 2, 6, 4.0]], device=DEVICE)
    sizes = torch.tensor([[8, 6]] * 3, device=DEVICE)
    spans = torch.tensor([[0, 9], [3, 3], [1, 2], [8, 12]], device=DEVICE)
    upstream = randn(4, 20, dtype=torch.float32)
    of_boxes, of_spans = (item, boxes, sizes, [3, 4, 24]), (item, spans, None, [])
    torch.library.opcheck(token_means, (tokens, *of_boxes, backend))
    _, rectangles = token_means(tokens, *of_boxes, backend)
    torch.library.opcheck(token_means_backward, (upstream, item, rectangles, 4, 3, 12, backend))
    for arguments in (of_boxes, of_spans):
        runs = []
        for _ in range(2):
            mean, _ = token_means(tokens, *arguments, backend)
            runs.append([mean, *torch.autograd.grad(mean, tokens, upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---------------------------------------------------------------------------------------------
# token_similarity_loss
# ---------------------------------------------------------------------------------------------


@settings(max_examples=2 * EXAMPLES)
@given(
    seed=seeds, batch=st.sampled_from([1, 2, 4, 7]), dim=st.sampled_from([1, 5, 16, 35]),
    zero=st.booleans(), scale=st.sampled_from([1e-2, 1.0, 50.0]), dtype=dtypes,
    wanted=st.sampled_from([(True, True), (True, False), (False, True)]), strided=st.booleans(),
)  # fmt: skip
def test_token_similarity_and_its_gradients_are_the_reference(
    seed, batch, dim, zero, scale, dtype, wanted, strided
):
    torch.manual_seed(seed)
    pooled, local = (scale * randn(batch, dim)).to(dtype), randn(batch, dim, dtype=dtype)
    if zero:
        pooled[0] = 0
    if strided:
        pooled, local = pooled.T.contiguous().T, local.repeat_interleave(2, dim=1)[:, ::2]
    check_similarity(pooled, local, wanted)


@pytest.mark.cuda
@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_similarity_of_many_blocks(dtype):
    torch.manual_seed(10)
    check_similarity(*(randn(2500, 501, dtype=dtype) for _ in range(2)), (True, True))


def check_similarity(pooled: Tensor, local: Tensor, wanted: tuple[bool, bool]) -> None:
    """The loss and the wanted gradients against the reference in float64."""
    dtype, batch = pooled.dtype, len(pooled)
    inputs = [leaf(x, want) for x, want in zip((pooled, local), wanted, strict=True)]
    wide = [leaf(x.double(), want) for x, want in zip((pooled, local), wanted, strict=True)]
    got = token_similarity_loss(*inputs, backend="triton")
    exact = token_similarity_loss(*wide, backend="reference")
    # A cosine is wrong by a few roundings of one, and so is what depends on it: 16 of them.
    few = 16 * 2.0**-24
    assert got.dtype == torch.float32 and abs(got - exact) <= few * 4
    three = torch.tensor(3.0, device=DEVICE)  # an upstream gradient that is dropped would show
    for x, mine, theirs in zip(
        (x for x, want in zip(wide, wanted, strict=True) if want),
        gradients(got, three, [x for x in inputs if x.requires_grad]),
        gradients(exact, three, [x for x in wide if x.requires_grad]),
        strict=True,
    ):
        assert mine is not None and theirs is not None and mine.dtype == dtype
        # Of a cosine near one the gradient is a difference of vectors of length one, over |x|.
        lengths = x.detach().norm(dim=1)
        size = 12 / batch * (1 / lengths[lengths > 0]).sum()
        # float16 numbers below 2^-14 have fewer digits: each is wrong by up to 2^-24.
        tiny = 2.0**-24 * mine.numel() ** 0.5 if dtype == torch.float16 else 0.0
        error = (mine.double() - theirs).norm()
        assert error <= ROUNDING[dtype] * theirs.norm() + few * size + tiny


def test_token_similarity_of_nothing_zeros_and_tiny_vectors():
    empty = torch.zeros(0, 3, device=DEVICE, requires_grad=True)
    loss = token_similarity_loss(empty, empty, backend="triton")
    assert loss.isnan() and torch.autograd.grad(loss, empty)[0].shape == (0, 3)
    for x in (torch.zeros(2, 3), torch.full((2, 3), 1e-14)):
        inputs = [leaf(x.to(DEVICE)), leaf(torch.eye(2, 3).to(DEVICE))]
        one, other = (token_similarity_loss(*inputs, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(one, other)
        for a, b in zip(
            torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_token_similarity_is_an_operator_with_the_same_bits_again():
    torch.manual_seed(0)
    pooled, local = (leaf(randn(9, 20, dtype=torch.float32)) for _ in range(2))
    torch.library.opcheck(token_similarity, (pooled, local))
    loss, rows = token_similarity(pooled, local)
    for need in ((True, False), (False, True)):
        saved = torch.ones_like(loss), pooled.detach(), local.detach(), rows.detach()
        torch.library.opcheck(token_similarity_backward, (*saved, *need))
    runs = []
    for _ in range(2):
        loss = token_similarity_loss(pooled, local, backend="triton")
        runs.append([loss, *torch.autograd.grad(loss, [pooled, local])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

"""region_mean, span_mean, token_similarity_loss, farthest_point_sampling and soft_cluster_pool.

Against `reference.py` in float64, against values worked out by hand, and at the edges: empty
batches, masks, duplicates, bad values, dtypes, autocast, compilation.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgoal_kernels import reference
from fastgoal_kernels.functional import token_ops
from fastgoal_kernels.functional.token_ops import (
    farthest_point_sampling,
    region_mean,
    soft_cluster_pool,
    span_mean,
    token_similarity_loss,
)
from fastgoal_kernels.ops.farthest_points import farthest_points

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
seeds = st.integers(0, 2**31)

# Float64 sums of at most a few hundred terms of size one, in another order: 1e-12 is a hundred
# times what rounding can do, and far below any mistake.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int, device: str = "cpu", grad: bool = False, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def random_boxes(count: int, sizes: Tensor) -> Tensor:
    """Boxes of every kind: inside, across the border, outside, thinner than a patch, empty."""
    corners = (torch.rand(count, 2, 2, dtype=torch.float64) * 1.6 - 0.3) * sizes[:, None]
    corners = torch.where(torch.rand(count, 1, 1) < 0.5, (corners * 2).round() / 2, corners)
    corners = torch.where(torch.rand(count, 1, 2) < 0.1, corners[:, :1], corners)
    return corners.sort(dim=1).values.flatten(1)


def assert_same_with_gradient(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(one, other, **EXACT)
    assert one.requires_grad
    if not other.requires_grad:  # the reference of no boxes is a fresh tensor
        assert one.numel() == 0
        return
    weight = torch.randn(one.shape, dtype=torch.float64).to(one.device)
    for a, b in zip(
        torch.autograd.grad((one * weight).sum(), inputs),
        torch.autograd.grad((other * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


def assert_compiles_once(function, argument_lists) -> None:
    """fullgraph, and after the second call (which makes the sizes dynamic) nothing recompiles."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    counts = []
    for arguments in argument_lists:
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
        counts.append(counter.frame_count)
    assert len(set(counts[1:])) == 1, f"graphs after each call: {counts}"


# ---------------------------------------------------------------------------------------------
# region_mean
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    seed=seeds, images=st.integers(1, 4), boxes=st.integers(0, 6), height=st.integers(1, 5),
    width=st.integers(1, 6), patch=st.integers(1, 16), mapped=st.booleans(),
)  # fmt: skip
def test_region_mean_is_the_reference(device, seed, images, boxes, height, width, patch, mapped):
    torch.manual_seed(seed)
    tokens = randn(images, height * width, 3, device=device, grad=True)
    sizes = torch.randint(1, 60, (images, 2))
    box_image = torch.randint(0, images, (boxes,)) if mapped else torch.arange(images)
    box = random_boxes(len(box_image), sizes[box_image].double())
    arguments = (tokens, box.to(device), sizes.to(device), (height, width), patch * height)
    keywords = {"box_image": box_image.to(device)} if mapped else {}
    assert_same_with_gradient(
        region_mean(*arguments, **keywords),
        region_mean(*arguments, **keywords, backend="reference"),
        [tokens],
    )


def patches_of(box, size, grid=(4, 4), model_size=8) -> set[tuple[int, int]]:
    """The (row, column) patches that region_mean averages, read from its gradient."""
    tokens = torch.zeros(1, grid[0] * grid[1], 1, dtype=torch.float64, requires_grad=True)
    mean = region_mean(tokens, torch.tensor([box]), torch.tensor([size]), grid, model_size)
    (gradient,) = torch.autograd.grad(mean.sum(), tokens)
    used = gradient.view(grid).nonzero().tolist()
    assert torch.allclose(gradient.sum(), torch.ones((), dtype=torch.float64))
    assert len(gradient.unique()) <= 2  # equal weights
    return {(row, column) for row, column in used}


def block(rows: range, columns: range) -> set[tuple[int, int]]:
    return {(row, column) for row in rows for column in columns}


# Patches are 2 x 2 pixels of the 8 x 8 model input.
REGIONS = {
    "the whole image": ([0, 0, 8, 8], [8, 8], block(range(4), range(4))),
    "aligned patches": ([2, 4, 6, 8], [8, 8], block(range(2, 4), range(1, 3))),
    "touched patches count whole": ([1, 1, 3, 3], [8, 8], block(range(2), range(2))),
    # 80 x 16 is squashed: x shrinks by 10 and y by 2, so the box is x 2..6, y 0..4.
    "squashed, not cropped": ([20, 0, 60, 8], [80, 16], block(range(2), range(1, 3))),
    # 2.5 rounds to 2 and 3.5 to 4: x 2..4 is column 1 alone. Half up would give 3..4, also
    # column 1, but y 2.5..4.5 -> 2..4 is row 1 alone, where half up gives 3..5: rows 1 and 2.
    "halves round to even": ([2.5, 2.5, 3.5, 4.5], [8, 8], {(1, 1)}),
    # 2.4 rounds to 2 on both sides: no patch, so the one under the centre (2.4, 2.4).
    "no patch: the centre's": ([2.4, 2.4, 2.4, 2.4], [8, 8], {(1, 1)}),
    "no patch in one axis: the centre's": ([4.1, 0, 4.2, 8], [8, 8], {(2, 2)}),
    "across the border: clipped": ([-5, 5, 3, 20], [8, 8], block(range(2, 4), range(2))),
    # x1 is clamped to 7 and x2 to 8, which is the last column.
    "outside, right": ([20, 0, 30, 8], [8, 8], block(range(4), range(3, 4))),
    # x1 and x2 are clamped to 0: no patch; the centre is clamped to (0, 4).
    "outside, left": ([-20, 0, -10, 8], [8, 8], {(2, 0)}),
}


@pytest.mark.parametrize("name", REGIONS)
def test_region_mean_by_hand(name):
    box, size, expected = REGIONS[name]
    assert patches_of([float(x) for x in box], size) == expected


def test_the_first_corner_rounds_half_to_even_too():
    # Patches of 3 pixels: 2.5 rounds to 2, which is patch 0; half up would give 3, patch 1.
    assert patches_of([2.5, 8.5, 12.0, 12.0], [12, 12], model_size=12) == block(
        range(2, 4), range(4)
    )


def test_region_mean_value_by_hand():
    tokens = torch.arange(12.0).view(1, 6, 2)  # 2 x 3 patches of 4 pixels
    boxes = torch.tensor([[5.0, 0.0, 12.0, 8.0], [0.0, 0.0, 4.0, 4.0]])
    mean = region_mean(
        tokens, boxes, torch.tensor([[12, 12]]), (2, 3), 12, box_image=torch.tensor([0, 0])
    )
    # 12 x 12 pixels over 3 columns of 4 and 2 rows of 6: columns 1 and 2, rows 0 and 1.
    expected = tokens[0, [1, 2, 4, 5]].mean(dim=0)
    torch.testing.assert_close(mean, torch.stack([expected, tokens[0, 0]]))


@pytest.mark.parametrize("device", DEVICES)
def test_region_mean_takes_integer_boxes_views_and_empty_batches(device):
    tokens = randn(2, 5, 6, device=device).transpose(1, 2)[:, ::2, 1:]  # (2, 3, 4) of a view
    boxes = torch.tensor([[0, 0, 4, 4], [2, 0, 9, 3]], device=device)
    sizes = torch.tensor([[9, 4], [9, 4]], device=device)
    expected = reference.region_mean(tokens, boxes, sizes, (1, 3), 6)
    torch.testing.assert_close(region_mean(tokens, boxes, sizes, (1, 3), 6), expected)
    none = region_mean(tokens[:0], boxes[:0], sizes[:0], (1, 3), 6)
    assert none.shape == (0, 4)
    grown = tokens.detach().contiguous().requires_grad_()
    no_box = torch.zeros(0, dtype=torch.long, device=device)
    region_mean(grown, boxes[:0], sizes, (1, 3), 6, box_image=no_box).sum().backward()
    assert grown.grad is not None and not grown.grad.any()


def test_a_nan_patch_outside_the_box_stays_outside():
    tokens = torch.ones(1, 4, 2)
    tokens[0, 3] = torch.nan
    mean = region_mean(tokens, torch.tensor([[0.0, 0, 4, 2]]), torch.tensor([[4, 4]]), (2, 2), 4)
    assert mean.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("device", DEVICES)
def test_bad_values_that_nobody_looked_at_read_nothing_outside(device, monkeypatch):
    """What a CUDA tensor would be: the checks off, the values clamped."""
    monkeypatch.setattr(token_ops, "values_are_checked", lambda _: False)
    monkeypatch.setattr("fastgoal_kernels.checks.values_are_checked", lambda _: False)
    tokens = randn(2, 6, 3, device=device)
    inf, nan = float("inf"), float("nan")
    boxes = torch.tensor(
        [[nan] * 4, [-inf, -inf, inf, inf], [9.0, 9, 1, 1], [1e300, 0, 1e300, 4], [0, 0, 1, 1]],
        device=device, dtype=torch.float64,
    )  # fmt: skip
    sizes = torch.tensor([[4, 4], [0, -3]], device=device)
    box_image = torch.tensor([-7, 0, 0, 10**12, 1], device=device)
    assert region_mean(tokens, boxes, sizes, (2, 3), 4, box_image=box_image).isfinite().all()
    spans = torch.tensor([[-5, 3], [4, 2], [10**12, 10**13], [0, 99]], device=device)
    text = torch.tensor([-1, 0, 1, 10**12], device=device)
    lengths = torch.tensor([-4, 10**12], device=device)
    assert span_mean(tokens, spans, span_text=text, lengths=lengths).isfinite().all()


BAD_REGIONS = {
    "reversed": ({"boxes": torch.tensor([[0.0, 0, 1, 1], [5, 0, 1, 1]])}, "boxes.*row 1.*reversed"),
    "not finite": ({"boxes": torch.full((2, 4), torch.nan)}, "boxes.*row 0 is not finite"),
    "an image without width": (
        {"image_sizes": torch.tensor([[4, 4], [0, 4]])}, "image_sizes.*row 1"
    ),
    "box_image past the end": ({"box_image": torch.tensor([0, 2])}, r"box_image.*\[0, 2\)"),
    "box_image of the wrong length": ({"box_image": torch.tensor([0])}, "box_image"),
    "no box_image for three boxes": ({"boxes": torch.ones(3, 4)}, "pass box_image"),
    "boxes with three columns": ({"boxes": torch.ones(2, 3)}, r"boxes.*\(2, 3\)"),
    "a CLS token": ({"tokens": torch.ones(2, 5, 3)}, "drop the CLS token"),
    "an empty grid": ({"grid_size": (0, 4)}, "grid_size"),
    "too few image sizes": ({"image_sizes": torch.ones(1, 2)}, "image_sizes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REGIONS)
def test_bad_regions_are_named(name):
    good = {
        "tokens": torch.ones(2, 4, 3), "boxes": torch.tensor([[0.0, 0, 1, 1]] * 2),
        "image_sizes": torch.tensor([[4, 4]] * 2), "grid_size": (2, 2), "model_size": 8,
    }  # fmt: skip
    region_mean(**good)
    changes, message = BAD_REGIONS[name]
    with pytest.raises(ValueError, match=message):
        region_mean(**good | changes)


# ---------------------------------------------------------------------------------------------
# span_mean
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    seed=seeds, texts=st.integers(1, 4), count=st.integers(0, 6), context=st.integers(1, 9),
    mapped=st.booleans(), measured=st.booleans(),
)  # fmt: skip
def test_span_mean_is_the_reference(device, seed, texts, count, context, mapped, measured):
    torch.manual_seed(seed)
    tokens = randn(texts, context, 3, device=device, grad=True)
    count = count if mapped else texts
    spans = torch.randint(0, context + 4, (count, 2)).sort(dim=1).values.to(device)
    keywords = {}
    if mapped:
        keywords["span_text"] = torch.randint(0, texts, (count,), device=device)
    if measured:
        keywords["lengths"] = torch.randint(0, context + 1, (texts,), device=device)
    assert_same_with_gradient(
        span_mean(tokens, spans, **keywords),
        span_mean(tokens, spans, **keywords, backend="reference"),
        [tokens],
    )


def test_span_mean_by_hand():
    tokens = torch.arange(10.0).view(2, 5, 1)  # texts 0..4 and 5..9
    spans = torch.tensor([[1, 4], [3, 99], [7, 9], [2, 2], [2, 2]])
    text = torch.tensor([0, 0, 1, 0, 1])
    mean = span_mean(tokens, spans, span_text=text, lengths=torch.tensor([4, 0]))
    # Half-open; clipped; past the context, so the last of length 0 (its first token); the last of
    # length 4; the last of length 0.
    assert mean.flatten().tolist() == [2.0, 3.5, 5.0, 3.0, 5.0]
    assert span_mean(tokens, spans[3:], span_text=text[3:]).flatten().tolist() == [4.0, 9.0]


BAD_SPANS = {
    "negative": ({"spans": torch.tensor([[0, 1], [-1, 2]])}, "row 1"),
    "reversed": ({"spans": torch.tensor([[3, 1], [0, 2]])}, "row 0"),
    "one too many": ({"spans": torch.zeros(3, 2, dtype=torch.long)}, "pass span_text"),
    "span_text out of range": ({"span_text": torch.tensor([0, 5])}, "span_text"),
    "lengths past the context": ({"lengths": torch.tensor([4, 5])}, "lengths"),
    "no context": ({"tokens": torch.ones(2, 0, 3)}, "no token"),
}


@pytest.mark.parametrize("name", BAD_SPANS)
def test_bad_spans_are_named(name):
    good = {"tokens": torch.ones(2, 4, 3), "spans": torch.tensor([[0, 1], [1, 2]])}
    span_mean(**good)
    changes, message = BAD_SPANS[name]
    with pytest.raises(ValueError, match=message):
        span_mean(**good | changes)
    with pytest.raises(TypeError, match="spans must be int"):
        span_mean(torch.ones(2, 4, 3), torch.ones(2, 2))


# ---------------------------------------------------------------------------------------------
# Both means: precision, memory, compilation, gradients
# ---------------------------------------------------------------------------------------------


def both_means(tokens: Tensor, box: Tensor, sizes: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    return region_mean(tokens, box, sizes, (2, 3), 12), span_mean(tokens, spans)


def mean_arguments(batch: int, device: str, dtype=torch.float64, dim: int = 4) -> tuple:
    sizes = torch.randint(4, 40, (batch, 2))
    spans = torch.randint(0, 7, (batch, 2)).sort(dim=1).values
    boxes = random_boxes(batch, sizes.double())
    return (
        randn(batch, 6, dim, device=device, dtype=dtype),
        *(x.to(device) for x in (boxes, sizes, spans)),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_round_once(device, dtype):
    """The result is the float64 mean rounded to the dtype, give or take the float32 sums."""
    torch.manual_seed(0)
    tokens, *rest = mean_arguments(16, device, dtype, dim=64)
    tokens.requires_grad_()
    got = both_means(tokens, *rest)
    (gradient,) = torch.autograd.grad(sum(x.float().sum() for x in got), tokens)
    assert gradient.dtype == dtype
    for one, exact in zip(got, both_means(tokens.double(), *rest), strict=True):
        assert one.dtype == dtype
        # Half a unit in the last place, relative to values of size one, and the float32 sums.
        tolerance = torch.finfo(dtype).eps / 2 * 1.01 + 8 * 2**-24
        torch.testing.assert_close(one.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_means_under_autocast(device):
    arguments = mean_arguments(3, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        got = both_means(*arguments)
        loss = token_similarity_loss(arguments[0][:, 0], arguments[0][:, 1])
    expected = both_means(arguments[0].bfloat16(), *arguments[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_means_compile_once(device):
    batches = [mean_arguments(n, device) for n in (3, 4, 6, 9)]
    assert_compiles_once(both_means, batches)


def test_means_are_the_same_bits_again():
    arguments = mean_arguments(7, "cpu", torch.float32)
    tokens = arguments[0].requires_grad_()
    box_image = torch.tensor([0, 3, 3, 3, 6, 6, 0])

    def run() -> list[Tensor]:
        mean = region_mean(*arguments[:3], (2, 3), 12, box_image=box_image)
        return [mean, *torch.autograd.grad(mean.square().sum(), tokens)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_token_ops_gradcheck():
    torch.manual_seed(0)
    tokens, *rest = mean_arguments(3, "cpu")
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: both_means(x, *rest), tokens)
    pair = randn(3, 4, grad=True), randn(3, 4, grad=True)
    assert torch.autograd.gradcheck(token_similarity_loss, pair)
    assert torch.autograd.gradcheck(lambda a, b: token_similarity_loss(a, b, mode="matrix"), pair)
    clusters = randn(2, 5, 3, grad=True), randn(2, 5, 4, grad=True)
    assert torch.autograd.gradcheck(soft_cluster_pool, clusters)


@pytest.mark.parametrize("device", DEVICES)
def test_means_name_the_derivatives_that_they_do_not_have(device):
    tokens, *rest = mean_arguments(3, device, torch.float32)
    tokens.requires_grad_()
    for mean in both_means(tokens, *rest):
        (gradient,) = torch.autograd.grad(mean.square().sum(), tokens, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
            gradient.sum().backward()
    plain = tokens.detach()
    with pytest.raises(RuntimeError, match="no forward mode"):
        torch.func.jvp(lambda x: both_means(x, *rest), (plain,), (plain,))
    with pytest.raises(RuntimeError, match=r"no derivative by torch\.func"):
        torch.func.grad(lambda x: both_means(x, *rest)[0].sum())(plain)


# ---------------------------------------------------------------------------------------------
# token_similarity_loss
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["diagonal", "matrix"])
@settings(max_examples=30, deadline=None)
@given(seed=seeds, batch=st.integers(1, 5), dim=st.integers(1, 6), zero=st.booleans())
def test_token_similarity_loss_is_the_reference(device, mode, seed, batch, dim, zero):
    torch.manual_seed(seed)
    pooled, local = randn(batch, dim, device=device), randn(batch, dim, device=device)
    if zero:
        pooled[0] = 0
    pooled.requires_grad_(), local.requires_grad_()
    assert_same_with_gradient(
        token_similarity_loss(pooled, local, mode=mode),
        token_similarity_loss(pooled, local, mode=mode, backend="reference"),
        [pooled, local],
    )


def test_token_similarity_loss_by_hand():
    pooled = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    local = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    # Cosines [[1, 0.6], [0, 0.8]].
    diagonal = (0 + 0.2**2) / 2
    torch.testing.assert_close(token_similarity_loss(pooled, local).item(), diagonal)
    matrix = (0 + 0.6**2 + 0 + 0.2**2) / 4
    got = token_similarity_loss(pooled, local, mode="matrix").item()
    torch.testing.assert_close(got, matrix)


def test_token_similarity_loss_gives_a_zero_vector_no_gradient():
    pooled = torch.zeros(1, 3, requires_grad=True)
    local = torch.ones(1, 3, requires_grad=True)
    loss = token_similarity_loss(pooled, local)
    loss.backward()
    assert loss.item() == 1
    assert pooled.grad is not None and not pooled.grad.any()
    assert local.grad is not None and not local.grad.any()


def test_token_similarity_loss_rejects_bad_input():
    with pytest.raises(ValueError, match=r"pooled \(2, 3\) and local \(3, 3\)"):
        token_similarity_loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="mode"):
        token_similarity_loss(torch.ones(2, 3), torch.ones(2, 3), mode="rows")
    with pytest.raises(TypeError, match="local must be floating"):
        token_similarity_loss(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("device", DEVICES)
def test_token_similarity_loss_of_mixed_dtypes_and_compiled(device):
    a, b = randn(3, 4, device=device, dtype=torch.bfloat16), randn(3, 4, device=device)
    assert token_similarity_loss(a, b).dtype == torch.float64
    assert token_similarity_loss(a, b.half()).dtype == torch.float32
    batches = [(randn(n, 4, device=device), randn(n, 4, device=device)) for n in (3, 5, 6, 8)]
    assert_compiles_once(token_similarity_loss, batches)


# ---------------------------------------------------------------------------------------------
# farthest_point_sampling
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=80, deadline=None)
@given(
    seed=seeds, batch=st.integers(0, 4), count=st.integers(1, 9), samples=st.integers(1, 12),
    spread=st.integers(1, 3), masked=st.booleans(),
)  # fmt: skip
def test_farthest_points_are_the_reference(device, seed, batch, count, samples, spread, masked):
    """Small integer points: exact distances, many ties and many duplicates."""
    torch.manual_seed(seed)
    points = torch.randint(-spread, spread + 1, (batch, count, 2), device=device).float()
    mask = torch.rand(batch, count, device=device) < 0.6 if masked else None
    start = int(torch.randint(0, count, ()))
    got = farthest_point_sampling(points, samples, start=start, mask=mask)
    expected = farthest_point_sampling(points, samples, start=start, mask=mask, backend="reference")
    assert torch.equal(got, expected)


def test_farthest_points_by_hand():
    line = torch.tensor([[[0.0], [1.0], [10.0], [4.0], [10.0]]])
    # From 0: 10 (index 2, the lower of two), then 4 (6 away), then 1, then the duplicate 10.
    assert farthest_point_sampling(line, 5).tolist() == [[0, 2, 3, 1, 0]]
    # At the last step all distances are 0 (indices 0 and 4 tie): the lowest index.
    mask = torch.tensor([[True, True, False, True, False]])
    # Masked 10s are never chosen; with 0, 4 and 1 taken none is left, and the first repeats.
    assert farthest_point_sampling(line, 5, mask=mask).tolist() == [[0, 3, 1, 0, 0]]
    # A masked start is still the first; and when everything is masked it is all there is.
    assert farthest_point_sampling(line, 3, start=2, mask=mask).tolist() == [[2, 0, 3]]
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    assert farthest_point_sampling(line, 3, start=2, mask=nothing).tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_farthest_points_tells_near_duplicates_apart(device):
    """Points 1e-3 apart, 1,000 from the origin: a float32 Gram matrix sees only noise."""
    torch.manual_seed(0)
    points = (1000 + torch.rand(8, 32, 16, dtype=torch.float64) * 1e-3).float().to(device)
    got = farthest_point_sampling(points, 16)
    assert torch.equal(got, farthest_point_sampling(points.double(), 16))


@pytest.mark.parametrize("device", DEVICES)
def test_farthest_points_with_nan_stay_indices(device):
    points = randn(2, 6, 3, device=device)
    points[0, 2] = torch.nan
    got = farthest_point_sampling(points, 9)
    assert ((got >= 0) & (got < 6)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_farthest_points_is_an_operator(device):
    points = randn(3, 6, 4, device=device, grad=True)
    mask = torch.rand(3, 6, device=device) < 0.7
    backend = "triton" if device == "cuda" else "torch"
    for options in ((4, 1, mask), (9, 0, None)):
        torch.library.opcheck(farthest_points, (points.detach().float(), *options, backend))
    assert not farthest_point_sampling(points, 3).requires_grad
    view = points.detach().transpose(0, 1)
    assert torch.equal(
        farthest_point_sampling(view, 3), farthest_point_sampling(view.contiguous(), 3)
    )
    batches = [(randn(n, 7, 4, device=device), 5) for n in (3, 5, 6, 8)]
    assert_compiles_once(farthest_point_sampling, batches)


def test_farthest_points_rejects_bad_input():
    points = torch.ones(2, 5, 3)
    with pytest.raises(ValueError, match=r"start must be an index.*got 5"):
        farthest_point_sampling(points, 2, start=5)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        farthest_point_sampling(points, 0)
    with pytest.raises(ValueError, match="mask has shape"):
        farthest_point_sampling(points, 2, mask=torch.ones(2, 4, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------
# soft_cluster_pool
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30, deadline=None)
@given(
    seed=seeds, batch=st.integers(0, 3), tokens=st.integers(1, 5), clusters=st.integers(1, 4)
)  # fmt: skip
def test_soft_cluster_pool_is_its_formula(device, seed, batch, tokens, clusters):
    torch.manual_seed(seed)
    x = randn(batch, tokens, 3, device=device)
    logits = 5 * randn(batch, tokens, clusters, device=device)
    expected = torch.zeros(batch, clusters, 3, dtype=torch.float64, device=device)
    for n in range(batch):
        share = logits[n].exp() / logits[n].exp().sum(dim=1, keepdim=True)
        for m in range(clusters):
            expected[n, m] = (share[:, m, None] * x[n]).sum(dim=0) / share[:, m].sum()
    torch.testing.assert_close(soft_cluster_pool(x, logits), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
def test_soft_cluster_pool_dtypes_autocast_compile_and_errors(device):
    x, logits = randn(2, 5, 3, device=device), randn(2, 5, 4, device=device)
    assert soft_cluster_pool(x.bfloat16(), logits.float()).dtype == torch.bfloat16
    wide = soft_cluster_pool(x.float(), logits)
    assert torch.equal(wide, soft_cluster_pool(x.float().double(), logits))
    with torch.autocast(device, torch.bfloat16):
        got = soft_cluster_pool(x.float(), logits.float())
    # Under autocast only the tokens are rounded: the softmax and the sums stay float32.
    exact = soft_cluster_pool(x.float().bfloat16(), logits.float())
    assert torch.equal(got, exact)
    batches = [(randn(n, 5, 3, device=device), randn(n, 5, 4, device=device)) for n in (3, 5, 6, 8)]
    assert_compiles_once(soft_cluster_pool, batches)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\) and assign_logits \(2, 4, 5\)"):
        soft_cluster_pool(x, logits.transpose(1, 2))

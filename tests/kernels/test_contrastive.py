"""CLIP's and SigLIP's losses of plain features: the torch backend against the definition."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgoal_kernels import reference
from fastgoal_kernels.backends import BackendError, use_backend
from fastgoal_kernels.functional.contrastive import (
    clip_contrastive_loss,
    row_cross_entropy,
    sigmoid_contrastive_loss,
)
from fastgoal_kernels.ops import feature_loss, feature_loss_torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BIG_TILE = 1 << 19


def tiles_of(elements: int):
    """Small tiles, so that small inputs cross their borders."""
    sizes = {"cpu": elements, "cuda": elements}
    return mock.patch.object(feature_loss_torch, "_TILE_ELEMENTS", sizes)


def draw(*shape: int, dtype=torch.float64, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.double(), dim=1).to(x.dtype)


def value_and_grads(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    # An upstream gradient that is not 1, so that one which is dropped shows.
    return [loss.detach(), *torch.autograd.grad(3 * loss, inputs, allow_unused=True)]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-300))


# ---------------------------------------------------------------------------------------------
# Meaning: forward and every gradient against reference.py in float64
# ---------------------------------------------------------------------------------------------

SCALES = st.sampled_from([1e-3, 1.0, 14.3, 100.0, 1000.0])


@st.composite
def feature_pairs(draw_from, square: bool) -> dict[str, Any]:
    images = draw_from(st.integers(0 if not square else 1, 9))
    texts = images if square else draw_from(st.integers(0, 13))
    dim, seed = draw_from(st.integers(1, 7)), draw_from(st.integers(0, 999))
    image, text = draw(images, dim, seed=seed), draw(texts, dim, seed=seed + 1)
    if draw_from(st.booleans()):  # views that are not contiguous
        image = draw(images, 2 * dim, seed=seed)[:, ::2]
        text = draw(dim, texts, seed=seed + 1).T
    if images and draw_from(st.booleans()):
        image = image.index_fill(0, torch.tensor([images - 1]), 0)  # a zero vector
    mask = None
    if draw_from(st.booleans()):
        mask = draw(images, texts, seed=seed + 2) > draw_from(st.sampled_from([-0.5, 0.5, 9.0]))
    return {
        "image": image, "text": text, "mask": mask, "scale": draw_from(SCALES),
        "bias": draw_from(st.sampled_from([0.0, -10.0, 2.5])),
        "normalize": draw_from(st.booleans()),
        "tile": draw_from(st.sampled_from([1, 6, 20, BIG_TILE])),
    }  # fmt: skip


def assert_matches_reference(op, definition, case: dict[str, Any], **options) -> None:
    inputs = [
        case["image"].clone(memory_format=torch.preserve_format).requires_grad_(),
        case["text"].clone(memory_format=torch.preserve_format).requires_grad_(),
        torch.tensor(case["scale"], dtype=torch.float64, requires_grad=True),
        torch.tensor(case["bias"], dtype=torch.float64, requires_grad=True),
    ]
    options |= {"pair_mask": case["mask"], "normalize": case["normalize"]}
    with tiles_of(case["tile"]):
        out = value_and_grads(op(*inputs, **options, backend="torch"), inputs)
    expected = value_and_grads(definition(*inputs, **options), inputs)
    # A logit of size scale * |v| |t| is rounded at 1e-16 of itself, which a softmax passes on as a
    # relative error; gradients carry another factor scale. Unnormalised features reach |v||t| = 50;
    # normalising divides the gradient, cancelled digits and all, by the feature's length.
    lengths = torch.cat([case["image"].norm(dim=1), case["text"].norm(dim=1)])
    shortest = min(lengths[lengths > 0].tolist(), default=1.0)
    size = 1 + case["scale"] * (max(1.0, 1 / shortest) if case["normalize"] else 50)
    for got, want in zip(out, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-14 * size, atol=1e-14 * size)


@settings(max_examples=150, deadline=None)
@given(feature_pairs(square=True), st.sampled_from([0.0, 0.1, 0.7]))
def test_clip_loss_means_the_reference(case, label_smoothing):
    assert_matches_reference(
        clip_contrastive_loss, reference.clip_contrastive_loss, case,
        label_smoothing=label_smoothing,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    feature_pairs(square=False),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["texts", "images"]),
)
def test_sigmoid_loss_means_the_reference(case, captions_per_image, negative_only, average_over):
    assert_matches_reference(
        sigmoid_contrastive_loss, reference.sigmoid_contrastive_loss, case,
        captions_per_image=captions_per_image, negative_only=negative_only,
        average_over=average_over,
    )  # fmt: skip


@pytest.mark.parametrize("first", [0, 3, 6])
@pytest.mark.parametrize("tile", [1, 6, BIG_TILE])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_row_cross_entropy_is_pytorchs(first, tile, backend):
    rows, columns = leaf(draw(4, 5)), leaf(draw(10, 5, seed=1))
    scale, bias = leaf(torch.tensor(3.0).double()), leaf(torch.tensor(-1.0).double())
    inputs = [rows, columns, scale]
    with tiles_of(tile):
        loss = row_cross_entropy(rows, columns, scale, bias, first_target=first, backend=backend)
        out = value_and_grads(loss, inputs)
    logits = scale * rows @ columns.T + bias
    expected = value_and_grads(F.cross_entropy(logits, torch.arange(first, first + 4)), inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tile", [4, BIG_TILE])
def test_gradcheck(tile):
    mask = draw(5, 5, seed=3) > -0.3
    image, text = leaf(draw(5, 3)), leaf(draw(5, 3, seed=1))
    scale = leaf(torch.tensor(2.0).double())
    bias = leaf(torch.tensor(-1.0).double())

    def clip(image, text, scale, bias):
        return clip_contrastive_loss(
            image, text, scale, bias, pair_mask=mask, label_smoothing=0.2, normalize=True
        )

    def sigmoid(image, text, scale, bias):
        return sigmoid_contrastive_loss(
            image[:2], text, scale, bias, pair_mask=mask[:2], captions_per_image=2
        )

    with tiles_of(tile):
        assert torch.autograd.gradcheck(clip, (image, text, scale, bias))
        assert torch.autograd.gradcheck(sigmoid, (image, text, scale, bias))


def test_a_positive_can_not_be_masked():
    image, text = draw(6, 4), draw(6, 4, seed=1)
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    assert float(clip_contrastive_loss(image, text, 5.0, pair_mask=nothing)) == 0
    positives = torch.eye(6, dtype=torch.bool)
    loss = sigmoid_contrastive_loss(image, text, 5.0, -1.0, pair_mask=nothing)
    expected = -F.logsigmoid(5 * image @ text.T - 1)[positives].mean()
    torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 1000.0])
@pytest.mark.parametrize("op", ["clip", "sigmoid"])
def test_float32_is_as_good_as_eager_at_every_scale(op, scale, device):
    """The same sums in another order: errors of eager's own size, at no scale Inf or NaN."""
    image, text = unit(draw(96, 32, device=device)), unit(draw(96, 32, device=device, seed=1))
    text = unit(text + 0.5 * image)  # matched pairs, as training makes them
    if op == "clip":
        ours, eager, bias = clip_contrastive_loss, reference.clip_contrastive_loss, 0.0
    else:
        ours, eager = sigmoid_contrastive_loss, reference.sigmoid_contrastive_loss
        bias = -10.0

    def run(loss, dtype, **options):
        inputs = [leaf(image.to(dtype)), leaf(text.to(dtype))]
        inputs.append(torch.tensor(scale, dtype=dtype, device=device, requires_grad=True))
        return value_and_grads(loss(*inputs, bias, **options), inputs)

    image, text = image.float().double(), text.float().double()
    expected = run(eager, torch.float64)
    with tiles_of(700):
        out = run(ours, torch.float32, backend="torch")
    for got, plain, want in zip(out, run(eager, torch.float32), expected, strict=True):
        assert got.isfinite().all()
        # Two orders of the same roundings differ by chance; 4e-6 is 32 units of rounding.
        assert relative_error(got, want) <= 2 * relative_error(plain, want) + 4e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["clip", "sigmoid"])
def test_half_precision_errs_no_more_than_eager(op, dtype, device):
    """Eager as trainers write it, logits in the features' dtype; allowed: 1.1 times its error."""
    n = 64
    image = unit(draw(n, 32, device=device)).to(dtype)
    text = unit(image.double() + draw(n, 32, device=device, seed=1)).to(dtype)
    target = torch.arange(n, device=device)
    sign = 2 * torch.eye(n, device=device) - 1

    def eager(image, text, scale):
        logits = scale.to(image.dtype) * image @ text.T
        if op == "sigmoid":
            return -F.logsigmoid(sign.to(logits.dtype) * (logits - 10)).sum() / n
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def ours(image, text, scale):
        if op == "sigmoid":
            return sigmoid_contrastive_loss(image, text, scale, -10.0, backend="torch")
        return clip_contrastive_loss(image, text, scale, backend="torch")

    def run(loss, dtype):
        inputs = [leaf(image.to(dtype)), leaf(text.to(dtype))]
        inputs.append(torch.tensor(16.0, dtype=torch.float64, device=device, requires_grad=True))
        value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    out = run(ours, dtype)
    assert out[0].dtype == torch.float32
    assert out[1].dtype == out[2].dtype == dtype
    for got, plain, want in zip(out, run(eager, dtype), run(eager, torch.float64), strict=True):
        assert relative_error(got, want) <= 1.1 * relative_error(plain, want)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_features_in_its_dtype_and_sums_in_float32(device):
    image, text = (leaf(draw(8, 4, device=device, seed=s).float()) for s in (0, 1))
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    half = image.bfloat16(), text.bfloat16()
    for loss in (clip_contrastive_loss, sigmoid_contrastive_loss):
        with torch.autocast(device, dtype=torch.bfloat16):
            value = loss(image, text, scale, -2.0, normalize=True)
            # Backward in the region too: its products must not become bfloat16.
            inside = torch.autograd.grad(value, [image, text, scale])
        expected = loss(*half, scale, -2.0, normalize=True)
        outside = torch.autograd.grad(expected, [image, text, scale])
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
        for got, want in zip(inside, outside, strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, want)
    wide = image.double().detach()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert clip_contrastive_loss(wide, wide, 3.0).dtype == torch.float64


def test_mixed_dtypes_promote():
    image, text = draw(4, 3).bfloat16(), leaf(draw(4, 3, seed=1).float())
    loss = clip_contrastive_loss(image, text, 5.0)
    torch.testing.assert_close(loss, clip_contrastive_loss(image.float(), text, 5.0))
    assert torch.autograd.grad(loss, text)[0].dtype == torch.float32
    assert clip_contrastive_loss(image.double(), text, 5.0).dtype == torch.float64


def test_a_nan_feature_gives_a_nan_loss():
    image = draw(4, 3).index_fill(0, torch.tensor([2]), math.nan)
    assert clip_contrastive_loss(image, draw(4, 3), 5.0).isnan()
    assert sigmoid_contrastive_loss(image, draw(4, 3), 5.0, 0.0).isnan()


# ---------------------------------------------------------------------------------------------
# What is computed, and what is held
# ---------------------------------------------------------------------------------------------


class InsideOps(TorchDispatchMode):
    """Notes every operator, also inside this library's own, and the elements of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # a mode is off while it handles an operator; what that is made of counts too
            if func.namespace == "fastgoal":
                cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves(args))
                key = torch._C.DispatchKey.CUDA if cuda else torch._C.DispatchKey.CPU
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
            else:
                result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        made = [] if func.is_view else tree_leaves(result)
        sizes = [x.numel() for x in made if isinstance(x, torch.Tensor)]
        self.seen.append((func._schema.name, max(sizes, default=0)))
        return result

    def products(self) -> int:
        return sum(name in ("aten::mm", "aten::addmm_") for name, _ in self.seen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
def test_nothing_of_batch_squared_is_held(op, masked, device):
    tile = feature_loss_torch._TILE_ELEMENTS.get(device, feature_loss_torch._TILE_ELEMENTS_ON_GPU)
    batch = math.isqrt(2 * tile)
    image, text = (leaf(draw(batch, 8, device=device, seed=s).float()) for s in (0, 1))
    mask = torch.ones(batch, batch, dtype=torch.bool, device=device) if masked else None
    with InsideOps() as ops:
        op(image, text, 5.0, -1.0, pair_mask=mask, normalize=True).backward()
    assert ops.products() > 3  # it did look inside
    assert max(size for _, size in ops.seen) <= tile < batch**2


@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
def test_a_frozen_tower_costs_nothing(op):
    """One tile: a product for the logits (the softmax: two), one for each tower that learns."""
    for frozen, products in (("none", 2), ("text", 1), ("image", 1), ("both", 0)):
        image, text, scale = leaf(draw(6, 4)), leaf(draw(6, 4, seed=1)), leaf(torch.tensor(3.0))
        image.requires_grad_(frozen not in ("image", "both"))
        text.requires_grad_(frozen not in ("text", "both"))
        wanted = [x for x in (image, text, scale) if x.requires_grad]
        with InsideOps() as ops:
            grads = torch.autograd.grad(op(image, text, scale, -1.0), wanted)
        for_logits = 2 if op is clip_contrastive_loss else 1
        assert ops.products() == for_logits + products
        expected = getattr(reference, op.__name__)(image, text, scale, -1.0)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted))
    with torch.no_grad(), InsideOps() as ops:
        op(leaf(draw(6, 4)), leaf(draw(6, 4)), 3.0, -1.0)
    assert ops.products() == 1


@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
def test_only_the_bias_learns(op):
    bias = leaf(torch.tensor(-1.0).double())
    image, text = draw(6, 4), draw(6, 4, seed=1)
    (grad,) = torch.autograd.grad(op(image, text, 3.0, bias), bias)
    expected = getattr(reference, op.__name__)(image, text, 3.0, bias)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, bias)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
def test_equal_inputs_give_equal_bits(op, device):
    def run():
        image, text = (leaf(draw(40, 16, device=device, seed=s).float()) for s in (0, 1))
        scale = torch.tensor(30.0, device=device, requires_grad=True)
        return value_and_grads(op(image, text, scale, -1.0), [image, text, scale])

    with tiles_of(300):
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
def test_a_second_derivative_is_refused(op):
    image, text = leaf(draw(3, 4)), leaf(draw(3, 4, seed=1))
    (grad,) = torch.autograd.grad(op(image, text, 3.0, -1.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative"):
        torch.autograd.grad(grad.sum(), image)


# ---------------------------------------------------------------------------------------------
# Empty batches, scalars, compilation, custom-operator rules
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images,texts", [(0, 0), (0, 3), (3, 0)])
def test_empty_batches(images, texts):
    for backend in ("torch", "reference"):
        image, text = leaf(draw(images, 4)), leaf(draw(texts, 4, seed=1))
        loss = sigmoid_contrastive_loss(image, text, 2.0, -1.0, normalize=True, backend=backend)
        loss.backward()
        assert loss.item() == 0
        assert float(image.grad.abs().sum() + text.grad.abs().sum()) == 0
        if images == texts:  # the mean over nothing, as PyTorch's cross-entropy has it
            assert clip_contrastive_loss(image, text, 2.0, backend=backend).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_scale_and_bias_may_be_floats_or_one_element_tensors_anywhere(device):
    image, text = (draw(5, 4, device=device, seed=s).float() for s in (0, 1))
    for op in (clip_contrastive_loss, sigmoid_contrastive_loss):
        expected = op(image, text, 4.0, -2.0)
        for shape in ((), (1,)):
            scale = torch.full(shape, 4.0, dtype=torch.float64, requires_grad=True)
            loss = op(image, text, scale, torch.full(shape, -2.0, device=device))
            torch.testing.assert_close(loss, expected)
            (grad,) = torch.autograd.grad(loss, scale)
            assert (grad.shape, grad.dtype, grad.device) == (shape, scale.dtype, scale.device)
            assert float(grad) != 0


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole_and_new_batch_sizes_compile_nothing(device):
    counter = CompileCounterWithBackend("aot_eager")

    def step(image, text, scale, bias):
        image, text = 1.5 * image, 0.5 * text  # towers that are part of the graph
        clip = clip_contrastive_loss(image, text, scale, bias, normalize=True, label_smoothing=0.1)
        return clip + sigmoid_contrastive_loss(image, text, scale, bias, normalize=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    frames = []
    for batch in (5, 6, 9, 17, 32):
        inputs = [leaf(draw(batch, 4, device=device, seed=s).float()) for s in (0, 1)]
        inputs += [torch.tensor(x, device=device, requires_grad=True) for x in (9.0, -1.0)]
        out = value_and_grads(compiled(*inputs), inputs)
        torch.testing.assert_close(out, value_and_grads(step(*inputs), inputs))
        frames.append(counter.frame_count)
    # The second size makes the batch dynamic; after it nothing is compiled any more.
    assert frames[0] == 1
    assert frames[-1] == frames[1] <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    image, text = (draw(6, 4, device=device, seed=s).float() for s in (0, 1))
    image_leaf, text_leaf = leaf(image), leaf(text)
    scale, bias = torch.tensor(7.0, device=device), torch.tensor(-1.0, device=device)
    mask = draw(6, 6, device=device, seed=2) > -0.3
    some, none, rows = image[:2], text.new_empty(0), text.new_ones(6)
    check = torch.library.opcheck
    softmax, sigmoid = feature_loss.softmax_loss, feature_loss.sigmoid_loss
    check(softmax, (image_leaf, text_leaf, leaf(scale), mask, 0.1, True, 0, True, "torch"))
    check(softmax, (leaf(some), text, leaf(scale), None, 0.0, False, 3, False, "torch"))
    check(softmax, (image, text, scale, None, 0.0, True, 0, False, "torch"))
    backward = feature_loss.softmax_loss_backward
    lse = (rows, rows)
    options = (0.1, True, 0, True, "torch")
    check(backward, (scale, image, text, scale, mask, *lse, *options, True, False, True))
    flags = (True, True, True, True)
    check(sigmoid, (image_leaf, text_leaf, leaf(scale), leaf(bias), mask, 2, True, "torch", *flags))
    check(sigmoid, (image, text, scale, bias, None, 0, False, "torch", *[False] * 4))
    backward = feature_loss.sigmoid_loss_backward
    check(backward, (scale, image, none, scale, bias, torch.bfloat16))


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def bad(loss, error, message, *args, **kwargs):
    with pytest.raises(error, match=message):
        loss(*args, **kwargs)


def test_bad_input_is_named():
    image, text = draw(4, 3), draw(4, 3, seed=1)
    for loss in (clip_contrastive_loss, sigmoid_contrastive_loss):
        bad(loss, ValueError, r"same last dimension; got 3 and 2", image, text[:, :2], 1.0, 0.0)
        bad(loss, ValueError, r"text_features must have shape", image, text[0], 1.0, 0.0)
        bad(loss, TypeError, r"image_features must be floating", image.long(), text, 1.0, 0.0)
        bad(loss, TypeError, r"image_features must be a tensor", [[1.0]], text, 1.0, 0.0)
        bad(loss, ValueError, r"logit_scale must be a float", image, text, torch.ones(2), 0.0)
        bad(loss, TypeError, r"logit_scale must be", image, text, None, 0.0)
        wrong = torch.ones(4, 3, dtype=torch.bool)
        bad(
            loss,
            ValueError,
            r"pair_mask has shape \(4, 3\)",
            image,
            text,
            1.0,
            0.0,
            pair_mask=wrong,
        )
        bad(loss, TypeError, r"pair_mask must be bool", image, text, 1.0, 0.0, pair_mask=image)
        bad(loss, ValueError, r"unknown backend 'fast'", image, text, 1.0, 0.0, backend="fast")
        bad(loss, BackendError, r"not on a CUDA device", image, text, 1.0, 0.0, backend="triton")
        with use_backend("triton"):
            bad(loss, BackendError, r"not on a CUDA device", image, text, 1.0, 0.0)
        meta = text.to("meta")
        bad(loss, ValueError, r"text_features is on meta.*Fix", image, meta, 1.0, 0.0)
    bad(
        clip_contrastive_loss,
        ValueError,
        r"one text per image.*\(4, 3\).*\(2, 3\)",
        image,
        text[:2],
        1,
    )
    bad(clip_contrastive_loss, ValueError, r"label_smoothing", image, text, 1, label_smoothing=1.0)
    sigmoid = sigmoid_contrastive_loss
    bad(sigmoid, TypeError, r"logit_bias must be", image, text, 1.0, None)
    bad(sigmoid, ValueError, r"captions_per_image", image, text, 1.0, 0.0, captions_per_image=0)
    bad(sigmoid, TypeError, r"captions_per_image", image, text, 1.0, 0.0, captions_per_image=1.5)
    bad(sigmoid, ValueError, r"average_over", image, text, 1.0, 0.0, average_over="pairs")

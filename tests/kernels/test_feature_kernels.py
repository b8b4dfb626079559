"""The Triton engine of the feature losses: under the interpreter, or on a CUDA device.

The public functions' own behaviour (checks, autocast, empty batches) is tested in
`test_contrastive.py`; here is what tiles, chunks and rounding can get wrong.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("these kernels want a CUDA device or the interpreter", allow_module_level=True)

from fastgoal_kernels import reference  # noqa: E402
from fastgoal_kernels.functional.contrastive import (  # noqa: E402
    clip_contrastive_loss,
    row_cross_entropy,
    sigmoid_contrastive_loss,
)
from fastgoal_kernels.ops import feature_loss, feature_loss_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 25 if INTERPRETED else 100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [1e-3, 1.0, 14.3, 100.0, 1000.0]

# What one rounding costs: of the gradient of the logits, and of what is returned. The interpreter
# cuts digits off where a device rounds.
ROUNDING = {
    torch.float32: 2.0**-22,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-10 if INTERPRETED else 2.0**-11,
}


def draw(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.double(), dim=1)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def gradients(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    # An upstream gradient that is not 1, so that one which is dropped shows.
    return list(torch.autograd.grad(3 * loss, inputs))


def small_chunks(forward_rows: int, gradient_bytes: int):
    """Launches of few rows, so that small inputs need several."""
    return mock.patch.multiple(
        feature_loss_triton,
        _FORWARD_ROWS=forward_rows,
        _GRADIENT_BYTES=gradient_bytes,
        _SIGMOID_GRADIENT_BYTES=gradient_bytes,
    )


@st.composite
def batches(draw_from, square: bool) -> dict[str, Any]:
    images = draw_from(st.sampled_from([1, 2, 15, 16, 17, 37, 50]))
    texts = images if square else draw_from(st.sampled_from([1, 3, 16, 31, 48, 65]))
    dim, seed = draw_from(st.sampled_from([1, 5, 16, 24, 33])), draw_from(st.integers(0, 999))
    return {
        "images": images, "texts": texts, "dim": dim, "seed": seed,
        "matched": draw_from(st.booleans()),
        "normalize": draw_from(st.booleans()),
        "masked": draw_from(st.sampled_from([None, -0.5, 0.5, 9.0])),
        "scale": draw_from(st.sampled_from(SCALES)),
        "dtype": draw_from(st.sampled_from(DTYPES)),
        "forward_rows": draw_from(st.sampled_from([16, 32, 8192])),
        "strided": draw_from(st.booleans()),
    }  # fmt: skip


def features(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Images and texts in the case's dtype, of unit length unless the loss normalises them."""
    images, texts, dim, seed = (case[k] for k in ("images", "texts", "dim", "seed"))
    image, text = draw(images, dim, seed=seed), draw(texts, dim, seed=seed + 1)
    if case["matched"] and images == texts:
        text = image + 0.3 * text
    if case["normalize"]:
        image = 3 * image
    else:
        image, text = unit(image), unit(text)
    image, text = image.to(case["dtype"]), text.to(case["dtype"])
    if case["strided"]:
        image, text = image.repeat_interleave(2, dim=1)[:, ::2], text.T.contiguous().T
    mask = None
    if case["masked"] is not None:
        mask = draw(images, texts, seed=seed + 2) > case["masked"]
    return image, text, mask


def check(op, definition, dlogit_sizes, case: dict[str, Any], bias: float, **options) -> None:
    """Loss and gradients within the rounding of logits, of their gradient and of the result.

    A logit is rounded at 2^-23 of scale + |bias|, several times; a softmax or a sigmoid passes that
    on as an error relative to itself. So gradients are compared with the sums of magnitudes that
    they are differences of.
    """
    image, text, mask = features(case)
    options |= {"pair_mask": mask, "normalize": case["normalize"]}
    wide = [leaf(x.double()) for x in (image, text)]
    inputs = [leaf(image), leaf(text)]
    for values, dtype in ((inputs, torch.float32), (wide, torch.float64)):
        values += [leaf(torch.tensor(x, dtype=dtype, device=DEVICE)) for x in (case["scale"], bias)]
    with small_chunks(case["forward_rows"], 1):
        loss = op(*inputs, **options, backend="triton")
        out = gradients(loss, inputs)
    expected_loss = definition(*wide, **options)
    expected = gradients(expected_loss, wide)

    logit = 2.0**-22 * (4 + case["scale"] + abs(bias))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected_loss.item()) <= logit * (1 + abs(expected_loss.item())) + (
        ROUNDING[case["dtype"]] * case["scale"] * case["normalize"]
    )
    sizes = dlogit_sizes(wide, mask).detach()
    lengths = [torch.ones(len(x), 1, device=DEVICE) for x in (image, text)]
    rows = [x.detach().abs() for x in wide[:2]]
    if case["normalize"]:
        lengths = [x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in rows]
        rows = [unit(x) for x in rows]
        # Normalised features are rounded to their dtype before they are multiplied.
        logit += ROUNDING[case["dtype"]] * case["scale"]
    magnitudes = [
        3 * case["scale"] * (sizes @ rows[1]) / lengths[0],
        3 * case["scale"] * (sizes.T @ rows[0]) / lengths[1],
        3 * (sizes * (rows[0] @ rows[1].T)).sum(),
        3 * sizes.sum(),
    ]
    for got, want, size, given_as in zip(out, expected, magnitudes, inputs, strict=True):
        assert (got.dtype, got.shape) == (given_as.dtype, want.shape)
        allowed = (logit + 3 * ROUNDING[case["dtype"]]) * size.norm()
        if got.dtype == torch.float16:  # whose smallest step is 2^-24
            allowed += 2.0**-24 * got.numel() ** 0.5
        assert (got.double() - want).norm() <= allowed + 1e-30


def softmax_sizes(label_smoothing: float):
    def sizes(inputs, mask):
        """Row softmax + column softmax + targets, over twice the batch."""
        image, text, scale, _ = inputs
        n = len(image)
        cosine = image @ text.T
        if normalised[0]:
            cosine = unit(image) @ unit(text).T
        logits = scale * cosine
        if mask is not None:
            logits = logits.masked_fill(~(mask | torch.eye(n, device=DEVICE).bool()), -torch.inf)
        return (logits.softmax(0) + logits.softmax(1) + 2 * torch.eye(n, device=DEVICE)) / (2 * n)

    normalised = [False]
    sizes.normalised = normalised
    return sizes


@settings(max_examples=EXAMPLES, deadline=None)
@given(batches(square=True), st.sampled_from([0.0, 0.1, 0.7]))
def test_clip_loss_means_the_reference(case, label_smoothing):
    sizes = softmax_sizes(label_smoothing)
    sizes.normalised[0] = case["normalize"]
    check(
        clip_contrastive_loss, reference.clip_contrastive_loss, sizes, case, 0.5,
        label_smoothing=label_smoothing,
    )  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    batches(square=False), st.integers(1, 4), st.booleans(), st.sampled_from(["texts", "images"]),
    st.sampled_from([0.0, -10.0, 2.5]),
)  # fmt: skip
def test_sigmoid_loss_means_the_reference(case, captions, negative_only, average_over, bias):
    def sizes(inputs, mask):
        image, text, scale, _ = inputs
        if case["normalize"]:
            image, text = unit(image), unit(text)
        logits = scale * image @ text.T + bias
        positive = torch.arange(len(text), device=DEVICE) // captions == torch.arange(
            len(image), device=DEVICE
        ).unsqueeze(1)
        if negative_only:
            positive = torch.zeros_like(positive)
        miss = torch.where(positive, -logits, logits).sigmoid()
        if mask is not None:
            miss = miss.masked_fill(~(mask | positive), 0)
        return miss / max(len(text) if average_over == "texts" else len(image), 1)

    check(
        sigmoid_contrastive_loss, reference.sigmoid_contrastive_loss, sizes, case, bias,
        captions_per_image=captions, negative_only=negative_only, average_over=average_over,
    )  # fmt: skip


@pytest.mark.parametrize("first", [0, 3, 40])
@pytest.mark.parametrize("rows_at_a_time", [16, 8192])
def test_rows_of_one_process(first, rows_at_a_time):
    rows, columns = unit(draw(21, 8)).float(), unit(draw(61, 8, seed=1)).float()
    inputs = [leaf(rows), leaf(columns), torch.tensor(9.0, device=DEVICE, requires_grad=True)]
    with small_chunks(rows_at_a_time, 1):
        loss = row_cross_entropy(*inputs, first_target=first, backend="triton")
        out = [loss, *gradients(loss, inputs)]
    wide = [leaf(x.double()) for x in inputs]
    targets = torch.arange(first, first + 21, device=DEVICE)
    loss = F.cross_entropy(wide[2] * wide[0] @ wide[1].T, targets)
    for got, want in zip(out, [loss, *gradients(loss, wide)], strict=True):
        # Logits up to 9 are rounded at 2^-23 of that.
        assert (got.double() - want).norm() <= 9 * 2.0**-21 * want.norm()


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_rows_far_below_their_tiles_largest_logit(scale):
    """One exponential serves a whole tile; rows that it would send to zero get their own."""
    image = unit(draw(20, 6)).float()
    image[3:7] *= -1  # matches nothing as well as the others do
    image[9] = 0
    text = unit(draw(20, 6)).float()
    inputs = [leaf(image), leaf(text)]
    loss = clip_contrastive_loss(*inputs, scale, backend="triton")
    out = [loss, *gradients(loss, inputs)]
    wide = [leaf(x.double()) for x in (image, text)]
    loss = reference.clip_contrastive_loss(*wide, scale)
    for got, want in zip(out, [loss, *gradients(loss, wide)], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=scale * 1e-6, atol=scale * 1e-6)


@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_give_equal_bits(op, dtype):
    def run():
        image, text = (leaf(unit(draw(40, 16, seed=s)).to(dtype)) for s in (0, 1))
        scale = torch.tensor(30.0, device=DEVICE, requires_grad=True)
        loss = op(image, text, scale, -1.0, backend="triton")
        return [loss.detach(), *gradients(loss, [image, text, scale])]

    with small_chunks(16, 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("op", [clip_contrastive_loss, sigmoid_contrastive_loss])
@pytest.mark.parametrize("learns", ["image", "text", "scale", "nothing"])
def test_frozen_towers_cost_nothing(op, learns):
    image, text = unit(draw(40, 16)).float(), unit(draw(40, 16, seed=1)).float()
    scale = torch.tensor(5.0, device=DEVICE)
    wanted = {"image": image, "text": text, "scale": scale}.get(learns)
    if wanted is not None:
        wanted.requires_grad_()
    products = mock.Mock(wraps=feature_loss_triton.wide_product)
    sums = mock.Mock(wraps=feature_loss_triton.sum_of_products)
    with mock.patch.multiple(feature_loss_triton, wide_product=products, sum_of_products=sums):
        loss = op(image, text, scale, -1.0, backend="triton")
        if wanted is not None:
            expected = getattr(reference, op.__name__)(image, text, scale, -1.0)
            (got,) = gradients(loss, [wanted])
            torch.testing.assert_close(got, gradients(expected, [wanted])[0], rtol=1e-4, atol=1e-6)
    assert products.called == (learns == "image")
    assert sums.called == (learns == "text")


def test_small_gradients_survive_float16():
    """1/batch^2-sized probabilities lie below float16's normal numbers."""
    n = 33
    image = unit(torch.ones(n, 16, device=DEVICE) + 0.01 * draw(n, 16)).half()
    text = unit(torch.ones(n, 16, device=DEVICE) + 0.01 * draw(n, 16, seed=1)).half()
    inputs, wide = [leaf(image), leaf(text)], [leaf(image.double()), leaf(text.double())]
    loss = sigmoid_contrastive_loss(*inputs, 1.0, -17.0, negative_only=True, backend="triton")
    out = torch.autograd.grad(2.0**15 * loss, inputs)
    loss = reference.sigmoid_contrastive_loss(*wide, 1.0, -17.0, negative_only=True)
    for got, want in zip(out, torch.autograd.grad(2.0**15 * loss, wide), strict=True):
        assert (got - want).norm() <= 2.0**-9 * want.norm()


def test_a_nan_feature_gives_a_nan_loss():
    image = draw(20, 3).float().index_fill(0, torch.tensor([17], device=DEVICE), float("nan"))
    text = draw(20, 3, seed=1).float()
    for op in (clip_contrastive_loss, sigmoid_contrastive_loss):
        assert op(image, text, 5.0, 0.0, backend="triton").isnan()


@pytest.mark.parametrize("images,texts", [(0, 0), (0, 3), (3, 0)])
def test_empty_batches(images, texts):
    image, text = leaf(draw(images, 4).float()), leaf(draw(texts, 4).float())
    loss = sigmoid_contrastive_loss(image, text, 2.0, -1.0, normalize=True, backend="triton")
    loss.backward()
    assert loss.item() == 0
    assert float(image.grad.abs().sum() + text.grad.abs().sum()) == 0
    if images == texts:
        assert clip_contrastive_loss(image, text, 2.0, backend="triton").isnan()


def test_opcheck():
    image, text = draw(6, 4).float(), draw(6, 4, seed=1).float()
    image_leaf, text_leaf = leaf(image), leaf(text)
    scale, bias = torch.tensor(7.0, device=DEVICE), torch.tensor(-1.0, device=DEVICE)
    mask = draw(6, 6, seed=2) > -0.3
    # The interpreter's NumPy kernels can not run on the fake tensors of the AOT test.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not INTERPRETED:
        tests.append("test_aot_dispatch_dynamic")

    def check(op, arguments):
        torch.library.opcheck(op, arguments, test_utils=tests)

    softmax, sigmoid = feature_loss.softmax_loss, feature_loss.sigmoid_loss
    check(softmax, (image_leaf, text_leaf, leaf(scale), mask, 0.1, True, 0, True, "triton"))
    check(softmax, (leaf(image[:2]), text, scale, None, 0.0, False, 3, False, "triton"))
    flags = (True, True, True, True)
    check(
        sigmoid, (image_leaf, text_leaf, leaf(scale), leaf(bias), mask, 2, True, "triton", *flags)
    )

"""MaxSim: every backend, forward and every gradient, against the float64 reference.

Random inputs are small multiples of 1/4, whose products and sums are exact in every dtype: the
winners, ties included, must then be the reference's own, and what is left to compare is rounding.
The file runs on a CPU (torch backend), under Triton's interpreter, and on a CUDA device as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgoal_kernels import (
    maxsim_alignment,
    maxsim_contrastive_loss,
    maxsim_scores,
    pack_tokens,
    reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# (backend, device) pairs that run on this machine.
PLACES = [("torch", "cpu")]
if torch.cuda.is_available():
    PLACES = [*PLACES, ("torch", "cuda"), ("triton", "cuda")]
elif INTERPRETED:
    PLACES = [("triton", "cpu")]
DIRECTIONS = ("text_to_image", "image_to_text", "both")
EXAMPLES = 12 if INTERPRETED else 60

# Relative to the norm of the reference. Scores: a mean of exact maxima, rounded in float32.
# Gradients of bf16 tokens meet two roundings of at most 2^-8 each: that of the shares that the
# matrix unit multiplies and that of the result. The interpreter cuts digits off instead, at most
# 2^-7 each. float16 shares are multiplied in TF32, so only the result's rounding of 2^-11 counts.
SCORE_ERROR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRAD_ERROR = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-6 if INTERPRETED else 2**-7,
    torch.float16: 2**-10,
}


def relative_error(out: Tensor, expected: Tensor) -> float:
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    assert out.shape == expected.shape
    norm = expected.norm()
    return float((out - expected).norm() / (norm if norm > 0 else 1.0))


@dataclass
class Side:
    """One modality's tokens in one of the three layouts."""

    name: str
    tokens: Tensor
    mask: Tensor | None = None
    offsets: Tensor | None = None
    longest: int | None = None

    def arguments(self, device: str = "cpu", bounds: bool = True) -> dict:
        def to(x):
            return None if x is None else x.to(device)

        out = {f"{self.name}_mask": to(self.mask), f"{self.name}_offsets": to(self.offsets)}
        return {**out, f"max_{self.name}_tokens": self.longest} if bounds else out


@dataclass
class Case:
    image: Side
    text: Side
    dtype: torch.dtype
    strided: bool = False
    upstream: list[Tensor] = field(default_factory=list)

    def leaves(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        def leaf(tokens: Tensor) -> Tensor:
            tokens = tokens.to(device=device, dtype=dtype)
            if self.strided:  # every other row of a larger tensor, channels not contiguous
                wide = torch.full((*tokens.shape[:-1], 2 * tokens.shape[-1]), 7.0, dtype=dtype)
                wide = wide.to(device)
                wide[..., ::2] = tokens
                tokens = wide[..., ::2]
            return tokens.detach().requires_grad_()

        return leaf(self.image.tokens), leaf(self.text.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        def items(side: Side) -> int:
            return len(side.tokens) if side.offsets is None else len(side.offsets) - 1

        return items(self.image), items(self.text)


def dyadic(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator) / 4


def make_side(
    name: str, layout: str, items: int, length: int, dim: int, generator: torch.Generator
) -> Side:
    if layout == "ragged":
        lengths = torch.randint(0, length + 1, (items,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        known = bool(torch.rand(1, generator=generator) < 0.5)
        tokens = dyadic(generator, int(offsets[-1]), dim)
        return Side(name, tokens, offsets=offsets, longest=length if known else None)
    side = Side(name, dyadic(generator, items, length, dim))
    if layout == "masked":
        side.mask = torch.rand(items, length, generator=generator) < 0.6
        if items > 1:
            side.mask[0] = False  # an item without a valid token
        side.tokens[~side.mask] = torch.nan  # padding may hold anything
    return side


def make_case(
    seed: int, num_images: int, num_texts: int, regions: int, words: int, dim: int,
    image_layout: str = "padded", text_layout: str = "padded",
    dtype: torch.dtype = torch.float32, strided: bool = False,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    case = Case(
        make_side("image", image_layout, num_images, regions, dim, generator),
        make_side("text", text_layout, num_texts, words, dim, generator),
        dtype,
        strided,
    )
    case.upstream = [torch.randn(num_images, num_texts, generator=generator) for _ in range(2)]
    return case


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
cases = st.builds(
    make_case,
    seed=st.integers(0, 2**31),
    num_images=st.integers(0, 4),
    num_texts=st.integers(0, 4),
    regions=st.integers(1, 37),
    words=st.integers(1, 37),
    dim=st.sampled_from([1, 3, 16, 17, 33]),
    image_layout=st.sampled_from(["padded", "masked", "ragged"]),
    text_layout=st.sampled_from(["padded", "masked", "ragged"]),
    dtype=st.sampled_from(DTYPES + ([] if INTERPRETED else [torch.float64])),
    strided=st.booleans(),
)


def skip_unserved(backend: str, dtype: torch.dtype) -> bool:
    return backend == "triton" and dtype == torch.float64


def as_list(scores) -> list[Tensor]:
    return list(scores) if isinstance(scores, tuple) else [scores]


def scores_and_gradients(case: Case, backend: str, device: str, dtype: torch.dtype, **options):
    leaves = case.leaves(dtype, device)
    bounds = backend != "reference"
    call = reference.maxsim_scores if backend == "reference" else maxsim_scores
    if bounds:
        options["backend"] = backend
    scores = as_list(
        call(
            *leaves,
            **case.image.arguments(device, bounds),
            **case.text.arguments(device, bounds),
            **options,
        )
    )
    loss = sum((s * u.to(s)).sum() for s, u in zip(scores, case.upstream, strict=False))
    return scores, torch.autograd.grad(loss, leaves, materialize_grads=True)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@settings(max_examples=EXAMPLES)
@given(
    case=cases, direction=st.sampled_from(DIRECTIONS), reduction=st.sampled_from(["mean", "sum"])
)
@example(
    case=make_case(1, 3, 4, 33, 18, 17, "masked", "ragged", torch.bfloat16, True),
    direction="both",
    reduction="mean",
)
@example(case=make_case(2, 2, 3, 1, 1, 1), direction="both", reduction="sum")
def test_scores_and_gradients_equal_the_reference(backend, device, case, direction, reduction):
    if skip_unserved(backend, case.dtype):
        return
    options = {"direction": direction, "reduction": reduction}
    expected, expected_grads = scores_and_gradients(
        case, "reference", "cpu", torch.float64, **options
    )
    scores, grads = scores_and_gradients(case, backend, device, case.dtype, **options)
    for out, want in zip(scores, expected, strict=True):
        assert out.dtype == reference.score_dtype(case.dtype)
        assert relative_error(out, want) <= SCORE_ERROR[case.dtype]
    for out, want in zip(grads, expected_grads, strict=True):
        assert out.dtype == case.dtype
        assert relative_error(out, want) <= GRAD_ERROR[case.dtype]


@pytest.mark.parametrize(("backend", "device"), PLACES)
@settings(max_examples=EXAMPLES // 2)
@given(case=cases, direction=st.sampled_from(DIRECTIONS))
def test_winners_are_the_reference_s_own_ties_included(backend, device, case, direction):
    if skip_unserved(backend, case.dtype):
        return
    tokens = [leaf.detach() for leaf in case.leaves(case.dtype, device)]
    out = maxsim_alignment(
        *tokens, **case.image.arguments(device), **case.text.arguments(device),
        direction=direction, backend=backend,
    )  # fmt: skip
    expected = reference.maxsim_alignment(
        *case.leaves(torch.float64, "cpu"), **case.image.arguments(bounds=False),
        **case.text.arguments(bounds=False), direction=direction,
    )  # fmt: skip
    for have, want in zip(as_list(out), as_list(expected), strict=True):
        assert torch.equal(have.cpu(), want)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(
    ("regions", "bytes_each"),
    [(256, 1), (257, 2), pytest.param(65537, 4, marks=pytest.mark.skipif(
        INTERPRETED, reason="65,537 tokens are too many for the interpreter"))],
)  # fmt: skip
def test_a_winner_far_down_the_item_is_found_and_kept_compact(backend, device, regions, bytes_each):
    from fastgoal_kernels.ops.maxsim import maxsim

    image = torch.zeros(1, regions, 2, device=device)
    image[0, regions - 1] = 1.0
    image.requires_grad_()
    text = torch.ones(2, 1, 2, device=device)
    outputs = maxsim(
        image, text, None, None, None, None, 0, 0, "text_to_image", True, True, backend
    )
    assert outputs[2].element_size() == bytes_each
    assert outputs[2].long().unique().tolist() == [regions - 1]
    outputs[0].sum().backward()
    assert image.grad[0, regions - 1].tolist() == [2.0, 2.0]
    assert int(image.grad.count_nonzero()) == 2


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_items_lie_across_tiles(backend, device, direction):
    """Many items of very different lengths, so that tiles and units begin and end within them."""
    generator = torch.Generator().manual_seed(21)
    sides = []
    image_lengths = [5, 40, 0, 1, 33, 64, 17, 16, 2, 31, 90, 3]
    text_lengths = [1, 0, 0, 70, 16, 15, 17, 32, 9, 48, 2, 100, 7, 7, 7]
    if INTERPRETED:  # the same borders; four pairs a unit
        image_lengths = [5, 40, 0, 1, 17, 16, 2, 9]
        text_lengths = [1, 0, 0, 70, 16, 15, 17, 33, 2, 7, 7, 7]
    for name, lengths in (("image", image_lengths), ("text", text_lengths)):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        tokens = dyadic(generator, int(offsets[-1]), 16)
        sides.append(Side(name, tokens, offsets=offsets, longest=max(lengths)))
    case = Case(*sides, dtype=torch.float32, strided=False)
    case.upstream = [dyadic(generator, len(image_lengths), len(text_lengths)) for _ in range(2)]
    scores, grads = scores_and_gradients(case, backend, device, torch.float32, direction=direction)
    want, want_grads = scores_and_gradients(
        case, "reference", "cpu", torch.float64, direction=direction
    )
    for out, expected in zip((*scores, *grads), (*want, *want_grads), strict=True):
        assert relative_error(out, expected) <= 1e-6


@pytest.mark.skipif(INTERPRETED, reason="two thousand million similarities")
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_more_similarities_than_32_bits_count(backend, device):
    generator = torch.Generator().manual_seed(22)
    image, text = (torch.randn(n, 96, 4, generator=generator).to(device) for n in (512, 460))
    assert 512 * 460 * 96 * 96 > 2**31
    scores = maxsim_scores(image, text, direction="both", backend=backend)
    some = torch.tensor([0, 300, 511], device=device), torch.tensor([0, 200, 459], device=device)
    want = reference.maxsim_scores(
        image[some[0]].double(), text[some[1]].double(), direction="both"
    )
    for out, expected in zip(scores, want, strict=True):
        assert relative_error(out[some[0]][:, some[1]], expected) <= SCORE_ERROR[torch.float32]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="slow on a CPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_more_winners_than_32_bits_count(backend):
    """Offsets of winners pass 2^31 bytes; the gradient of the last pair alone is asked for."""
    generator = torch.Generator(device="cuda").manual_seed(23)
    image, text = (
        torch.randn(shape, generator=generator, device="cuda").requires_grad_()
        for shape in ((16_500, 2, 16), (1_024, 130, 16))
    )
    assert 16_500 * 1_024 * 130 > 2**31
    scores = maxsim_scores(image, text, backend=backend)
    upstream = torch.zeros_like(scores)
    upstream[-1, -1] = 1.0
    grads = torch.autograd.grad(scores, (image, text), upstream)
    last = [x.detach()[-1:].double().requires_grad_() for x in (image, text)]
    want = reference.maxsim_scores(*last)
    assert relative_error(scores[-1:, -1:], want) <= SCORE_ERROR[torch.float32]
    for grad, expected in zip(grads, torch.autograd.grad(want.sum(), last), strict=True):
        assert relative_error(grad[-1:], expected) <= 1e-5
        assert not grad[:-1].any()


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_nan_tokens_give_nan_scores_and_no_index_error(backend, device):
    case = make_case(3, 3, 4, 18, 19, 8)
    case.image.tokens[1, 5, 2] = torch.nan
    case.text.tokens[2, 17] = torch.nan
    expected = reference.maxsim_scores(*case.leaves(torch.float64, "cpu"), direction="both")
    scores, grads = scores_and_gradients(case, backend, device, torch.float32, direction="both")
    for out, want in zip(scores, expected, strict=True):
        assert torch.equal(out.isnan().cpu(), want.isnan())
        assert want.isnan().any()
        assert not want.isnan().all()
    assert [g.shape for g in grads] == [case.image.tokens.shape, case.text.tokens.shape]


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_normalize_equals_the_reference_and_spares_zero_vectors(backend, device):
    generator = torch.Generator().manual_seed(4)
    dtype = torch.float32 if backend == "triton" else torch.float64
    tokens = [torch.randn(3, 9, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    tokens[0][1, 2] = 0.0
    tokens[1][2, 3] *= 1e-13  # below the floor of the norm
    results = []
    for where, kind in ((("reference", "cpu"), torch.float64), ((backend, device), dtype)):
        leaves = [t.to(where[1], kind).requires_grad_() for t in tokens]
        scores = maxsim_scores(*leaves, direction="both", normalize=True, backend=where[0])
        grads = torch.autograd.grad((scores[0].sin() + scores[1].cos()).sum(), leaves)
        results.append([*scores, *grads])
    # The tiny vector's own gradient is 1e12 times the others': it would hide them.
    for result in results:
        result[3] = torch.cat([result[3][2, 3] * 1e-12, result[3][:2].flatten()])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for want, out in zip(*results, strict=True):
        assert relative_error(out, want) <= tolerance
    assert results[1][2][1, 2].abs().max() == 0


LOSS_OPTIONS = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(DIRECTIONS),
        "objective": st.sampled_from(["softmax", "sigmoid"]),
        "with_mask": st.booleans(),
        "with_bias": st.booleans(),
        "scale": st.sampled_from([0.5, 10.0, 100.0]),
        "captions": st.sampled_from([1, 2, 3]),
    }
)


def loss_and_gradients(case: Case, options: dict, backend: str, device: str, dtype: torch.dtype):
    leaves = case.leaves(dtype, device)
    wide = reference.score_dtype(dtype)
    scale = torch.tensor(options["scale"], dtype=wide, device=device, requires_grad=True)
    bias = None
    if options["with_bias"]:
        bias = torch.tensor(-3.0, dtype=wide, device=device, requires_grad=True)
    softmax = options["objective"] == "softmax"
    pair_mask = None
    if options["with_mask"]:
        pair_mask = (case.upstream[0] > 0).to(device)
    arguments = {
        "captions_per_image": 1 if softmax else options["captions"],
        "pair_mask": pair_mask,
        "objective": options["objective"],
        "direction": options["direction"],
    }
    bounds = backend != "reference"
    call = reference.maxsim_contrastive_loss if not bounds else maxsim_contrastive_loss
    if bounds:
        arguments["backend"] = backend
    loss = call(
        *leaves, scale, bias, **arguments,
        **case.image.arguments(device, bounds), **case.text.arguments(device, bounds),
    )  # fmt: skip
    inputs = [*leaves, scale, *([] if bias is None else [bias])]
    return loss, torch.autograd.grad(3 * loss, inputs, allow_unused=True)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@settings(max_examples=EXAMPLES)
@given(case=cases, options=LOSS_OPTIONS)
@example(
    case=make_case(5, 3, 3, 20, 18, 16, "masked", "ragged"),
    options={"direction": "both", "objective": "softmax", "with_mask": True, "with_bias": True,
             "scale": 10.0, "captions": 1},
)  # fmt: skip
def test_loss_and_every_gradient_equal_the_reference(backend, device, case, options):
    num_images, num_texts = case.shape
    if skip_unserved(backend, case.dtype) or 0 in case.shape:
        return
    if options["objective"] == "softmax" and num_images != num_texts:
        return
    want, want_grads = loss_and_gradients(case, options, "reference", "cpu", torch.float64)
    loss, grads = loss_and_gradients(case, options, backend, device, case.dtype)
    # Scores are exact to 1e-7 and logits are `scale` times that; a loss near 0 is a difference of
    # logits, so its error is theirs.
    slack = {torch.float64: 1e-12}.get(case.dtype, 2e-6) * options["scale"]
    assert abs(loss.item() - want.item()) <= slack * max(1.0, abs(float(want)))
    for index, (out, expected) in enumerate(zip(grads, want_grads, strict=True)):
        if expected is None:
            continue
        error = (out.double().cpu() - expected.double()).norm()
        tokens = GRAD_ERROR[case.dtype] if index < 2 else 0.0
        # A softmax's gradients are differences of probabilities, whose absolute error is theirs.
        noise = slack * (options["scale"] if index < 2 else 1.0)
        assert error <= tokens * expected.norm() + 3 * noise


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_a_trained_temperature_is_stable(backend, device, objective):
    """Scale 1,000 overflows exp, and its columns underflow, unless the maximum is taken out."""
    generator = torch.Generator().manual_seed(6)
    tokens = [torch.randn(4, 5, 8, generator=generator, device="cpu") for _ in range(2)]
    leaves = [t.to(device).requires_grad_() for t in tokens]
    wide = [t.double().requires_grad_() for t in tokens]
    loss = maxsim_contrastive_loss(*leaves, 1000.0, objective=objective, backend=backend)
    want = reference.maxsim_contrastive_loss(*wide, 1000.0, objective=objective)
    grads = torch.autograd.grad(loss, leaves)
    want_grads = torch.autograd.grad(want, wide)
    assert relative_error(loss, want) <= 1e-5
    for out, expected in zip(grads, want_grads, strict=True):
        assert out.isfinite().all()
        assert relative_error(out, expected) <= 1e-3  # logits of 1e3 have an error of 1e-4


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_easy_sigmoid_pairs_keep_the_digits_of_their_small_losses(backend, device):
    """At SigLIP's bias of -10 a negative's loss is 4.5e-5: log(1 + x) must not round it away."""
    leaves = [torch.zeros(3, 2, 4, device=device) for _ in range(2)]
    loss = maxsim_contrastive_loss(*leaves, 10.0, -10.0, objective="sigmoid", backend=backend)
    want = reference.maxsim_contrastive_loss(
        *[x.double().cpu() for x in leaves], 10.0, -10.0, objective="sigmoid"
    )
    assert relative_error(loss, want) <= 1e-6
    negatives = loss - 10.0000454
    assert abs(float(negatives) - 2 * 4.5398e-5) <= 5e-6


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_the_gradient_filter_drops_exactly_the_pairs_below_it(backend, device, objective):
    pairs = 4 if INTERPRETED else 6
    case = make_case(7, pairs, pairs, 5, 4, 8)
    eps = 0.2
    image, text = case.leaves(torch.float64, "cpu")
    t2i, i2t = reference.maxsim_scores(image, text, direction="both")
    scores = [t2i.detach().requires_grad_(), i2t.detach().requires_grad_()]
    if objective == "softmax":
        loss = reference.softmax_loss(5 * scores[1], 5 * scores[0], None)
    else:
        positive = reference.positive_pairs(pairs, pairs, 1)
        terms = [reference.sigmoid_loss(5 * s, positive, None) for s in scores]
        loss = sum(terms) / 2 / pairs
    d_scores = torch.autograd.grad(loss, scores)
    kept = [g.masked_fill(g.abs() / 5 * pairs < eps, 0) for g in d_scores]
    dropped = sum(int((k == 0).sum()) for k in kept)
    assert 0 < dropped < 2 * pairs**2
    want = torch.autograd.grad([t2i, i2t], (image, text), kept)

    for upstream in (1.0, 1024.0):  # loss scaling changes nothing
        leaves = case.leaves(torch.float32, device)
        scale = torch.tensor(5.0, device=device, requires_grad=True)
        out = maxsim_contrastive_loss(
            *leaves, scale, objective=objective, grad_filter_eps=eps, backend=backend
        )
        grads = torch.autograd.grad(upstream * out, (*leaves, scale))
        for have, expected in zip(grads, want, strict=False):
            assert relative_error(have, upstream * expected) <= 1e-5
        full = maxsim_contrastive_loss(*leaves, scale, objective=objective, backend=backend)
        (d_scale,) = torch.autograd.grad(upstream * full, scale)
        assert torch.equal(grads[2], d_scale)  # the scale sees every pair


def trained_tokens(pairs: int, noise: float) -> list[Tensor]:
    """Unit tokens whose words are noisy copies of regions of their own image."""
    generator = torch.Generator().manual_seed(11)
    image = torch.randn(pairs, 16, 64, generator=generator)
    image = torch.nn.functional.normalize(image, dim=-1)
    region = torch.randint(0, 16, (pairs, 8, 1), generator=generator).expand(-1, -1, 64)
    text = image.gather(1, region)
    text = text + noise / 8 * torch.randn(text.shape, generator=generator)
    return [image, torch.nn.functional.normalize(text, dim=-1)]


def gradients_with_filter(tokens, eps, backend, device, direction="both"):
    leaves = [x.to(device).requires_grad_() for x in tokens]
    loss = maxsim_contrastive_loss(
        *leaves, 100.0, direction=direction, grad_filter_eps=eps, backend=backend
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_the_gradient_filter_skips_no_more_than_it_promises(backend, device, eps):
    """The promise follows from |dL/dz| < eps / num_texts and |dS/d image tokens| <= |text token|."""
    tokens = trained_tokens(5 if INTERPRETED else 64, noise=3.0)
    for direction in DIRECTIONS:
        full = gradients_with_filter(tokens, None, backend, device, direction)
        filtered = gradients_with_filter(tokens, eps, backend, device, direction)
        for whole, kept, other in zip(full, filtered, reversed(tokens), strict=True):
            skipped = (whole - kept).flatten(1).norm(dim=1)
            bound = 2 * eps * 100.0 * other.norm(dim=-1).max()
            assert skipped.max() <= bound
            if eps == 1e-2:
                assert skipped.max() > 1e-3 * bound  # something was skipped


@pytest.mark.skipif(INTERPRETED, reason="many pairs are slow in the interpreter")
@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("noise", [2.5, 4.0, 30.0])  # trained well, half-trained, random
def test_the_recommended_filter_costs_less_than_bf16_rounding(backend, device, noise):
    tokens = trained_tokens(128, noise)
    full = torch.cat([g.flatten() for g in gradients_with_filter(tokens, None, backend, device)])
    kept = torch.cat([g.flatten() for g in gradients_with_filter(tokens, 1e-5, backend, device)])
    assert (full - kept).norm() < (full - full.bfloat16().float()).norm()


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_every_run_and_with_recompute(backend, device, direction):
    generator = torch.Generator().manual_seed(8)
    leaves = [
        torch.randn(n, length, 24, generator=generator).to(device).requires_grad_()
        for n, length in ((3, 19), (3, 33))
    ]

    def run(**options) -> list[Tensor]:
        scale = torch.tensor(7.0, device=device, requires_grad=True)
        loss = maxsim_contrastive_loss(
            *leaves, scale, direction=direction, backend=backend, **options
        )
        return [loss, *torch.autograd.grad(loss, (*leaves, scale))]

    first = run()
    for again in (run(), run(recompute=True)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["padded", "masked", "ragged"])
def test_winners_are_found_again_a_few_items_at_a_time(
    backend, device, direction, layout, monkeypatch
):
    """A budget of one item's winners; the sums are exact, so the order of items can not matter."""
    from fastgoal_kernels.ops import maxsim as op

    case = make_case(31, 4, 5, 9, 6, 8, layout, layout)
    want, want_grads = scores_and_gradients(
        case, "reference", "cpu", torch.float64, direction=direction
    )
    monkeypatch.setattr(op, "_RECOMPUTED_BYTES", 40)
    scores, grads = scores_and_gradients(
        case, backend, device, torch.float32, direction=direction, recompute=True
    )
    for out, expected in zip((*scores, *grads), (*want, *want_grads), strict=True):
        assert relative_error(out, expected) <= 1e-6


class Watch(TorchDispatchMode):
    """Every op that runs, with its arguments, and the largest tensor it makes."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.name(), args))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out

    def arguments_of(self, name: str) -> list[tuple]:
        return [args for called, args in self.calls if called == name]


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_no_gradient_work_for_inputs_that_want_none(backend, device):
    image, text = (torch.randn(3, 4, 5, device=device) for _ in range(2))
    with Watch() as watch:
        maxsim_scores(image.requires_grad_(), text, direction="both", backend=backend)[
            0
        ].sum().backward()
    (arguments,) = watch.arguments_of("fastgoal::maxsim_backward")
    assert arguments[13:15] == (True, False)
    assert text.grad is None

    with torch.no_grad(), Watch() as watch:
        maxsim_scores(image, text, backend=backend)
    (arguments,) = watch.arguments_of("fastgoal::maxsim")
    assert arguments[10] is False  # no winners kept

    scale = torch.tensor(2.0, device=device, requires_grad=True)
    with Watch() as watch:
        maxsim_contrastive_loss(image.detach(), text, scale, backend=backend).backward()
    assert not watch.arguments_of("fastgoal::maxsim_backward")
    assert scale.grad is not None


@pytest.mark.skipif(INTERPRETED, reason="the chunked backend needs no interpreter")
def test_the_torch_backend_never_holds_the_four_way_tensor():
    """The op is opaque to a dispatch mode, so its engine is watched directly."""
    from fastgoal_kernels.ops import maxsim_torch
    from fastgoal_kernels.ops.token_rows import token_rows

    images = token_rows(torch.randn(48, 60, 8), None, None, 60, True)
    texts = token_rows(torch.randn(48, 50, 8), None, None, 50, True)
    four_way = 4 * 48 * 48 * 60 * 50
    with Watch() as watch:
        t2i, i2t, t2i_winners, i2t_winners = maxsim_torch.forward(images, texts, "both", True)
        maxsim_torch.backward(
            images, texts, (t2i_winners, t2i), (i2t_winners, i2t), True, True, False
        )
    assert watch.largest <= 1.2 * 4 * (1 << 20) < four_way / 2


@pytest.mark.skipif(INTERPRETED, reason="gradcheck wants float64")
@pytest.mark.parametrize("layout", ["padded", "masked", "ragged"])
def test_gradcheck_of_the_torch_backend(layout):
    generator = torch.Generator().manual_seed(9)
    image = make_side("image", layout, 2, 3, 2, generator)
    text = make_side("text", layout, 2, 4, 2, generator)
    tokens = [
        torch.randn(s.tokens.shape, generator=generator, dtype=torch.float64).requires_grad_()
        for s in (image, text)
    ]
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    layouts = {**image.arguments(), **text.arguments(), "backend": "torch"}

    def scores(v, t):
        return maxsim_scores(v, t, direction="both", normalize=True, **layouts)

    assert torch.autograd.gradcheck(scores, tokens)
    for objective in ("softmax", "sigmoid"):
        for direction in DIRECTIONS:

            def loss(v, t, s, b, objective=objective, direction=direction):
                return maxsim_contrastive_loss(
                    v, t, s, b, objective=objective, direction=direction, **layouts
                )

            assert torch.autograd.gradcheck(loss, (*tokens, scale, bias))


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_opcheck(backend, device):
    from fastgoal_kernels.ops.maxsim import maxsim
    from fastgoal_kernels.ops.normalize import l2_normalize
    from fastgoal_kernels.ops.score_loss import score_loss

    image = torch.randn(3, 6, 5, device=device, requires_grad=True)
    text = torch.randn(11, 5, device=device, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 11], device=device)
    mask = torch.rand(3, 6, device=device) < 0.8
    # The interpreter's NumPy kernels can not run on the fake tensors of the AOT test.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not INTERPRETED:
        tests.append("test_aot_dispatch_dynamic")
    for direction in DIRECTIONS:
        torch.library.opcheck(
            maxsim,
            (image, text, mask, None, None, offsets, 6, 11, direction, True, True, backend),
            test_utils=tests,
        )
    torch.library.opcheck(l2_normalize, (image,), test_utils=tests)
    scores = torch.randn(3, 3, device=device, requires_grad=True)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    bias = torch.tensor(0.1, device=device, requires_grad=True)
    for objective in ("softmax", "sigmoid"):
        for columns in (None, torch.randn(3, 3, device=device, requires_grad=True)):
            torch.library.opcheck(
                score_loss,
                (scores, columns, scale, bias, None, objective, 1, 0.0, backend),
                test_utils=tests,
            )


@pytest.mark.skipif(INTERPRETED, reason="torch.compile does not trace the interpreter")
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_compiles_to_one_graph_that_new_sizes_do_not_recompile(backend, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def loss(image, text, offsets, scale):
        return maxsim_contrastive_loss(
            image, text, scale, text_offsets=offsets, normalize=True, backend=backend
        )

    for batch, words in ((3, 5), (4, 5), (4, 9), (7, 12)):
        image = torch.randn(batch, 6, 8, device=device, requires_grad=True)
        text = torch.randn(batch * words, 8, device=device, requires_grad=True)
        offsets = torch.arange(batch + 1, device=device) * words
        scale = torch.tensor(3.0, device=device, requires_grad=True)
        out = loss(image, text, offsets, scale)
        grads = torch.autograd.grad(out, (image, text, scale))
        want = maxsim_contrastive_loss(
            image, text, scale, text_offsets=offsets, normalize=True, backend=backend
        )
        want_grads = torch.autograd.grad(want, (image, text, scale))
        assert relative_error(out, want) <= 1e-6
        for have, expected in zip(grads, want_grads, strict=True):
            assert relative_error(have, expected) <= 1e-5
    assert counter.frame_count == 1


def test_kernels_do_not_specialise_on_sizes():
    """A size that Triton specialises on (1, multiples of 16) compiles again for a new caption."""
    pytest.importorskip("triton")
    from fastgoal_kernels.ops import (
        inverted_index_triton,
        maxsim_forward_triton,
        maxsim_gather_triton,
        maxsim_product_triton,
        maxsim_scatter_triton,
        score_loss_triton,
    )

    for module in (
        inverted_index_triton, maxsim_forward_triton, maxsim_gather_triton, maxsim_product_triton,
        maxsim_scatter_triton, score_loss_triton,
    ):  # fmt: skip
        for case in module.compile_cases(90):
            for parameter in getattr(case.kernel, "params", ()):
                sized = case.signature[parameter.name] in ("i32", "i64")
                assert not sized or parameter.do_not_specialize, (case.name, parameter.name)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_autocast_and_mixed_dtypes(backend, device):
    image, text = torch.randn(3, 6, 16, device=device), torch.randn(3, 5, 16, device=device)
    image.requires_grad_()
    want = maxsim_scores(image.bfloat16(), text.bfloat16(), backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = maxsim_scores(image, text, backend=backend)
        loss = maxsim_contrastive_loss(image, text, 5.0, backend=backend)
    assert out.dtype == loss.dtype == torch.float32
    assert torch.equal(out, want)
    (grad,) = torch.autograd.grad(loss, image)
    assert grad.dtype == torch.float32
    # The op itself must not see it: a backward inside the block may run the forward again.
    from fastgoal_kernels.ops.maxsim import maxsim

    arguments = (None, None, None, None, 0, 0, "both", True, True, backend)
    plain = maxsim(image, text, *arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = maxsim(image, text, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    mixed = maxsim_scores(image.bfloat16(), text, backend=backend)
    assert relative_error(mixed, maxsim_scores(image.bfloat16().float(), text)) <= 1e-6


@pytest.mark.skipif(INTERPRETED, reason="eager bf16 has to be beaten by native code")
@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_errs_at_most_as_much_as_eager_bf16(backend, device, direction):
    """Random inputs; gradients are compared given the winners each computation chose itself."""
    generator = torch.Generator().manual_seed(10)
    tokens = [torch.randn(n, 40, 64, generator=generator).bfloat16() for n in (6, 7)]
    upstream = torch.randn(6, 7, generator=generator).to(device)

    def run(dtype, call) -> list[Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in tokens]
        scores = as_list(call(*leaves))
        grads = torch.autograd.grad(sum((s * upstream.to(s)).sum() for s in scores), leaves)
        return [*scores, *grads]

    def eager(v, t):
        sim = torch.einsum("ird,jqd->ijqr", v, t)
        t2i, i2t = sim.max(3).values.mean(2), sim.max(2).values.mean(2)
        return {"text_to_image": t2i, "image_to_text": i2t, "both": (t2i, i2t)}[direction]

    def ours(v, t):
        return maxsim_scores(v, t, direction=direction, backend=backend)

    exact = run(torch.float64, eager)
    for out, rough, want in zip(
        run(torch.bfloat16, ours), run(torch.bfloat16, eager), exact, strict=True
    ):
        assert relative_error(out, want) <= 1.1 * relative_error(rough, want)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_packed_tokens_score_like_masked_ones(backend, device):
    case = make_case(12, 3, 4, 6, 9, 8, "padded", "masked")
    image, text = case.leaves(torch.float32, device)
    mask = case.text.mask.to(device)
    packed, offsets, longest = pack_tokens(text, mask)
    assert packed.shape == (int(mask.sum()), 8)
    assert longest == int(mask.sum(1).max())
    ragged = maxsim_scores(
        image, packed, text_offsets=offsets, max_text_tokens=longest, backend=backend
    )
    masked = maxsim_scores(image, text, text_mask=mask, backend=backend)
    assert relative_error(ragged, masked) <= 1e-6
    (grad,) = torch.autograd.grad(ragged.sum(), text)
    assert grad[mask].abs().sum() > 0
    assert grad[~mask].abs().sum() == 0


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

V, T = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
OFFSETS = torch.tensor([0, 3, 5])
# ruff: noqa: E501
BAD = [
    ({"image_tokens": [1.0]}, TypeError, r"image_tokens must be a tensor"),
    ({"image_tokens": torch.zeros(3, 4)}, ValueError, r"image_tokens must have shape .*\(3, 4\)"),
    ({"text_tokens": torch.zeros(2, 5, 4).long()}, TypeError, r"text_tokens must be floating"),
    ({"text_tokens": torch.zeros(2, 5, 3)}, ValueError, r"\(2, 3, 4\).*\(2, 5, 3\).*got 4 and 3"),
    ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"text_mask.*\(2, 4\).*\(2, 5\)"),
    ({"text_mask": torch.ones(2, 5)}, TypeError, r"text_mask must be bool"),
    ({"image_tokens": torch.zeros(2, 3, 4, device="meta")}, ValueError, r"text_tokens is on cpu.*meta"),
    ({"max_text_tokens": 5}, ValueError, r"max_text_tokens goes with text_offsets"),
    ({"text_tokens": torch.zeros(5, 4), "text_offsets": torch.tensor([0, 4, 3, 5])}, ValueError,
     r"text_offsets must not fall, but goes from 4 to 3 at position 2"),
    ({"text_tokens": torch.zeros(6, 4), "text_offsets": OFFSETS}, ValueError,
     r"text_offsets must run from 0 to the number of rows of text_tokens \(6\).* to 5"),
    ({"text_tokens": torch.zeros(5, 4), "text_offsets": OFFSETS.float()}, TypeError, r"int64 or int32"),
    ({"text_tokens": torch.zeros(5, 4), "text_offsets": OFFSETS, "max_text_tokens": 2}, ValueError,
     r"max_text_tokens is 2, but text_offsets hold an item of 3"),
    ({"text_offsets": OFFSETS}, ValueError, r"text_tokens must have shape \(total, dim\)"),
    ({"direction": "sideways"}, ValueError, r"direction must be one of .*'sideways'"),
    ({"backend": "cudnn"}, ValueError, r"unknown backend 'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    arguments = {"image_tokens": V, "text_tokens": T, **change}
    for call, more in ((maxsim_scores, {}), (maxsim_contrastive_loss, {"logit_scale": 1.0})):
        with pytest.raises(error, match=message):
            call(**arguments, **more)


BAD_LOSS = [
    ({"text_tokens": torch.zeros(3, 5, 4)}, ValueError, r"2 images, 3 texts.*objective='sigmoid'"),
    ({"captions_per_image": 2}, ValueError, r"captions_per_image=2"),
    ({"objective": "sigmoid", "captions_per_image": 0}, ValueError, r"captions_per_image must be"),
    ({"objective": "hinge"}, ValueError, r"objective must be one of"),
    ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must be a float or a 0-dim"),
    ({"logit_scale": "10"}, TypeError, r"logit_scale must be .* not str"),
    ({"pair_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"pair_mask.*\(2, 3\).*\(2, 2\)"),
    ({"grad_filter_eps": -1.0}, ValueError, r"grad_filter_eps must be None or at least 0; got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_LOSS)
def test_bad_loss_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        maxsim_contrastive_loss(
            **{"image_tokens": V, "text_tokens": T, "logit_scale": 1.0, **change}
        )


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_bad_offsets_never_read_outside(backend, device):
    """The op itself, below the checks: what a CUDA caller gets who passes wrong offsets."""
    from fastgoal_kernels.ops.maxsim import maxsim

    image = torch.randn(2, 3, 4, device=device, requires_grad=True)
    text = torch.randn(5, 4, device=device, requires_grad=True)
    offsets = torch.tensor([-3, 7, 2, 900], device=device)
    outputs = maxsim(image, text, None, None, None, offsets, 3, 5, "both", True, True, backend)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert outputs[0].isfinite().all()
    assert text.grad.isfinite().all()

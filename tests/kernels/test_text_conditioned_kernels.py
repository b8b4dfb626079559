"""The Triton engine of text-conditioned scores: under the interpreter, or on a CUDA device.

The public functions' own behaviour is tested in `test_text_conditioned.py`; here is what tiles,
chunks and rounding can get wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("these kernels want a CUDA device or the interpreter", allow_module_level=True)

from fastgoal_kernels import BackendError, TextConditionedPool, reference  # noqa: E402
from fastgoal_kernels.functional import (  # noqa: E402
    text_conditioned_scores,
    text_conditioned_sigmoid_loss,
    text_conditioned_topk,
)
from fastgoal_kernels.ops import text_conditioned as ops  # noqa: E402
from fastgoal_kernels.ops import text_conditioned_triton as engine  # noqa: E402
from fastgoal_kernels.ops.text_conditioned_pool import Need, Pool  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 8 if INTERPRETED else 100


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def make_pool(dim: int, heads: int, zero: bool = True, dtype=torch.float32, seed: int = 0):
    """With no gain or bias at its initial 1 or 0, and a projection as trained ones are scaled."""
    pool = TextConditionedPool(dim, heads, add_zero_attn=zero).to(DEVICE, dtype)
    with torch.no_grad():
        for n, parameter in enumerate(pool.parameters()):
            size = dim**-0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(draw(*parameter.shape, seed=seed + n) * size)
        for norm in (pool.ln_q, pool.ln_k, pool.ln_v):
            norm.weight += 1
    return pool


def chunks_of(pairs: int, dim: int):
    """Launches of so many pairs, so that small inputs need several."""
    return mock.patch.object(engine, "_CHUNK_ELEMENTS", pairs * dim)


@contextmanager
def tiles_of(arch: int) -> Iterator[None]:
    """The tiles that a GPU of this architecture would have."""
    there = mock.patch.object(engine, "architecture", return_value=arch)
    with there, mock.patch.object(engine, "INTERPRETED", False):
        yield


def scores_and_gradients(pool, tokens, text, upstream=None, backend="triton", **options):
    """Scores, and the gradients of the tokens, the features and the pool's parameters."""
    inputs = [tokens.detach().requires_grad_(), text.detach().requires_grad_()]
    inputs += list(pool.parameters())
    scores = pool.scores(*inputs[:2], **options, backend=backend)
    if upstream is None:
        upstream = draw(*scores.shape, seed=99)
    gradients = torch.autograd.grad((scores * upstream.to(scores)).sum(), inputs)
    return [scores.detach(), *gradients]


def in_float64(pool: TextConditionedPool) -> TextConditionedPool:
    wide = TextConditionedPool(
        pool.attn.embed_dim, pool.attn.num_heads, add_zero_attn=pool.attn.add_zero_attn
    )
    wide.to(DEVICE, torch.float64).load_state_dict(pool.state_dict())
    return wide


def in_plain_pytorch(pool, image, text, image_mask=None, text_index=None) -> list[Tensor]:
    """`scores_and_gradients` of the same formula, everything in the pool's own dtype."""
    inputs = [image.clone().requires_grad_(), text.clone().requires_grad_(), *pool.parameters()]
    empty = None
    if image_mask is not None:
        empty = ~image_mask.any(dim=1, keepdim=True)
        image_mask = image_mask | empty
    pooled = reference.text_conditioned_pool(
        *inputs[:2], pool.weights(), pool.attn.num_heads, image_mask=image_mask
    )
    scores = F.cosine_similarity(pooled, inputs[1], dim=-1)
    scores = scores if empty is None else scores.masked_fill(empty, 0)
    scores = scores if text_index is None else scores.gather(1, text_index)
    upstream = draw(*scores.shape, seed=99)
    return [scores.detach(), *torch.autograd.grad((scores * upstream).sum(), inputs)]


def error(got: Tensor, wanted: Tensor, scale: float) -> float:
    got, wanted = got.detach(), wanted.detach()
    return float((got.double() - wanted).norm()) / max(float(wanted.norm()), scale, 1e-30)


def assert_is_the_reference(case: list[Tensor], wanted: list[Tensor], allowed: float) -> None:
    """Errors relative to the tensor's norm, and the keys' bias to that of the values'.

    Without the zero key its gradient is zero: a softmax does not see what all its logits share.
    """
    sizes = [float(x.norm()) for x in wanted[1:]]
    for got, want in zip(case, wanted, strict=True):
        assert got.shape == want.shape
        assert error(got, want, 0.0 if want.ndim == 2 else 0.1 * max(sizes)) <= allowed


def assert_as_exact_as_eager(pool, ours, eager, wanted) -> None:
    """At most 1.1 times the error of the same formula in plain PyTorch of that dtype.

    Twice for the keys' shift: a softmax does not see what all its logits share, so its gradient is
    what the zero key leaves of terms that cancel, and their roundings are a matter of luck.
    """
    names = ["scores", "image", "text", *(name for name, _ in pool.named_parameters())]
    for name, got, other, want in zip(names, ours, eager, wanted, strict=True):
        factor = 2 if name == "ln_k.bias" else 1.1
        assert error(got, want, 0.0) <= factor * error(other, want, 0.0), name


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    images=st.sampled_from([1, 3]), texts=st.sampled_from([1, 7, 16, 25]),
    tokens=st.sampled_from([1, 15, 16, 17, 33]), heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([4, 16, 24]), zero=st.booleans(), masked=st.booleans(),
    columns=st.none() | st.sampled_from([1, 5, 20]), pairs=st.sampled_from([13, 50, 1000]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_scores_and_gradients_are_the_reference(
    images, texts, tokens, heads, head_dim, zero, masked, columns, pairs, seed
):
    dim = heads * head_dim
    pool = make_pool(dim, heads, zero, seed=seed)
    image, text = draw(images, tokens, dim, seed=seed + 1), draw(texts, dim, seed=seed + 2)
    options = {}
    if masked:
        options["image_mask"] = draw(images, tokens, seed=seed + 3) > 0
    if columns is not None:
        place = draw(images, columns, seed=seed + 4).abs() * texts
        options["text_index"] = place.long() % texts
    wanted = scores_and_gradients(
        in_float64(pool), image.double(), text.double(), backend="reference", **options
    )
    with chunks_of(pairs, dim):
        ours = scores_and_gradients(pool, image, text, **options)
    # A few dozen roundings of 2^-24 each, against each other: eager float32 has up to 7e-7.
    assert_is_the_reference(ours, wanted, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampled", [False, True])
def test_half_precision_is_as_exact_as_eagers(dtype, sampled):
    dim, heads = 64, 2
    pool = make_pool(dim, heads, dtype=dtype)
    image, text = draw(4, 33, dim, dtype=dtype, seed=1), draw(40, dim, dtype=dtype, seed=2)
    index = (draw(4, 24, seed=3).abs() * 40).long() % 40 if sampled else None
    options = {"text_index": index}
    wide = in_float64(pool)
    wanted = scores_and_gradients(
        wide, image.double(), text.double(), backend="reference", **options
    )
    ours = scores_and_gradients(pool, image, text, **options)
    assert_as_exact_as_eager(pool, ours, in_plain_pytorch(pool, image, text, **options), wanted)


def assert_parity(heads, head_dim, tokens, texts, masked, sampled, dtype) -> None:
    """Images of which a mask empties one; an index names captions twice."""
    images = 2 if INTERPRETED else 3
    dim = heads * head_dim
    pool = make_pool(dim, heads, dtype=dtype)
    image, text = (
        draw(images, tokens, dim, dtype=dtype, seed=1),
        draw(texts, dim, dtype=dtype, seed=2),
    )
    options = {}
    if masked:
        options["image_mask"] = draw(images, tokens, seed=3) > -1
        options["image_mask"][:2, 0] = torch.tensor([True, False], device=DEVICE)
        options["image_mask"][1] = False
    if sampled:
        index = (draw(images, texts + 2, seed=4).abs() * texts).long() % texts
        index[:, -1] = index[:, 0]
        options["text_index"] = index
    wide = in_float64(pool)
    wanted = scores_and_gradients(
        wide, image.double(), text.double(), backend="reference", **options
    )
    ours = scores_and_gradients(pool, image, text, **options)
    if dtype == torch.float32:
        # Sums of up to 2,048 terms, whose roundings of 2^-24 grow as their square root, through
        # half a dozen products. A token, channel or caption that is lost shows in 10^-3.
        assert_is_the_reference(ours, wanted, 3e-5)
    else:
        eager = in_plain_pytorch(pool, image, text, **options)
        assert_as_exact_as_eager(pool, ours, eager, wanted)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="slow in the interpreter, which has other tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "tokens", "texts", "masked", "sampled"),
    [
        (1, 32, 1, 1, False, False),
        (1, 48, 63, 129, True, False),
        (1, 96, 64, 513, False, True),
        (1, 128, 65, 129, True, True),
        (3, 32, 65, 513, True, True),
        (3, 48, 576, 129, False, True),
        (3, 96, 64, 1, True, False),
        (3, 128, 63, 513, False, False),
        (16, 32, 576, 1, True, True),
        (16, 48, 1, 513, True, True),
        (16, 96, 65, 129, False, False),
        (16, 128, 576, 513, True, False),
    ],
)
def test_a_gpus_tiles_are_crossed(heads, head_dim, tokens, texts, masked, sampled, dtype):
    assert_parity(heads, head_dim, tokens, texts, masked, sampled, dtype)


# 288 channels are more than one block of a Hopper's |o|, and 65 tokens, 129 captions one more than
# whole blocks of every attention kernel.
@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own tiles")
@pytest.mark.parametrize(
    ("arch", "heads", "head_dim", "masked", "sampled", "dtype"),
    [
        (90, 6, 48, True, True, torch.bfloat16),
        (90, 3, 96, False, False, torch.float16),
        (80, 3, 96, True, False, torch.bfloat16),
        (90, 3, 96, True, True, torch.float32),
    ],
)
def test_a_gpus_tiles_are_crossed_in_the_interpreter(arch, heads, head_dim, masked, sampled, dtype):
    with tiles_of(arch):
        assert_parity(heads, head_dim, 65, 129, masked, sampled, dtype)


@pytest.mark.parametrize("size", [0.0, 1e-13])
def test_pooled_features_of_next_to_no_length_are_those_of_the_reference(size):
    """x / max(|x|, 1e-12), which is 0 at 0 and has no gradient there."""
    pool = make_pool(32, 2)
    with torch.no_grad():
        pool.attn.out_proj.weight *= size
        pool.attn.out_proj.bias *= size
    image, text = draw(3, 9, 32, seed=1), draw(5, 32, seed=2)
    text[0] = 0
    wide, inputs = in_float64(pool), (image.double(), text.double())
    lengths = reference.text_conditioned_pool(*inputs, wide.weights(), 2).norm(dim=-1)
    assert bool((lengths < 1e-12).all()) and bool((lengths > 0).all()) == (size > 0)
    wanted = scores_and_gradients(wide, *inputs, backend="reference")
    ours = scores_and_gradients(pool, image, text)
    # The projection's gradient is 10^12 times the others: each has its own size for scale.
    assert all(error(a, b, 0.0) <= 1e-5 for a, b in zip(ours, wanted, strict=True))


def test_a_bad_text_index_that_nobody_looked_at_reads_no_other_row():
    def surrounded(*shape: int, seed: int) -> Tensor:
        """With NaN before and after it."""
        whole = torch.full((shape[0] + 2, *shape[1:]), torch.nan, device=DEVICE)
        whole[1:-1] = draw(*shape, seed=seed)
        return whole[1:-1]

    q, text = surrounded(5, 32, seed=0), surrounded(5, 32, seed=1)
    k, v = draw(2, 4, 32, seed=2), draw(2, 4, 32, seed=3)
    pool = Pool(q, k, v, text, draw(32, 32, seed=4), draw(32, seed=5), None, 2, True)
    index = torch.tensor([[-1, 5, 2], [4, 0, -1]], device=DEVICE)
    results = []
    for captions in (index, index.clamp(0, 4)):
        forward = engine.forward(pool, captions)
        gradients = engine.backward(pool, captions, draw(2, 3), *forward, Need(*[True] * 6))
        results.append([*forward, *gradients])
    for bad, clamped in zip(*results, strict=True):
        assert clamped.isfinite().all() and torch.equal(bad, clamped)


@pytest.mark.parametrize("sampled", [False, True])
def test_no_launch_is_larger_than_cuda_allows(sampled):
    """The second and third axis have 65,535 programs at most; the interpreter has no limit."""
    grids: dict[str, list[tuple[int, ...]]] = {}

    class Kernel:
        def __init__(self, name: str):
            self.grids = grids[name] = []

        def __getitem__(self, grid: tuple[int, ...]):
            self.grids.append(grid)
            return lambda *_, **__: None

    images = 70_000
    q, k = torch.zeros(1, 32, device=DEVICE), torch.zeros(images, 1, 32, device=DEVICE)
    pool = Pool(q, k, k, q, draw(32, 32), draw(32), None, 2, True)
    index = torch.zeros(images, 1, dtype=torch.long, device=DEVICE) if sampled else None
    names = [name for name in vars(engine) if name.endswith("_kernel")]
    with mock.patch.multiple(engine, **{name: Kernel(name) for name in names}):
        forward = engine.forward(pool, index)
        engine.backward(pool, index, forward[0], *forward, Need(*[True] * 6))
    assert len(grids) == 6 and all(grids.values())
    assert all(n <= 65_535 for each in grids.values() for grid in each for n in grid[1:])
    assert sum(grid[2] for grid in grids["attention_kernel"]) == 2 * images
    for name in ("query_gradient_kernel", "key_value_gradient_kernel"):
        assert sum(grid[2] for grid in grids[name]) == images


def test_an_infinite_gradient_is_seen_in_all_of_them():
    """A gradient scaler looks for what is not finite, and skips the step."""
    pool, upstream = make_pool(32, 2), draw(3, 4, seed=9)
    upstream[1, 2] = torch.inf
    _, *gradients = scores_and_gradients(pool, draw(3, 5, 32), draw(4, 32, seed=1), upstream)
    assert all(x.isnan().any() for x in gradients)


def test_float16_keeps_small_gradients():
    """Of a large batch they lie below float16's smallest number until they are summed."""
    pool = make_pool(32, 2, dtype=torch.float16)
    image, text = (draw(*s, 32, dtype=torch.float16, seed=1) for s in ((3, 9), (20,)))
    upstream = draw(3, 20, seed=5)

    def gradients(factor: float) -> list[Tensor]:
        q, k, v, unit, *weights = (x.detach() for x in projected(pool, image, text))
        given = Pool(q, k, v, unit, *weights, None, 2, True)
        # float32 wherever the operator may return it, so that only its inside can lose them.
        given = given._replace(out_weight=given.out_weight.float(), out_bias=given.out_bias.float())
        forward = engine.forward(given, None)
        out = engine.backward(given, None, upstream * factor, *forward, Need(*[True] * 6))
        return [out[3], out[4], out[5]]

    for large, small in zip(gradients(1.0), gradients(2.0**-30), strict=True):
        torch.testing.assert_close(small * 2.0**30, large, rtol=1e-5, atol=1e-5)


def projected(pool, image, text):
    from fastgoal_kernels.functional.text_conditioned import _projected

    return _projected(image, text, pool.weights(), None, "triton")


def test_same_bits_every_run():
    pool = make_pool(48, 3)
    image, text = draw(3, 20, 48, seed=1), draw(30, 48, seed=2)
    index = (draw(3, 25, seed=3).abs() * 30).long() % 30
    for options in ({}, {"text_index": index}):
        with chunks_of(40, 48):
            one, two = (scores_and_gradients(pool, image, text, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_sampled_scores_are_the_dense_ones():
    pool = make_pool(32, 2)
    image, text = draw(4, 9, 32, seed=1), draw(12, 32, seed=2)
    index = torch.arange(12, device=DEVICE).expand(4, -1).flip(1)[:, :7].contiguous()
    dense = pool.scores(image, text, backend="triton")
    sampled = pool.scores(image, text, text_index=index, backend="triton")
    torch.testing.assert_close(sampled, dense.gather(1, index), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "texts", "tokens"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]
)
def test_nothing_scores_nothing(images, texts, tokens):
    pool = make_pool(16, 1)
    ours = scores_and_gradients(pool, draw(images, tokens, 16), draw(texts, 16))
    assert ours[0].shape == (images, texts)
    assert all(not x.any() for x in ours)


def test_an_image_without_a_token_scores_zero_and_harms_nobody():
    pool = make_pool(16, 1, zero=False)
    image, text = draw(3, 5, 16, seed=1), draw(4, 16, seed=2)
    mask = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    image[1] = torch.nan
    scores, d_image, *others = scores_and_gradients(pool, image, text, image_mask=mask)
    assert not scores[1].any() and not d_image[1].any()
    assert all(x.isfinite().all() for x in (scores, d_image, *others))
    alone = pool.scores(image[:1], text, backend="triton")
    assert torch.equal(scores[:1], alone.detach())


@pytest.mark.parametrize("need", torch.eye(6, dtype=torch.long).tolist())
def test_each_gradient_alone_is_that_of_all_together(need):
    q, k, v, text = (draw(*s, 32, seed=n) for n, s in enumerate(((5,), (3, 4), (3, 4), (5,))))
    pool = Pool(q, k, v, text, draw(32, 32, seed=7), draw(32, seed=8), None, 2, True)
    given = pool, None, draw(3, 5, seed=9), *engine.forward(pool, None)
    together = engine.backward(*given, Need(*[True] * 6))
    alone = engine.backward(*given, Need(*map(bool, need)))
    for wanted, a, b in zip(need, alone, together, strict=True):
        assert torch.equal(a, b) if wanted else a.numel() == 0


def test_what_nobody_wants_is_not_launched():
    q, k, v, text = (draw(*s, 32, seed=n) for n, s in enumerate(((5,), (3, 4), (3, 4), (5,))))
    pool = Pool(q, k, v, text, draw(32, 32, seed=7), draw(32, seed=8), None, 2, True)
    forward = engine.forward(pool, None)
    chunk = engine._Chunk
    with (
        mock.patch.object(chunk, "d_projected", autospec=True, side_effect=chunk.d_projected) as o,
        mock.patch.object(chunk, "d_queries", autospec=True, side_effect=chunk.d_queries) as a,
    ):
        for need, projections, attentions in (
            (Need(False, False, False, True, False, False), 0, 0),  # texts alone
            (Need(False, False, False, False, True, True), 1, 0),  # the output projection alone
            (Need(True, False, False, False, False, False), 2, 1),
        ):
            engine.backward(pool, None, draw(3, 5, seed=9), *forward, need)
            assert (o.call_count, a.call_count) == (projections, attentions)


class LargestTensor(TorchDispatchMode):
    bytes = 0  # the interpreter copies tensors as bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and 0 not in result.stride():
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_nothing_of_size_images_x_captions_x_dim_exists():
    images, texts, dim, pairs = 8, 40, 32, 50
    q, text = draw(texts, dim, seed=0), draw(texts, dim, seed=1)
    k, v = draw(images, 3, dim, seed=2), draw(images, 3, dim, seed=3)
    pool = Pool(q, k, v, text, draw(dim, dim, seed=7), draw(dim, seed=8), None, 2, True)
    one_split = mock.patch.object(engine, "_PROGRAMS", 1)
    with chunks_of(pairs, dim), one_split, LargestTensor() as largest:
        forward = engine.forward(pool, None)
        engine.backward(pool, None, draw(images, texts), *forward, Need(*[True] * 6))
    chunk = pairs * dim * 4
    assert chunk / 2 <= largest.bytes <= chunk < images * texts * dim * 4 / 5


@pytest.mark.parametrize("negatives", ["all", "sample"])
@pytest.mark.parametrize("negative_only", [False, True])
def test_loss_is_the_reference(negatives, negative_only):
    pool = make_pool(32, 2)
    image, text = draw(4, 9, 32, seed=1), draw(8, 32, seed=2)
    losses = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (image, text)]
        scale, bias = (torch.tensor(x, device=DEVICE, requires_grad=True) for x in (5.0, -2.0))
        loss = text_conditioned_sigmoid_loss(
            pool.to(dtype), *inputs, scale, bias, captions_per_image=2, negatives=negatives,
            negative_offsets=torch.ones(4, 3, dtype=torch.long, device=DEVICE)
            if negatives == "sample" else None,
            negative_only=negative_only, backend=backend,
        )  # fmt: skip
        losses.append([loss, *torch.autograd.grad(loss, [*inputs, scale, bias])])
    for got, want in zip(*losses, strict=True):
        assert error(got, want, 0.0) <= 5e-6


def test_topk_is_the_reference():
    pool = make_pool(32, 2)
    image, text = draw(5, 9, 32, seed=1), draw(11, 32, seed=2)
    with chunks_of(7, 32):
        ours = text_conditioned_topk(pool, image, text, 3, backend="triton")
    scores = text_conditioned_scores(image, text, pool.weights(), 2, backend="triton")
    for (values, indices), wanted in zip(ours, reference.topk(scores, 3), strict=True):
        torch.testing.assert_close(values, wanted[0], rtol=0, atol=1e-6)
        assert torch.equal(indices, wanted[1])


def test_strides_do_not_matter():
    pool = make_pool(32, 2)
    image, text = draw(3, 9, 64, seed=1)[..., ::2], draw(32, 8, seed=2).T
    ours = pool.scores(image, text, backend="triton")
    again = pool.scores(image.contiguous(), text.contiguous(), backend="triton")
    torch.testing.assert_close(ours, again, rtol=0, atol=1e-6)


def test_wide_heads_get_the_torch_backend():
    pool, image, text = make_pool(144, 1), draw(2, 3, 144, seed=1), draw(4, 144, seed=2)
    with pytest.raises(BackendError, match=r"heads of up to 128 channels; got 144"):
        pool.scores(image, text, backend="triton")
    with mock.patch.object(engine, "forward", side_effect=AssertionError):
        assert pool.scores(image, text).shape == (2, 4)


def test_opcheck():
    q, text = draw(5, 32, seed=1), draw(5, 32, seed=2)
    k, v = draw(3, 4, 32, seed=3), draw(3, 4, 32, seed=4)
    for x in (q, text, k, v):
        x.requires_grad_()
    weights = draw(32, 32, seed=5).requires_grad_(), draw(32, seed=6).requires_grad_()
    index = torch.randint(0, 5, (3, 4), device=DEVICE)
    for place in (None, index):
        arguments = (q, k, v, text, *weights, None, place, 2, True, "triton")
        torch.library.opcheck(ops.text_conditioned_scores, arguments)
        tensors = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        scores, norms = ops.text_conditioned_scores(*tensors)
        backward = (torch.ones_like(scores), scores, norms, *tensors, [True] * 6)
        torch.library.opcheck(ops.text_conditioned_scores_backward, backward)

"""The best matches: every layout, block and device against sorting the whole score matrix.

Tokens are small multiples of 1/4 and scores their sums, so that products and sums are exact in
every dtype: however the blocks fall, the same pairs must win, ties included. A CUDA device joins
where there is one; elsewhere the meta device stands in for it: what mixes it with the CPU, or looks
at a value on it, is an error there.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgoal_kernels import maxsim_topk, reference
from fastgoal_kernels.functional import token_blocks
from fastgoal_kernels.functional.token_blocks import block_pairs, scoring_device, side_of
from fastgoal_kernels.ops.topk import streaming_topk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# (backend, where the tokens are, where to score) that run on this machine.
PLACES = [("torch", "cpu", "cpu")]
if torch.cuda.is_available():
    PLACES += [
        (backend, tokens, "cuda") for backend in ("torch", "triton") for tokens in ("cpu", "cuda")
    ]
elif INTERPRETED:
    PLACES = [("triton", "cpu", "cpu")]
EXAMPLES = 8 if INTERPRETED else 60
LAYOUTS = ("padded", "masked", "ragged")


def make_side(
    name: str,
    layout: str,
    items: int,
    length: int,
    generator: torch.Generator,
    dim: int = 3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """One modality's arguments. Few distinct values, so that scores tie; sometimes a NaN."""

    def tokens(*shape: int) -> Tensor:
        x = torch.randint(-2, 3, (*shape, dim), generator=generator).to(dtype) / 4
        if x.numel() and torch.rand(1, generator=generator) < 0.3:
            x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = torch.nan
        return x

    if layout == "ragged":
        lengths = torch.randint(0, length + 1, (items,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        return {f"{name}_tokens": tokens(int(offsets[-1])), f"{name}_offsets": offsets}
    side: dict[str, Any] = {f"{name}_tokens": tokens(items, length)}
    if layout == "masked":
        side[f"{name}_mask"] = torch.rand(items, length, generator=generator) < 0.6
    return side


def moved(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) for name, x in arguments.items()}


def small_blocks(monkeypatch: pytest.MonkeyPatch, items: int, size: int = 1 << 28) -> None:
    monkeypatch.setattr(token_blocks, "_BLOCK_ITEMS", items)
    monkeypatch.setattr(token_blocks, "_BLOCK_BYTES", size)


def assert_same(out, expected) -> None:
    """Both ways: the same scores, bit by bit, in the same order."""
    for (values, indices), (want, want_indices) in zip(out, expected, strict=True):
        torch.testing.assert_close(values.double().cpu(), want, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(indices.cpu(), want_indices)


class Watch(TorchDispatchMode):
    """The size in bytes of the largest tensor that any op returns, views included."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


# ---------------------------------------------------------------------------------------------
# The merge
# ---------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(0, 9), columns=st.integers(0, 9),
    k=st.integers(1, 11), tile_rows=st.integers(1, 10), tile_columns=st.integers(1, 10),
    by_column=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_streaming_topk_is_the_reference(
    seed, rows, columns, k, tile_rows, tile_columns, by_column, dtype
):
    """A few distinct values, so that nearly everything ties; infinities, zeros and NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    scores = values[torch.randint(0, len(values), (rows, columns), generator=generator)]
    corners = [(r, c) for r in range(0, rows, tile_rows) for c in range(0, columns, tile_columns)]
    if by_column:
        corners.sort(key=lambda corner: corner[::-1])
    tiles = []
    for r, c in corners:
        part = slice(r, min(r + tile_rows, rows)), slice(c, min(c + tile_columns, columns))
        tiles.append((*part, scores[part]))
    got = streaming_topk((rows, columns), k, tiles, scores)
    expected = [x for pair in reference.topk(scores, k) for x in pair]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# The blocks
# ---------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 5), max_size=12),
    items=st.integers(1, 5),
    rows=st.integers(0, 12),
)
def test_blocks_hold_every_item_once_within_the_limits(lengths, items, rows):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.zeros(int(offsets[-1]), 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, items, rows * 2 * 4)
        blocks = list(side_of("text", tokens, None, offsets).blocks())
    assert [item for block in blocks for item in range(len(lengths))[block]] == [
        *range(len(lengths))
    ]
    for block in blocks:
        assert 1 <= block.stop - block.start <= items
        assert block.stop - block.start == 1 or sum(lengths[block]) <= rows


@pytest.mark.parametrize(("backend", "home", "device"), PLACES)
@settings(max_examples=EXAMPLES)
@given(
    seed=st.integers(0, 2**31), num_images=st.integers(0, 6), num_texts=st.integers(0, 6),
    length=st.integers(1, 5), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    direction=st.sampled_from(["text_to_image", "image_to_text"]), k=st.integers(1, 8),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    items=st.integers(1, 4), size=st.sampled_from([1, 60, 200]),
)  # fmt: skip
def test_topk_is_the_reference_whatever_the_layout_and_the_blocks(
    backend, home, device, seed, num_images, num_texts, length, layouts, direction, k, dtypes,
    items, size,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    arguments = {
        **make_side("image", layouts[0], num_images, length, generator, dtype=dtypes[0]),
        **make_side("text", layouts[1], num_texts, length, generator, dtype=dtypes[1]),
    }
    options = {"direction": direction, "reduction": "sum"}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    expected = reference.topk(reference.maxsim_scores(**exact, **options), k)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, items, size)
        out = maxsim_topk(**moved(arguments, home), k=k, **options, device=device, backend=backend)
    assert_same(out, expected)
    for values, indices in out:
        assert values.dtype == torch.float32 and indices.dtype == torch.int64
        assert values.device.type == indices.device.type == device


@pytest.mark.skipif(INTERPRETED, reason="the Triton kernels do not take float64")
@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_means_of_normalised_float64_tokens(direction, monkeypatch):
    """The defaults, strided tokens, and gradients that nobody keeps."""
    small_blocks(monkeypatch, 3)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(7, 5, 16, generator=generator, dtype=torch.float64)[..., ::2]
    text = torch.randn(8, 6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(8, 6, generator=generator) < 0.7
    arguments = {"text_mask": mask, "direction": direction, "normalize": True}
    expected = reference.topk(reference.maxsim_scores(image, text, **arguments), 4)
    for have, want in zip(maxsim_topk(image, text, 4, **arguments), expected, strict=True):
        torch.testing.assert_close(have[0], want[0].detach(), rtol=1e-12, atol=0)
        assert torch.equal(have[1], want[1])
        assert have[0].dtype == torch.float64 and not have[0].requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_larger_than_a_block_is_made(layout, monkeypatch):
    """The scores alone would be four times, either side's tokens twelve times as large."""
    small_blocks(monkeypatch, 16, 4096)
    generator = torch.Generator().manual_seed(2)
    arguments = {
        **make_side("image", layout, 64, 25, generator, dim=8),
        **make_side("text", layout, 64, 25, generator, dim=8),
    }
    with Watch() as watch:
        maxsim_topk(**arguments, k=3, normalize=True, backend="torch")
    assert watch.largest <= 4096


# ---------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------


def test_tokens_on_the_disk(tmp_path, monkeypatch):
    small_blocks(monkeypatch, 2)
    generator = torch.Generator().manual_seed(3)
    arguments = {
        **make_side("image", "padded", 5, 4, generator),
        **make_side("text", "ragged", 7, 4, generator),
    }
    stored = arguments["text_tokens"]
    mapped = torch.from_file(
        str(tmp_path / "text"), shared=True, size=stored.numel(), dtype=stored.dtype
    )
    mapped.copy_(stored.flatten())
    want = reference.topk(reference.maxsim_scores(**arguments, reduction="sum").double(), 3)
    arguments["text_tokens"] = mapped.view_as(stored)
    assert_same(maxsim_topk(**arguments, k=3, reduction="sum"), want)


@pytest.mark.parametrize("image_home", ["cpu", "meta"])
@pytest.mark.parametrize("layouts", [("padded", "ragged"), ("masked", "masked")])
def test_a_corpus_on_the_cpu_is_scored_elsewhere(image_home, layouts, monkeypatch):
    small_blocks(monkeypatch, 2)
    generator = torch.Generator().manual_seed(4)
    image = moved(make_side("image", layouts[0], 6, 4, generator), image_home)
    text = make_side("text", layouts[1], 8, 4, generator)
    device = scoring_device(
        "meta" if image_home == "cpu" else None, image["image_tokens"], text["text_tokens"]
    )
    assert device.type == "meta"
    sides = [
        side_of(name, *(arguments.get(f"{name}_{part}") for part in ("tokens", "mask", "offsets")))
        for name, arguments in (("image", image), ("text", text))
    ]

    def tiles():
        for images, texts, arguments in block_pairs(*sides, device):
            tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
            assert len(tensors) == 2 + (layouts[0] == "masked") + (layouts[1] != "padded")
            assert all(x.device == device for x in tensors)
            yield images, texts, torch.empty(2, 2, device=device)

    out = streaming_topk((6, 8), 3, tiles(), torch.empty(0, device=device))
    assert [x.shape for x in out] == [(6, 3)] * 2 + [(8, 3)] * 2
    assert all(x.device == device for x in out)


def test_texts_travel_once_to_images_that_are_there(monkeypatch):
    small_blocks(monkeypatch, 2)
    travelled = []

    def copy(x: Tensor, device: torch.device) -> Tensor:
        if x.device != device:
            travelled.append(x.shape[0])
        return x.to(device)

    monkeypatch.setattr(token_blocks, "copied", copy)
    images = side_of("image", torch.zeros(6, 3, 4, device="meta"), None, None)
    texts = side_of("text", torch.zeros(8, 5, 4), None, None)
    assert len(list(block_pairs(images, texts, torch.device("meta")))) == 3 * 4
    assert sum(travelled) == 8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_long_corpus_takes_bounded_memory_on_the_device():
    torch.manual_seed(5)
    block = 1 << 22
    image, text = torch.randn(64, 64, 64, device="cuda"), torch.randn(1 << 14, 32, 64)
    expected = maxsim_topk(image, text.cuda(), 10)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, 1 << 11, block)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pageable, pinned = (maxsim_topk(image, t, 10) for t in (text, text.pin_memory()))
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < text.numel() * text.element_size() / 2
    for out in (pageable, pinned):
        for (values, indices), (want, want_indices) in zip(out, expected, strict=True):
            torch.testing.assert_close(values, want)
            assert (indices == want_indices).double().mean() > 0.99  # near-ties may flip


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

V, T = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
MASK = torch.ones(2, 5, dtype=torch.bool)
OFFSETS = torch.tensor([0, 3, 5])
BAD = [
    ({"k": 0}, ValueError, r"k must be an int of at least 1; got 0"),
    ({"k": 1.0}, ValueError, r"k must be an int of at least 1; got 1.0"),
    ({"direction": "both"}, ValueError, r"direction must be one of .*'both'"),
    ({"reduction": "max"}, ValueError, r"reduction must be one of .*'max'"),
    ({"device": "gpu"}, ValueError, r"device must be one that is there, .*got 'gpu'"),
    ({"text_tokens": torch.zeros(2, 5, 3)}, ValueError, r"got 4 and 3"),
    ({"text_mask": MASK.to("meta")}, ValueError,
     r"text_mask is on meta, but text_tokens is on cpu"),
    ({"text_tokens": torch.zeros(5, 4), "text_offsets": OFFSETS, "max_text_tokens": 2}, ValueError,
     r"max_text_tokens is 2, but text_offsets hold an item of 3"),
    ({"text_tokens": torch.zeros(5, 4), "text_offsets": [0, 3, 5]}, TypeError,
     r"text_offsets must be a tensor"),
    ({"text_tokens": [1.0]}, TypeError, r"text_tokens must be a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        maxsim_topk(**{"image_tokens": V, "text_tokens": T, "k": 1, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"device must be one that is there.*'cuda'"):
        maxsim_topk(V, T, 1, device="cuda")

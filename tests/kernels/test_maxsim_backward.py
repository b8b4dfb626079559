"""The ways of the MaxSim backward in Triton, each on its own, against the float64 definition.

Winners are drawn at random (skewed ones, as real images make them, too): the backward takes them
as they are. Tokens and gradients are small multiples of 1/4, so that what is left to compare is the
rounding of results, and in bf16 and float16 that of shares.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("these kernels want a CUDA device or the interpreter", allow_module_level=True)

from fastgoal_kernels.ops import (  # noqa: E402
    inverted_index_triton,
    maxsim_backward_triton,
    maxsim_gather_triton,
    maxsim_scatter_triton,
)
from fastgoal_kernels.ops.maxsim_backward_triton import side_gradient, strategy  # noqa: E402
from fastgoal_kernels.ops.token_rows import TokenRows, token_rows, winner_dtype  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
WAYS = ("lists", "product")
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-10}


def random_side(
    generator: torch.Generator, layout: str, items: int, length: int, dim: int, dtype: torch.dtype
) -> TokenRows:
    """Padded, masked (with holes, and an empty item) or ragged (with an empty item) rows."""
    mask = offsets = None
    if layout == "ragged":
        lengths = torch.randint(1, length + 1, (items,), generator=generator)
        lengths[items // 2] = 0
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    elif layout == "masked":
        mask = torch.rand(items, length, generator=generator) < 0.7
        mask[items // 2] = False
    shape = (items, length, dim) if offsets is None else (int(offsets[-1]), dim)
    tokens = torch.randint(-4, 5, shape, generator=generator) / 4
    if mask is not None:
        tokens[~mask] = torch.nan  # padding may hold anything
    placed = [x if x is None else x.to(DEVICE) for x in (tokens.to(dtype), mask, offsets)]
    return token_rows(*placed, length, mean=True)


def random_winners(
    generator: torch.Generator, queries: TokenRows, keys: TokenRows, skewed: bool
) -> Tensor:
    """(keys' items, query rows): a valid key of each item; nearly always its last if skewed."""
    winners = torch.zeros(keys.items, queries.total, dtype=torch.int64)
    weight = keys.row_weight.cpu()
    for item in range(keys.items):
        start, length = int(keys.starts[item]), int(keys.lengths[item])
        valid = weight[start : start + length].nonzero().flatten()
        if len(valid) == 0:
            continue
        choice = torch.randint(len(valid), (queries.total,), generator=generator)
        if skewed:
            often = torch.rand(queries.total, generator=generator) < 0.9
            choice[often] = len(valid) - 1
        winners[item] = valid[choice]
    return winners.to(winner_dtype(keys.longest)).to(DEVICE)


def expected_gradient(own, other, gather, scatter) -> Tensor:
    """What side_gradient means, one sum of rows after another, in float64."""
    gradient = torch.zeros(own.rows.shape, dtype=torch.float64)
    own_weight, other_weight = own.row_weight.double().cpu(), other.row_weight.double().cpu()
    own_item, other_item = own.row_item.long().cpu(), other.row_item.long().cpu()
    rows = other.rows.double().cpu().masked_fill((other_weight == 0)[:, None], 0)
    if gather:
        winners, g = gather[0].long().cpu(), gather[1].double().cpu()
        for x in range(other.items):
            if int(other.lengths[x]):
                share = g[own_item, x] * own_weight
                gradient += share[:, None] * rows[int(other.starts[x]) + winners[x]]
    if scatter:
        winners, g = scatter[0].long().cpu(), scatter[1].double().cpu()
        for i in range(own.items):
            if int(own.lengths[i]):
                share = (g[i, other_item] * other_weight)[:, None] * rows
                gradient.index_add_(0, int(own.starts[i]) + winners[i], share)
    return gradient


def make_case(
    seed: int, own_layout: str, other_layout: str, dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int, int, int] = (3, 17, 4, 21, 33), skewed: bool = False,
    zeros: float = 0.0,
):  # fmt: skip
    """own, other, gather, scatter of side_gradient; a share `zeros` of pairs has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    own_items, own_length, other_items, other_length, dim = sizes
    own = random_side(generator, own_layout, own_items, own_length, dim, dtype)
    other = random_side(generator, other_layout, other_items, other_length, dim, dtype)

    def grad() -> Tensor:
        g = torch.randint(1, 9, (own_items, other_items), generator=generator) / 4
        return (g * (torch.rand(g.shape, generator=generator) >= zeros)).to(DEVICE)

    gather = random_winners(generator, own, other, skewed), grad()
    scatter = random_winners(generator, other, own, skewed), grad()
    return own, other, gather, scatter


def relative_error(out: Tensor, want: Tensor) -> float:
    return float((out.double().cpu() - want).norm() / want.norm().clamp_min(1e-30))


LAYOUTS = [("padded", "padded"), ("masked", "ragged"), ("ragged", "masked")]
KINDS = ["gather", "scatter", "both"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "layouts", "kinds"),
    [
        *((torch.float32, layouts, kinds) for layouts in LAYOUTS for kinds in KINDS),
        *((dtype, LAYOUTS[1], "both") for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_every_way_is_the_definition(way, dtype, layouts, kinds):
    own, other, gather, scatter = make_case(1, *layouts, dtype)
    gather = None if kinds == "scatter" else gather
    scatter = None if kinds == "gather" else scatter
    out = side_gradient(own, other, gather, scatter, False, way)
    want = expected_gradient(own, other, gather, scatter)
    assert out.dtype == dtype
    assert relative_error(out, want) <= ERROR[dtype]
    assert out.cpu()[want.abs().sum(1) == 0].abs().sum() == 0


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_every_run(way):
    case = make_case(8, "padded", "padded", sizes=(2, 9, 3, 14, 33), skewed=True)
    first = side_gradient(*case, False, way)
    assert torch.equal(first, side_gradient(*case, False, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_winners_of_most_queries_make_long_lists(way, layouts):
    """Lists of several blocks of the index, and of several pieces."""
    sizes = (2, 19, 5, 70, 33)
    own, other, _, scatter = make_case(2, *layouts, sizes=sizes, skewed=True)
    out = side_gradient(own, other, None, scatter, False, way)
    assert relative_error(out, expected_gradient(own, other, None, scatter)) <= 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("zeros", [0.6, 1.0])
def test_pairs_without_a_gradient_add_nothing(way, skip_zeros, zeros):
    own, other, gather, scatter = make_case(
        3, "padded", "masked", sizes=(9, 5, 7, 11, 16), zeros=zeros
    )
    out = side_gradient(own, other, gather, scatter, skip_zeros, way)
    want = expected_gradient(own, other, gather, scatter)
    assert relative_error(out, want) <= 1e-6
    if zeros == 1.0:
        assert out.abs().sum() == 0


@pytest.mark.parametrize("way", WAYS)
def test_items_that_are_all_empty_give_zeros(way):
    full = token_rows(torch.ones(2, 5, 16, device=DEVICE), None, None, 5, True)
    mask = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
    empty = token_rows(torch.full((3, 4, 16), torch.nan, device=DEVICE), mask, None, 4, True)
    for own, other in ((full, empty), (empty, full)):
        gather = torch.zeros(other.items, own.total, dtype=torch.uint8, device=DEVICE)
        scatter = torch.zeros(own.items, other.total, dtype=torch.uint8, device=DEVICE)
        grad = torch.ones(own.items, other.items, device=DEVICE)
        out = side_gradient(own, other, (gather, grad), (scatter, grad), False, way)
        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("way", WAYS)
def test_wide_winners(way):
    """Two bytes a winner, and more bins than the index counts at once."""
    case = make_case(4, "padded", "padded", sizes=(1, 300, 1, 280, 16))
    out = side_gradient(*case, False, way)
    assert relative_error(out, expected_gradient(*case)) <= 1e-6


def test_little_memory_changes_no_bit(monkeypatch):
    """Own items a few at a time, lists and live items alike."""
    case = make_case(5, "padded", "padded", sizes=(5, 9, 6, 30, 16), zeros=0.3)
    whole = side_gradient(*case, True, "lists")
    one = maxsim_scatter_triton.items_at_once(*case[:2])
    assert one == 5
    monkeypatch.setattr(maxsim_scatter_triton, "MEMORY", maxsim_scatter_triton.MEMORY // 100)
    few = maxsim_scatter_triton.items_at_once(*case[:2])
    while few > 2:
        monkeypatch.setattr(maxsim_scatter_triton, "MEMORY", maxsim_scatter_triton.MEMORY // 2)
        few = maxsim_scatter_triton.items_at_once(*case[:2])
    assert few in (1, 2)
    monkeypatch.setattr(maxsim_gather_triton, "_PAIRS_AT_ONCE", 12)
    assert torch.equal(side_gradient(*case, True, "lists"), whole)


def test_the_index_lists_who_chose_in_order():
    own, other, _, (winners, grad) = make_case(6, "padded", "ragged", skewed=True, zeros=0.3)
    index = inverted_index_triton.inverted_index(own, other, winners, grad, 1, 2)
    for slot, item in enumerate((1, 2)):
        share = (grad[item, other.row_item.long()] * other.row_weight).cpu()
        end = 0
        for k in range(own.longest):
            chose = ((winners[item].cpu() == k) & (share != 0)).nonzero().flatten()
            assert int(index.lengths[slot, k]) == len(chose)
            begin, end = end, int(index.list_ends[slot, k, -1])
            assert torch.equal(index.rows[slot, begin:end].long().cpu(), chose)
            assert torch.equal(index.shares[slot, begin:end].cpu(), share[chose])


@pytest.mark.parametrize(
    ("own_length", "other_length", "dtype", "as_queries", "as_keys", "skip_zeros", "way"),
    [
        (77, 196, torch.bfloat16, True, False, False, "lists"),  # text_to_image, of the texts
        (196, 77, torch.bfloat16, False, True, False, "lists"),  # of the images
        (77, 196, torch.bfloat16, True, True, False, "product"),  # both
        (196, 77, torch.bfloat16, True, True, False, "product"),
        (77, 64, torch.bfloat16, True, False, False, "product"),  # few regions
        (64, 77, torch.bfloat16, False, True, False, "product"),
        (248, 576, torch.bfloat16, True, True, False, "lists"),
        (196, 77, torch.float32, True, True, False, "lists"),
        (196, 77, torch.bfloat16, True, True, True, "lists"),  # a gradient filter
    ],
)
def test_the_rule(own_length, other_length, dtype, as_queries, as_keys, skip_zeros, way):
    def side(length: int) -> TokenRows:
        return token_rows(torch.zeros(2, length, 8, dtype=dtype), None, None, length, True)

    sides = side(own_length), side(other_length)
    assert strategy(*sides, as_queries, as_keys, skip_zeros) == way


def test_an_index_that_does_not_fit_is_not_made(monkeypatch):
    rows = token_rows(torch.zeros(2, 196, 8, dtype=torch.bfloat16), None, None, 196, True)
    assert strategy(rows, rows, False, True, True) == "lists"
    monkeypatch.setattr(maxsim_scatter_triton, "MEMORY", 1 << 10)
    assert strategy(rows, rows, False, True, True) == "product"
    assert strategy(rows, rows, True, False, True) == "lists"


def test_backward_serves_both_sides_and_only_those_wanted():
    images, texts, i2t, t2i = make_case(7, "masked", "ragged")
    want_image = expected_gradient(images, texts, i2t, t2i)
    for need_image, need_text in ((True, True), (True, False), (False, True)):
        image_grad, text_grad = maxsim_backward_triton.backward(
            images, texts, t2i, i2t, need_image, need_text, False
        )
        assert (image_grad is not None, text_grad is not None) == (need_image, need_text)
        if image_grad is not None:
            assert relative_error(image_grad, want_image) <= 1e-6
        if text_grad is not None:
            of_text = (i2t[0], i2t[1].T), (t2i[0], t2i[1].T)
            want = expected_gradient(texts, images, of_text[1], of_text[0])
            assert relative_error(text_grad, want) <= 1e-6

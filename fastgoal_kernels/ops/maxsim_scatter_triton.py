"""The MaxSim backward of keys, by inverted index, in Triton.

    d own[k] = sum over the other rows s that chose k of g * w_s * other[s]

The index lists those rows (see `inverted_index_triton`); a program sums a list. Lists are as long
as the winners make them: in a real image a few regions win most words. So a list is cut into
pieces, each a program's, and what the pieces of one list came to is added in their order.

The index is made for as many own items at a time as its memory allows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .inverted_index_triton import index_bytes, inverted_index
from .tiles_triton import Config, tile_case
from .token_rows import TokenRows

# Bytes that the index and the pieces' sums may take together.
MEMORY = 24 << 20

# Entries of a piece.
_PIECE = 32 if INTERPRETED else 1024

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = ["first_item", "other_rows", "num_bins", "num_blocks", "num_cells"]


@triton.jit
def _piece_cell(item, order, pieces, first, num_cells, PIECE: tl.constexpr):
    """Where a piece of a list that has several keeps its sum.

    Whole pieces begin in different cells of PIECE entries; so do the last pieces of lists, between
    which lies a whole one.
    """
    return (item * num_cells + first // PIECE) * 2 + (order == pieces - 1).to(tl.int64)


@triton.jit
def _list(list_ends, owner, num_bins, num_blocks):
    """Begin and end of a list, in its item's entries."""
    end = tl.load(list_ends + (owner + 1) * num_blocks - 1)
    before = tl.maximum(owner * num_blocks - 1, 0)
    return tl.where(owner % num_bins == 0, 0, tl.load(list_ends + before)), end


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def sum_pieces_kernel(
    own_grad, piece_sums, piece_owners, piece_ends, list_ends, entry_rows, entry_shares, own_starts,
    others, first_item, other_rows, num_bins, num_blocks, num_cells,
    D: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum one piece of a list, in a block of channels: the gradient, if the list has no other."""
    piece = tl.program_id(0)
    owner = tl.load(piece_owners + piece).to(tl.int64)
    if owner < 0:
        return
    item = owner // num_bins
    begin, end = _list(list_ends, owner, num_bins, num_blocks)
    pieces = (end - begin + PIECE - 1) // PIECE
    order = piece - (tl.load(piece_ends + owner) - pieces)
    first = begin + order * PIECE
    end = tl.minimum(first + PIECE, end)
    entry_rows += item * other_rows
    entry_shares += item * other_rows
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(first, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < end
        s = tl.load(entry_rows + entry, mask=inside, other=0).to(tl.int64)
        share = tl.load(entry_shares + entry, mask=inside, other=0.0)
        other = tl.load(
            others + s[:, None] * D + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total += share[:, None] * other.to(tl.float32)
    gradient = tl.sum(total, axis=0)
    if pieces == 1:
        row = tl.load(own_starts + first_item + item) + owner % num_bins
        tl.store(own_grad + row * D + d, gradient.to(own_grad.dtype.element_ty), mask=d < D)
    else:
        cell = _piece_cell(item, order, pieces, first, num_cells, PIECE)
        tl.store(piece_sums + cell * D + d, gradient, mask=d < D)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def add_pieces_kernel(
    own_grad, piece_sums, list_ends, own_starts,
    first_item, num_bins, num_blocks, num_cells,
    D: tl.constexpr, PIECE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of an own row whose list has several pieces."""
    owner = tl.program_id(0).to(tl.int64)
    begin, end = _list(list_ends, owner, num_bins, num_blocks)
    pieces = (end - begin + PIECE - 1) // PIECE
    if pieces < 2:
        return
    item = owner // num_bins
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    gradient = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for order in range(0, pieces):
        cell = _piece_cell(item, order, pieces, begin + order * PIECE, num_cells, PIECE)
        gradient += tl.load(piece_sums + cell * D + d, mask=d < D, other=0.0)
    row = tl.load(own_starts + first_item + item) + owner % num_bins
    tl.store(own_grad + row * D + d, gradient.to(own_grad.dtype.element_ty), mask=d < D)


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------


def _config(dtype: torch.dtype) -> Config:
    """1 x entries x channels: 256 bytes of each row."""
    if INTERPRETED:
        return Config(1, 16, 64, 4, 1)
    return Config(1, 32, 64 if dtype == torch.float32 else 128, 4, 1)


def _cells(other: TokenRows) -> int:
    return other.total // _PIECE + 1


def items_at_once(own: TokenRows, other: TokenRows) -> int:
    """Own items whose lists fit in MEMORY; 0 if not even one's do."""
    index = index_bytes(own, other)
    if index is None:
        return 0
    sums = 8 * _cells(other) * own.rows.shape[1]
    return min(own.items, MEMORY // (index + sums + 16 * own.longest))


def scatter_gradient(
    own: TokenRows, other: TokenRows, winners: Tensor, grad: Tensor, gradient: Tensor
) -> None:
    """Write d own.rows into `gradient`, which is 0: of own rows that nobody chose.

    winners (own items, other rows); grad is dL/dS (own items, other items).
    """
    dim, device = own.rows.shape[1], own.rows.device
    config = _config(own.rows.dtype)
    at_once = items_at_once(own, other)
    cells, bins = _cells(other), own.longest
    channels = triton.cdiv(dim, config.block_d)
    sizes = dict(D=dim, PIECE=_PIECE, BLOCK_D=config.block_d, **config.launch)
    piece_sums = torch.empty(at_once * cells * 2 * dim, dtype=torch.float32, device=device)
    for first in range(0, own.items, at_once):
        items = min(at_once, own.items - first)
        index = inverted_index(own, other, winners, grad, first, items)
        blocks = index.list_ends.shape[2]
        pieces = (index.lengths + (_PIECE - 1)) // _PIECE
        piece_ends = pieces.view(-1).cumsum(0, dtype=torch.int32)
        # As many as there could be.
        piece = torch.arange(
            items * (other.total // _PIECE) + min(items * bins, own.total),
            dtype=torch.int32, device=device,
        )  # fmt: skip
        owners = torch.searchsorted(piece_ends, piece, right=True, out_int32=True)
        owners.masked_fill_(owners >= items * bins, -1)
        sum_pieces_kernel[(len(piece), channels)](
            gradient, piece_sums, owners, piece_ends, index.list_ends, index.rows, index.shares,
            own.starts, other.rows, first, other.total, bins, blocks, cells,
            BLOCK=config.block_n, **sizes,
        )  # fmt: skip
        add_pieces_kernel[(items * bins, channels)](
            gradient, piece_sums, index.list_ends, own.starts, first, bins, blocks, cells, **sizes
        )
        del index, pieces, piece_ends, piece, owners  # before the next are made


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def compile_cases(arch: int) -> list[CompileCase]:
    """Every configuration the launcher picks: at a width of CLIP's, and at one no tile divides."""
    pointer_types = {
        "own_grad": "tokens", "others": "tokens", "own_starts": "*i64", "piece_sums": "*fp32",
        "entry_shares": "*fp32", "entry_rows": "*i32", "piece_owners": "*i32",
        "piece_ends": "*i32", "list_ends": "*i32",
    }  # fmt: skip
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        config = _config(dtype)
        for dim in (512, 1000):
            for kernel in (sum_pieces_kernel, add_pieces_kernel):
                constexprs: dict[str, object] = dict(D=dim, PIECE=_PIECE, BLOCK_D=config.block_d)
                if kernel is sum_pieces_kernel:
                    constexprs["BLOCK"] = config.block_n
                cases.append(
                    tile_case(
                        kernel,
                        f"D={dim}",
                        dtype,
                        config,
                        constexprs,
                        pointer_types.get,
                        has_product=False,
                    )
                )
    return cases

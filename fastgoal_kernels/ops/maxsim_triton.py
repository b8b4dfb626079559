"""MaxSim in Triton: a matrix product whose epilogue is a maximum, and its backward.

Forward. A program takes (image, text) pairs one after the other. For a pair it multiplies a block
of one side's tokens with a block of the other's, tiled over D as any matrix product is, and reduces
the float32 tile while it is still in registers: along one axis, or along both for the price of one
product. What leaves the chip is one score a pair and, for the backward, the index of each winner in
one to four bytes.

Backward. The winners say everything. With g = dL/dS and w a query token's share in its mean:

    gather   d query[q] = w_q * sum over keys' items x of g[x] * key[x, winner[x, q]]
    scatter  d key[k]   = sum over all query rows s with winner[s] = k of g * w_s * query[s]

Each program owns a block of output rows, walks the other side in a fixed order and writes once: no
atomics, the same bits every run. The scatter is a product with the matrix whose entry (k, s) is
g * w_s where winner[s] = k and 0 elsewhere, which is built in registers and fed to the matrix unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .token_rows import TokenRows, new_outputs

# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "num_queries", "num_keys", "num_others",
    "query_rows", "key_rows", "own_rows", "other_rows", "scratch_rows",
    "score_query_stride", "score_key_stride", "grad_own_stride", "grad_other_stride",
]  # fmt: skip


# Triton's interpreter is NumPy: it would multiply the bits of bfloat16 as integers.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pair(index, num_queries, num_keys, GROUP: tl.constexpr):
    """The index-th (query item, key item): GROUP queries meet all keys before the next GROUP.

    The group's tokens and the few keys in flight stay in L2 while they are used.
    """
    group = index // (GROUP * num_keys)
    within = index % (GROUP * num_keys)
    size = tl.minimum(num_queries - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _similarity_tile(
    queries, query_start, first_query, query_length,
    keys, key_start, first_key, key_length,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_Q, BLOCK_K) float32 dot products. Rows past an item's end repeat its last row."""
    q = tl.minimum(first_query + tl.arange(0, BLOCK_Q), query_length - 1)
    k = tl.minimum(first_key + tl.arange(0, BLOCK_K), key_length - 1)
    d = tl.arange(0, BLOCK_D)
    q_ptrs = queries + (query_start + q)[:, None] * D + d[None, :]
    k_ptrs = keys + (key_start + k)[None, :] * D + d[:, None]
    tile = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float32)
    for d_start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            a = tl.load(q_ptrs)
            b = tl.load(k_ptrs)
        else:
            inside = d_start + d < D
            a = tl.load(q_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(k_ptrs, mask=inside[:, None], other=0.0)
        tile = _dot(a, b, tile, PRECISION)
        q_ptrs += BLOCK_D
        k_ptrs += BLOCK_D
    return tile


@triton.jit
def _best(tile, key_index, AXIS: tl.constexpr):
    """The maximum along an axis, NaN if one is there, and the lowest index that reaches it."""
    best = tl.reduce(tile, AXIS, _nan_max)
    # The index is found by comparison: carrying it through the reduction doubles its shuffles.
    if AXIS == 1:
        index = tl.min(tl.where(tile == best[:, None], key_index[None, :], 0x7FFFFFFF), axis=1)
    else:
        index = tl.min(tl.where(tile == best[None, :], key_index[:, None], 0x7FFFFFFF), axis=0)
    return best, index


@triton.jit
def _keep_better(best, winner, tile_best, tile_winner):
    """Fold a later tile into the running maximum: earlier wins ties, a NaN wins for good."""
    better = (tile_best > best) | (tile_best != tile_best)
    return tl.where(better, tile_best, best), tl.where(better, tile_winner, winner)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_one_direction_kernel(
    scores, winners,
    queries, query_starts, query_lengths, query_weights,
    keys, key_starts, key_lengths, key_weights,
    num_queries, num_keys, query_rows, score_query_stride, score_key_stride,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, SAVE_WINNERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[query item, key item] = sum over q of weight_q * max over k of <query q, key k>."""
    num_pairs = num_queries.to(tl.int64) * num_keys
    for pair in range(tl.program_id(0).to(tl.int64), num_pairs, tl.num_programs(0)):
        query_item, key_item = _pair(pair, num_queries, num_keys, GROUP)
        query_start = tl.load(query_starts + query_item)
        query_length = tl.load(query_lengths + query_item)
        key_start = tl.load(key_starts + key_item)
        key_length = tl.load(key_lengths + key_item)
        query_length = tl.where(key_length > 0, query_length, 0)  # no key: the score is 0
        score = 0.0
        for first_query in range(0, query_length, BLOCK_Q):
            q = first_query + tl.arange(0, BLOCK_Q)
            q_weight = tl.load(query_weights + query_start + q, mask=q < query_length, other=0.0)
            best = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
            winner = tl.zeros((BLOCK_Q,), dtype=tl.int32)
            for first_key in range(0, key_length, BLOCK_K):
                tile = _similarity_tile(
                    queries, query_start, first_query, query_length,
                    keys, key_start, first_key, key_length,
                    D, BLOCK_Q, BLOCK_K, BLOCK_D, PRECISION,
                )  # fmt: skip
                k = first_key + tl.arange(0, BLOCK_K)
                k_weight = tl.load(key_weights + key_start + k, mask=k < key_length, other=0.0)
                tile = tl.where((k_weight != 0.0)[None, :], tile, float("-inf"))
                tile_best, tile_winner = _best(tile, k, 1)
                best, winner = _keep_better(best, winner, tile_best, tile_winner)
            score += tl.sum(tl.where(q_weight != 0.0, best, 0.0) * q_weight)
            if SAVE_WINNERS:
                row = key_item * query_rows + query_start
                inside = tl.minimum(winner, key_length - 1).to(winners.dtype.element_ty)
                tl.store(winners + row + q, inside, mask=q < query_length)
        at = query_item * score_query_stride + key_item * score_key_stride
        tl.store(scores + at, score)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_both_directions_kernel(
    query_scores, key_scores, query_winners, key_winners, scratch_best, scratch_winner,
    queries, query_starts, query_lengths, query_weights,
    keys, key_starts, key_lengths, key_weights,
    num_queries, num_keys, query_rows, key_rows, scratch_rows,
    score_query_stride, score_key_stride,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, SAVE_WINNERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As above, and key_scores with the roles exchanged, from one pass over the similarities.

    The maximum along the keys runs in registers while the keys go by. The maximum along the
    queries is complete after one block when the text fits in it; else it waits between blocks in
    the program's own row of scratch, which never leaves L2.
    """
    scratch = tl.program_id(0).to(tl.int64) * scratch_rows
    num_pairs = num_queries.to(tl.int64) * num_keys
    for pair in range(tl.program_id(0).to(tl.int64), num_pairs, tl.num_programs(0)):
        query_item, key_item = _pair(pair, num_queries, num_keys, GROUP)
        query_start = tl.load(query_starts + query_item)
        query_length = tl.load(query_lengths + query_item)
        key_start = tl.load(key_starts + key_item)
        key_length = tl.load(key_lengths + key_item)
        query_length = tl.where(key_length > 0, query_length, 0)
        query_score = 0.0
        key_score = 0.0
        for first_query in range(0, query_length, BLOCK_Q):
            q = first_query + tl.arange(0, BLOCK_Q)
            q_weight = tl.load(query_weights + query_start + q, mask=q < query_length, other=0.0)
            best = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
            winner = tl.zeros((BLOCK_Q,), dtype=tl.int32)
            last_block = first_query + BLOCK_Q >= query_length
            for first_key in range(0, key_length, BLOCK_K):
                tile = _similarity_tile(
                    queries, query_start, first_query, query_length,
                    keys, key_start, first_key, key_length,
                    D, BLOCK_Q, BLOCK_K, BLOCK_D, PRECISION,
                )  # fmt: skip
                k = first_key + tl.arange(0, BLOCK_K)
                k_weight = tl.load(key_weights + key_start + k, mask=k < key_length, other=0.0)
                live = (q_weight != 0.0)[:, None] & (k_weight != 0.0)[None, :]
                tile = tl.where(live, tile, float("-inf"))

                tile_best, tile_winner = _best(tile, k, 1)
                best, winner = _keep_better(best, winner, tile_best, tile_winner)

                k_best, k_winner = _best(tile, q, 0)
                if query_length > BLOCK_Q:
                    if first_query > 0:
                        so_far = tl.load(scratch_best + scratch + k)
                        so_far_winner = tl.load(scratch_winner + scratch + k)
                        k_best, k_winner = _keep_better(so_far, so_far_winner, k_best, k_winner)
                    # Other threads may read and write an entry than those that hold it.
                    tl.debug_barrier()
                    tl.store(scratch_best + scratch + k, k_best)
                    tl.store(scratch_winner + scratch + k, k_winner)
                    tl.debug_barrier()
                if last_block:
                    key_score += tl.sum(tl.where(k_weight != 0.0, k_best, 0.0) * k_weight)
                    if SAVE_WINNERS:
                        row = query_item * key_rows + key_start
                        inside = tl.minimum(k_winner, query_length - 1)
                        inside = inside.to(key_winners.dtype.element_ty)
                        tl.store(key_winners + row + k, inside, mask=k < key_length)
            query_score += tl.sum(tl.where(q_weight != 0.0, best, 0.0) * q_weight)
            if SAVE_WINNERS:
                row = key_item * query_rows + query_start
                inside = tl.minimum(winner, key_length - 1).to(query_winners.dtype.element_ty)
                tl.store(query_winners + row + q, inside, mask=q < query_length)
        at = query_item * score_query_stride + key_item * score_key_stride
        tl.store(query_scores + at, query_score)
        tl.store(key_scores + at, key_score)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_gradient_kernel(
    own_grad, block_items, block_firsts, own_starts, own_lengths, own_weights,
    others, other_starts, other_lengths, other_items, other_weights,
    gather_winners, gather_grad, scatter_winners, scatter_grad,
    num_others, own_rows, other_rows, grad_own_stride, grad_other_stride,
    D: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one side's tokens: a block of one item's rows, a block of channels.

    GATHER adds what the side gets as queries, SCATTER what it gets as keys.
    """
    item = tl.load(block_items + tl.program_id(0)).to(tl.int64)
    if item < 0:
        return
    first = tl.load(block_firsts + tl.program_id(0))
    start = tl.load(own_starts + item)
    length = tl.load(own_lengths + item)
    own = first + tl.arange(0, BLOCK_OWN)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_inside = d < D
    gradient = tl.zeros((BLOCK_OWN, BLOCK_D), dtype=tl.float32)

    if GATHER:
        own_weight = tl.load(own_weights + start + own, mask=own < length, other=0.0)
        winner_ptrs = gather_winners + start + own
        grad_ptr = gather_grad + item * grad_own_stride
        for other in range(0, num_others):
            other_start = tl.load(other_starts + other)
            # An item without a valid token scores 0 and takes no part.
            alive = tl.where(own_weight != 0.0, tl.load(other_lengths + other), 0) > 0
            place = other_start + tl.load(winner_ptrs, mask=alive, other=0).to(tl.int32)
            won = tl.load(
                others + place[:, None] * D + d[None, :],
                mask=alive[:, None] & d_inside[None, :],
                other=0.0,
            )
            gradient += tl.load(grad_ptr) * won.to(tl.float32)
            winner_ptrs += own_rows
            grad_ptr += grad_other_stride
        gradient *= own_weight[:, None]

    if SCATTER:
        winner_row = scatter_winners + item * other_rows
        grad_row = scatter_grad + item * grad_own_stride
        for first_other in range(0, other_rows, BLOCK_OTHER):
            s = first_other + tl.arange(0, BLOCK_OTHER)
            inside = s < other_rows
            weight = tl.load(other_weights + s, mask=inside, other=0.0)
            live = weight != 0.0
            other_item = tl.load(other_items + s, mask=inside, other=0).to(tl.int64)
            g = tl.load(grad_row + other_item * grad_other_stride, mask=live, other=0.0)
            winner = tl.load(winner_row + s, mask=live, other=0).to(tl.int32)
            rows = tl.load(
                others + s[:, None].to(tl.int64) * D + d[None, :],
                mask=live[:, None] & d_inside[None, :],
                other=0.0,
            )
            share = tl.where(own[:, None] == winner[None, :], (g * weight)[None, :], 0.0)
            if others.dtype.element_ty == tl.bfloat16:
                gradient = _dot(share.to(tl.bfloat16), rows, gradient, PRECISION)
            else:
                # float16 would lose small shares to its exponent; TF32 holds all of its digits.
                gradient = _dot(share, rows.to(tl.float32), gradient, PRECISION)

    tl.store(
        own_grad + (start + own)[:, None] * D + d[None, :],
        gradient.to(own_grad.dtype.element_ty),
        mask=(own < length)[:, None] & d_inside[None, :],
    )


# ---------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """A tile: rows x rows x channels, and what works on it."""

    block_q: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int
    # ptxas aims at an occupancy, and spills a few bytes to reach it. Naming a limit above what the
    # kernel wants makes it stop.
    maxnreg: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.maxnreg)


# Under the interpreter small tiles are quick, and small inputs still make several blocks.
_TINY = Config(16, 16, 16, 4, 1)

# Texts are processed a few at a time against all images: see _pair.
_GROUP = 16


def _forward_config(dtype: torch.dtype, precision: str, both: bool, arch: int) -> Config:
    if INTERPRETED:
        return _TINY
    if dtype == torch.float32:
        # IEEE products run on the ordinary cores, where loads in flight would cost the registers.
        return Config(64, 64, 32, 8, 2 if precision == "tf32" else 1, maxnreg=255)
    if both and arch < 90:  # at 128 x 128 a column maximum beside the accumulators spills
        return Config(64, 128, 64, 8, 3)
    if both and arch >= 100:  # so it does here, where the tile has to come out of tensor memory
        return Config(128, 64, 64, 8, 3)
    return Config(128, 128, 64, 8, 3)


def _backward_config(dtype: torch.dtype, arch: int) -> Config:
    """block_q counts own rows, block_k other rows."""
    if INTERPRETED:
        return _TINY
    if dtype == torch.float32:
        return Config(32, 32, 32, 4, 2, maxnreg=168)
    if dtype == torch.float16:  # the product runs in TF32, with operands twice as wide
        return Config(64, 32, 64, 8, 2)
    return Config(64, 64, 128, 8, 2)


# ---------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------


def _arch(device: torch.device) -> int:
    """The compute capability times ten; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _programs(device: torch.device) -> int:
    """Enough programs to fill the device at any occupancy these tiles reach."""
    if device.type != "cuda":
        return 3
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _precision(dtype: torch.dtype) -> str:
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def forward(
    images: TokenRows,
    texts: TokenRows,
    direction: str,
    save_winners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `token_rows.new_outputs`, filled."""
    device, dim, dtype = images.rows.device, images.rows.shape[1], images.rows.dtype
    both = direction == "both"
    config = _forward_config(dtype, _precision(dtype), both, _arch(device))
    num_pairs = images.items * texts.items
    grid = (max(min(num_pairs, _programs(device)), 1),)

    outputs = new_outputs(images, texts, direction, save_winners)
    t2i, i2t, t2i_winners, i2t_winners = outputs
    if num_pairs == 0:
        return outputs

    shared = dict(
        D=dim, BLOCK_Q=config.block_q, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
        GROUP=_GROUP, SAVE_WINNERS=save_winners, PRECISION=_precision(dtype), **config.launch,
    )  # fmt: skip
    if both:
        # Whole blocks of keys, because the kernel stores them without a mask. None where every
        # text fits in one block; a bound on ragged lengths keeps this small.
        scratch_rows = triton.cdiv(max(images.longest, 1), config.block_k) * config.block_k
        scratch_rows *= texts.longest > config.block_q
        scratch_best = torch.empty(grid[0], scratch_rows, dtype=torch.float32, device=device)
        scratch_winner = torch.empty(grid[0], scratch_rows, dtype=torch.int32, device=device)
        maxsim_both_directions_kernel[grid](
            t2i, i2t, t2i_winners, i2t_winners, scratch_best, scratch_winner,
            texts.rows, texts.starts, texts.lengths, texts.row_weight,
            images.rows, images.starts, images.lengths, images.row_weight,
            texts.items, images.items, texts.total, images.total, scratch_rows,
            t2i.stride(1), t2i.stride(0), **shared,
        )  # fmt: skip
        return outputs
    queries, keys, scores, winners, query_axis = (
        (texts, images, t2i, t2i_winners, 1)
        if direction == "text_to_image"
        else (images, texts, i2t, i2t_winners, 0)
    )
    maxsim_one_direction_kernel[grid](
        scores, winners,
        queries.rows, queries.starts, queries.lengths, queries.row_weight,
        keys.rows, keys.starts, keys.lengths, keys.row_weight,
        queries.items, keys.items, queries.total,
        scores.stride(query_axis), scores.stride(1 - query_axis), **shared,
    )  # fmt: skip
    return outputs


def _side_gradient(
    own: TokenRows,
    other: TokenRows,
    gather: tuple[Tensor, Tensor] | None,
    scatter: tuple[Tensor, Tensor] | None,
    own_axis: int,
) -> Tensor:
    """d own.rows, from (winners, dL/dS) of the direction it queries in and the other one."""
    gradient = torch.zeros_like(own.rows)
    if gradient.numel() == 0 or other.total == 0:
        return gradient
    dtype, dim = own.rows.dtype, own.rows.shape[1]
    config = _backward_config(dtype, _arch(own.rows.device))
    block_items, block_firsts = own.blocks(config.block_q)
    present = gather or scatter
    assert present is not None
    gather_winners, gather_grad = gather or present
    scatter_winners, scatter_grad = scatter or present
    grid = (len(block_items), triton.cdiv(dim, config.block_d))
    maxsim_gradient_kernel[grid](
        gradient, block_items, block_firsts, own.starts, own.lengths, own.row_weight,
        other.rows, other.starts, other.lengths, other.row_item, other.row_weight,
        gather_winners, gather_grad, scatter_winners, scatter_grad,
        other.items, own.total, other.total,
        gather_grad.stride(own_axis), gather_grad.stride(1 - own_axis),
        D=dim, BLOCK_OWN=config.block_q, BLOCK_OTHER=config.block_k, BLOCK_D=config.block_d,
        GATHER=gather is not None, SCATTER=scatter is not None,
        PRECISION="tf32" if dtype == torch.float16 else _precision(dtype),
        **config.launch,
    )  # fmt: skip
    return gradient


def backward(
    images: TokenRows,
    texts: TokenRows,
    t2i: tuple[Tensor, Tensor] | None,
    i2t: tuple[Tensor, Tensor] | None,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both sides' rows from (winners, dL/dS (images, texts)) of each direction."""
    image_grad = _side_gradient(images, texts, i2t, t2i, own_axis=0) if need_image else None
    text_grad = _side_gradient(texts, images, t2i, i2t, own_axis=1) if need_text else None
    return image_grad, text_grad


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------

_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# What each parameter points at; a name that is not here is a size or a stride.
_POINTERS = {
    "*i64": "query_starts key_starts own_starts other_starts",
    "*i32": "query_lengths key_lengths own_lengths other_lengths block_items block_firsts "
    "other_items scratch_winner",
    "*fp32": "scores query_scores key_scores query_weights key_weights own_weights other_weights "
    "scratch_best gather_grad scatter_grad",
    "*u8": "winners query_winners key_winners gather_winners scatter_winners",
    "tokens": "queries keys others own_grad",
}


def _case(kernel, label: str, dtype: torch.dtype, config: Config, constexprs: dict) -> CompileCase:
    types = {name: kind for kind, names in _POINTERS.items() for name in names.split()}
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constexprs else types.get(name, "i32")
        signature[name] = f"*{_TYPE_NAMES[dtype]}" if kind == "tokens" else kind
    tf32 = dtype == torch.float32 and constexprs["PRECISION"] == "tf32"
    kind = "tf32" if tf32 else _TYPE_NAMES[dtype]
    products = constexprs.get("SCATTER", True)
    return CompileCase(
        name=kernel.__name__,
        label=f"{kind} {label} {config.block_q}x{config.block_k}x{config.block_d}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        uses_matrix_unit=products and (tf32 or dtype != torch.float32),
        aligned=frozenset(name for name, kind in signature.items() if kind.startswith("*")),
    )


def compile_cases(arch: int) -> list[CompileCase]:
    """Every configuration the launchers pick: at a width of CLIP's, and at one no tile divides."""
    cases = []
    for dtype in _TYPE_NAMES:
        forward = [(512, True, "ieee"), (512, False, "ieee"), (1000, True, "ieee")]
        precision = "tf32" if dtype == torch.float16 else "ieee"
        backward = [
            (512, True, False, precision),
            (512, False, True, precision),
            (512, True, True, precision),
            (1000, True, True, precision),
        ]
        if dtype == torch.float32:  # what torch.set_float32_matmul_precision("high") allows
            forward.append((512, True, "tf32"))
            backward.append((512, True, True, "tf32"))
        for dim, save, precision in forward:
            for both in (False, True):
                config = _forward_config(dtype, precision, both, arch)
                label = f"D={dim}" + " winners" * save
                kernel = maxsim_both_directions_kernel if both else maxsim_one_direction_kernel
                cases.append(_case(kernel, label, dtype, config, dict(
                    D=dim, BLOCK_Q=config.block_q, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
                    GROUP=_GROUP, SAVE_WINNERS=save, PRECISION=precision,
                )))  # fmt: skip
        for dim, gather, scatter, precision in backward:
            config = _backward_config(dtype, arch)
            label = f"D={dim}" + " gather" * gather + " scatter" * scatter
            cases.append(_case(maxsim_gradient_kernel, label, dtype, config, dict(
                D=dim, BLOCK_OWN=config.block_q, BLOCK_OTHER=config.block_k,
                BLOCK_D=config.block_d, GATHER=gather, SCATTER=scatter, PRECISION=precision,
            )))  # fmt: skip
    return cases

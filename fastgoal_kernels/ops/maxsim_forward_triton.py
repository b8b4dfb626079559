"""The MaxSim forward in Triton: a matrix product whose epilogue is a maximum.

Both sides' tokens stand in slots (see `slots`), so that tiles are full whatever the lengths are. A
program owns a few items of one side, the rows of its tiles, and a few of the other, the columns. It
multiplies tile after tile as any matrix product does and reduces the float32 result while it is
still in registers. What leaves the chip is one score a pair and, for the backward, the index of
each winner in one to four bytes.

Along a tile's columns the maximum is cheap, because a thread holds many columns of a row: granules
of 16 columns first, without a word to other threads, then the few granules of each item. Along its
rows it is dear: the threads of a warp hold a granule of 16 rows between them, and have to exchange
them first. The granules' maxima go to the program's own scratch, which never leaves L2, and are
reduced when all rows of the tile column are done.

    rows only      queries are rows, keys are columns
    both           images are rows, texts are columns
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from .compile_cases import CompileCase
from .slots import Slots, slots
from .tiles_triton import (
    Config,
    architecture,
    float32_precision,
    for_compiler,
    nan_max,
    of_architecture,
    product_tile,
    tile_case,
)
from .token_rows import TokenRows, new_outputs
from .tuning import choose_config, size_class

# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------

# Slots that are reduced together, along either side of a tile: what a warp's matrix instruction
# holds of it.
GRANULE = 16
_GRANULE = tl.constexpr(GRANULE)

# More than any offset within an item.
_NEVER = tl.constexpr(0x7FFFFFFF)

# Sizes change from batch to batch; specialising on them would recompile.
_UNSPECIALIZED = [
    "num_queries", "num_keys", "num_images", "num_texts", "query_rows", "image_rows", "text_rows",
    "queries_per_group", "keys_per_chunk", "images_per_group", "texts_per_chunk",
    "score_query_stride", "score_key_stride", "score_image_stride", "score_text_stride",
    "scratch_rows",
]  # fmt: skip


@triton.jit
def _first_of_two(a, b, a_place, b_place):
    """The larger, NaN if one is, and its place; a's if they are equal."""
    best = nan_max(a, b)
    return best, tl.where(a == best, a_place, b_place)


@triton.jit
def _column_granules(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Maxima of a tile's rows over the columns of each granule that one thread holds.

    A thread of a matrix instruction holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the 16, t = 0 to
    3: a tournament among these four needs no other thread. (BLOCK_M, granules, 4) maxima, and
    where in the granule each was reached first.
    """
    fours = tl.reshape(tile, (BLOCK_M, BLOCK_N // _GRANULE, 2, 4, 2))
    even, odd = tl.split(fours)
    best, place = _first_of_two(even, odd, 0, 1)
    low, high = tl.split(tl.permute(best, (0, 1, 3, 2)))
    low_place, high_place = tl.split(tl.permute(place, (0, 1, 3, 2)))
    best, place = _first_of_two(low, high, low_place, high_place + 8)
    return best, place + 2 * tl.arange(0, 4)[None, None, :]


@triton.jit
def _best_of_columns(best, place, first, last, BLOCK_N: tl.constexpr):
    """Maxima of rows over granules `first` to `last`, and the first column that reached each."""
    granule = tl.arange(0, BLOCK_N // _GRANULE)
    mine = (granule >= first) & (granule < last)
    best = tl.where(mine[None, :, None], best, float("-inf"))
    row_best = tl.reduce(tl.reduce(best, 1, nan_max), 1, nan_max)
    # Granules of other items reach the maximum only if it is -inf, and then this item's do as well:
    # asking for them again would cost a third of the instructions here.
    column = granule[None, :, None] * _GRANULE + place
    column = tl.where(best == row_best[:, None, None], column, _NEVER)
    column = tl.min(tl.min(column, axis=1), axis=1)
    return row_best, tl.maximum(column, first * _GRANULE)


@triton.jit
def _keep_better(best, winner, new_best, new_winner):
    """Fold a later maximum into the running one: earlier wins ties, a NaN wins for good."""
    better = (new_best > best) | (new_best != new_best)
    return tl.where(better, new_best, best), tl.where(better, new_winner, winner)


@triton.jit
def _token_index(
    winner, begin, end, item, slot_rows, starts, lengths, HOLES: tl.constexpr
):  # fmt: skip
    """Which of the item's tokens stands at a slot `winner` behind the item's first."""
    # Nothing is equal to a maximum that is NaN: then the winner is no slot, and any token will do.
    winner = tl.minimum(winner, end - begin - 1)
    if HOLES:
        return tl.load(slot_rows + begin + winner) - tl.load(starts + item).to(tl.int32)
    return tl.minimum(winner, tl.load(lengths + item) - 1)


@triton.jit
def _add_to_scores(scores, stride, share, item, first_item, last_item, item_slots, begin):
    """scores[item] += the sum of the item's shares in this tile, for all items in the tile.

    An item that began before this tile, at slot `begin`, has a sum from the tiles before.
    """
    for some in range(first_item, last_item + 1, 4):
        one = some + tl.arange(0, 4)
        total = tl.sum(tl.where(item[None, :] == one[:, None], share[None, :], 0.0), axis=1)
        inside = one <= last_item
        continued = inside & (tl.load(item_slots + one, mask=inside, other=begin) < begin)
        at = scores + one.to(tl.int64) * stride
        tl.store(at, tl.load(at, mask=continued, other=0.0) + total, mask=inside)


@triton.jit
def _reduce_columns(
    tile, best, winner, key, begin, n, tile_end,
    row, row_item, weight, first_item, last_item, row_item_slots, m,
    scores, score_row_stride, score_key_stride, winners, winner_stride,
    key_item_slots, key_slot_rows, key_starts, key_lengths,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOLES: tl.constexpr, SAVE_WINNERS: tl.constexpr,
):  # fmt: skip
    """Maxima of a tile's rows over each item of its columns; scores of the items that end in it.

    best and winner are those of item `key`, from slot `begin`, so far. Returns (best, winner, key,
    begin) of the item that goes on in the next tile.
    """
    granule_best, granule_place = _column_granules(tile, BLOCK_M, BLOCK_N)
    more = begin < tile_end
    while more:
        end = tl.load(key_item_slots + key + 1)
        tile_best, column = _best_of_columns(
            granule_best, granule_place,
            (tl.maximum(begin, n) - n) // _GRANULE,
            (tl.minimum(end, tile_end) - n) // _GRANULE, BLOCK_N,
        )  # fmt: skip
        best, winner = _keep_better(best, winner, tile_best, n - begin + column)
        complete = end <= tile_end
        if complete & (end > begin):
            live = weight != 0.0
            if SAVE_WINNERS:
                token = _token_index(
                    winner, begin, end, key, key_slot_rows, key_starts, key_lengths, HOLES
                )
                tl.store(
                    winners + key * winner_stride + row,
                    token.to(winners.dtype.element_ty), mask=live,
                )  # fmt: skip
            _add_to_scores(
                scores + key * score_key_stride, score_row_stride,
                tl.where(live, best, 0.0) * weight, row_item,
                first_item, last_item, row_item_slots, m,
            )  # fmt: skip
        best = tl.where(complete, float("-inf"), best)
        winner = tl.where(complete, 0, winner)
        begin = tl.where(complete, end, begin)
        key += complete.to(tl.int64)
        more = complete & (begin < tile_end)
    return best, winner, key, begin


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_rows_kernel(
    scores, winners,
    queries, query_slot_rows, query_slot_items, query_slot_weights, query_item_slots,
    keys, key_slot_rows, key_item_slots, key_starts, key_lengths,
    num_queries, num_keys, query_rows, queries_per_group, keys_per_chunk,
    score_query_stride, score_key_stride,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HOLES: tl.constexpr, SAVE_WINNERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[query item, key item] = sum over q of weight_q * max over k of <query q, key k>."""
    num_groups = tl.cdiv(num_queries, queries_per_group)
    num_units = num_groups * tl.cdiv(num_keys, keys_per_chunk)
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        # Programs that run at the same time read the same keys.
        first_query = unit % num_groups * queries_per_group
        first_key = unit // num_groups * keys_per_chunk
        m_begin = tl.load(query_item_slots + first_query)
        m_end = tl.load(query_item_slots + tl.minimum(first_query + queries_per_group, num_queries))
        n_begin = tl.load(key_item_slots + first_key)
        n_end = tl.load(key_item_slots + tl.minimum(first_key + keys_per_chunk, num_keys))
        for m in range(m_begin, m_end, BLOCK_M):
            slot = m + tl.arange(0, BLOCK_M)
            inside = slot < m_end
            slot = tl.minimum(slot, m_end - 1)
            q_row = tl.load(query_slot_rows + slot)
            q_item = tl.load(query_slot_items + slot)
            q_weight = tl.where(inside, tl.load(query_slot_weights + slot), 0.0)
            q_first = tl.load(query_slot_items + m)
            q_last = tl.load(query_slot_items + tl.minimum(m + BLOCK_M, m_end) - 1)
            tl.debug_barrier()  # scores that the tiles before began are in sight of all threads

            key = first_key.to(tl.int64)
            begin = n_begin  # of this key's slots
            best = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            winner = tl.zeros((BLOCK_M,), dtype=tl.int32)
            for n in range(n_begin, n_end, BLOCK_N):
                k_row = tl.load(key_slot_rows + tl.minimum(n + tl.arange(0, BLOCK_N), n_end - 1))
                tile = product_tile(
                    queries, q_row, keys, k_row, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
                )
                best, winner, key, begin = _reduce_columns(
                    tile, best, winner, key, begin, n, tl.minimum(n + BLOCK_N, n_end),
                    q_row, q_item, q_weight, q_first, q_last, query_item_slots, m,
                    scores, score_query_stride, score_key_stride, winners, query_rows,
                    key_item_slots, key_slot_rows, key_starts, key_lengths,
                    BLOCK_M, BLOCK_N, HOLES, SAVE_WINNERS,
                )  # fmt: skip


@triton.jit
def _halve_rows(best, place, GRANULES: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """One round among the ROWS rows left of each granule: neighbours, the upper one a half on."""
    pairs = tl.reshape(best, (GRANULES, ROWS // 2, 2, BLOCK_N))
    upper, lower = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    pairs = tl.reshape(place, (GRANULES, ROWS // 2, 2, BLOCK_N))
    upper_place, lower_place = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return _first_of_two(upper, lower, upper_place, lower_place + _GRANULE // ROWS)


@triton.jit
def _row_granules(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Maxima of a tile's columns over the rows of each granule, and the first row that reached it.

    The threads of a warp hold the 16 rows between them. A reduction would pass each column's
    maximum, then its place, from thread to thread three times. Splitting neighbours apart makes
    the compiler hand the tile over once, through shared memory, so that a thread holds all rows
    of its columns; a tournament among them needs no other thread. Neighbours first: so one side's
    rows all come before the other's, and the first of two equals is the lower.
    (granules, BLOCK_N) maxima and rows within the granule.
    """
    GRANULES: tl.constexpr = BLOCK_M // _GRANULE
    pairs = tl.reshape(tile, (GRANULES, 8, 2, BLOCK_N))
    upper, lower = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    best, place = _first_of_two(upper, lower, 0, 1)
    best, place = _halve_rows(best, place, GRANULES, 8, BLOCK_N)
    best, place = _halve_rows(best, place, GRANULES, 4, BLOCK_N)
    best, place = _halve_rows(best, place, GRANULES, 2, BLOCK_N)
    return tl.reshape(best, (GRANULES, BLOCK_N)), tl.reshape(place, (GRANULES, BLOCK_N))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def maxsim_both_kernel(
    row_scores, column_scores, row_winners, column_winners,
    scratch_best, scratch_winner, scratch_granule_best, scratch_granule_place,
    images, image_slot_rows, image_slot_items, image_slot_weights, image_item_slots,
    image_starts, image_lengths,
    texts, text_slot_rows, text_slot_items, text_slot_weights, text_item_slots,
    text_starts, text_lengths,
    num_images, num_texts, image_rows, text_rows, images_per_group, texts_per_chunk,
    score_image_stride, score_text_stride, scratch_rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IMAGE_HOLES: tl.constexpr, TEXT_HOLES: tl.constexpr,
    SAVE_WINNERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """image_to_text (of rows) and text_to_image (of columns) from one pass over the similarities.

    A unit's tiles go down one column of tiles after the other. The running maxima of the rows,
    whose text may go on in the next column, and the granule maxima of the tile column wait in the
    program's scratch.
    """
    pid = tl.program_id(0).to(tl.int64)
    row_best = scratch_best + pid * scratch_rows
    row_winner = scratch_winner + pid * scratch_rows
    granule_best = scratch_granule_best + pid * (scratch_rows // _GRANULE) * BLOCK_N
    granule_place = scratch_granule_place + pid * (scratch_rows // _GRANULE) * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    granule = tl.arange(0, BLOCK_M // _GRANULE)

    num_groups = tl.cdiv(num_images, images_per_group)
    num_units = num_groups * tl.cdiv(num_texts, texts_per_chunk)
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        first_image = unit % num_groups * images_per_group
        last_image = tl.minimum(first_image + images_per_group, num_images)
        first_text = unit // num_groups * texts_per_chunk
        m_begin = tl.load(image_item_slots + first_image)
        m_end = tl.load(image_item_slots + last_image)
        n_begin = tl.load(text_item_slots + first_text)
        n_end = tl.load(text_item_slots + tl.minimum(first_text + texts_per_chunk, num_texts))

        column_text = first_text.to(tl.int64)  # the text that is open where the tile column begins
        column_begin = n_begin  # of its slots
        # Without a region there is nothing to compare with.
        for n in range(n_begin, tl.where(m_end > m_begin, n_end, n_begin), BLOCK_N):
            tile_end = tl.minimum(n + BLOCK_N, n_end)
            t_slot = tl.minimum(n + column, n_end - 1)
            t_row = tl.load(text_slot_rows + t_slot)
            text = column_text
            begin = column_begin
            for m in range(m_begin, m_end, BLOCK_M):
                slot = m + tl.arange(0, BLOCK_M)
                inside = slot < m_end
                v_row = tl.load(image_slot_rows + tl.minimum(slot, m_end - 1))
                tile = product_tile(
                    images, v_row, texts, t_row, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
                )

                some_best, some_place = _row_granules(tile, BLOCK_M, BLOCK_N)
                at = ((m - m_begin) // _GRANULE + granule)[:, None] * BLOCK_N + column[None, :]
                tl.store(granule_best + at, some_best)
                tl.store(granule_place + at, some_place.to(tl.int8))

                slot = tl.minimum(slot, m_end - 1)
                v_row = tl.load(image_slot_rows + slot)
                v_item = tl.load(image_slot_items + slot)
                v_weight = tl.where(inside, tl.load(image_slot_weights + slot), 0.0)
                v_first = tl.load(image_slot_items + m)
                v_last = tl.load(image_slot_items + tl.minimum(m + BLOCK_M, m_end) - 1)
                text = column_text
                begin = column_begin
                waiting = row_best + (m - m_begin) + tl.arange(0, BLOCK_M)
                waiting_winner = row_winner + (m - m_begin) + tl.arange(0, BLOCK_M)
                tl.debug_barrier()  # what the tile column before left is in sight of all threads
                # Only a text that began before this tile column has left something.
                left = m + tl.arange(0, BLOCK_M) < tl.where(begin < n, m_end, m)
                best = tl.load(waiting, mask=left, other=float("-inf"))
                winner = tl.load(waiting_winner, mask=left, other=0)
                best, winner, text, begin = _reduce_columns(
                    tile, best, winner, text, begin, n, tile_end,
                    v_row, v_item, v_weight, v_first, v_last, image_item_slots, m,
                    row_scores, score_image_stride, score_text_stride, row_winners, image_rows,
                    text_item_slots, text_slot_rows, text_starts, text_lengths,
                    BLOCK_M, BLOCK_N, TEXT_HOLES, SAVE_WINNERS,
                )  # fmt: skip
                tl.store(waiting, best, mask=inside)
                tl.store(waiting_winner, winner, mask=inside)
            column_text = text
            column_begin = begin

            tl.debug_barrier()  # all granules of the tile column are in sight
            t_live_slot = n + column < n_end
            t_item = tl.load(text_slot_items + t_slot)
            t_weight = tl.where(t_live_slot, tl.load(text_slot_weights + t_slot), 0.0)
            t_first = tl.load(text_slot_items + n)
            t_last = tl.load(text_slot_items + tile_end - 1)
            for image in range(first_image.to(tl.int64), last_image.to(tl.int64)):
                begin_v = tl.load(image_item_slots + image)
                end_v = tl.load(image_item_slots + image + 1)
                if end_v > begin_v:
                    # Along its granules a column's maximum needs no other thread. Which granule it
                    # was is carried along, and its place there looked up once.
                    first = (begin_v - m_begin) // _GRANULE
                    last = (end_v - m_begin) // _GRANULE - 1
                    best_v = tl.load(granule_best + first * BLOCK_N + column)
                    which_v = tl.zeros((BLOCK_N,), dtype=tl.int32) + first
                    for some in range(first + 1, last + 1, 16):
                        for next_one in tl.static_range(16):
                            one = tl.minimum(some + next_one, last)
                            one_best = tl.load(granule_best + one * BLOCK_N + column)
                            best_v, which_v = _first_of_two(best_v, one_best, which_v, one)
                    place_v = tl.load(granule_place + which_v * BLOCK_N + column).to(tl.int32)
                    winner_v = (which_v - first) * _GRANULE + place_v
                    live_t = t_weight != 0.0
                    if SAVE_WINNERS:
                        token = _token_index(
                            winner_v, begin_v, end_v, image,
                            image_slot_rows, image_starts, image_lengths, IMAGE_HOLES,
                        )  # fmt: skip
                        tl.store(
                            column_winners + image * text_rows + t_row,
                            token.to(column_winners.dtype.element_ty), mask=live_t,
                        )  # fmt: skip
                    _add_to_scores(
                        column_scores + image * score_image_stride, score_text_stride,
                        tl.where(live_t, best_v, 0.0) * t_weight, t_item,
                        t_first, t_last, text_item_slots, n,
                    )  # fmt: skip
            tl.debug_barrier()  # the next tile column overwrites the granules


# ---------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------

# Under the interpreter small tiles are quick, and small inputs still make several tiles and
# several granules in each.
_TINY = Config(32, 32, 16, 4, 1)


# Tiles by architecture and kernel, the default first; the others are for FASTGOAL_AUTOTUNE. The
# maximum along both sides leaves no registers for a wide tile, and before sm_90 the matrix
# instruction takes its factors from registers too. sm_86 and sm_89 have 99 KB of shared memory a
# block, sm_80 163, sm_90 and sm_100 227.
_TABLES = {
    80: {
        "rows": [Config(128, 128, 64, 8, 3), Config(64, 128, 64, 4, 3), Config(64, 256, 64, 8, 3)],
        "both": [Config(128, 128, 64, 8, 3), Config(64, 128, 64, 8, 3)],
    },
    86: {
        "rows": [Config(128, 128, 64, 8, 2), Config(64, 128, 64, 4, 2), Config(128, 128, 32, 8, 3)],
        "both": [Config(128, 128, 64, 8, 2), Config(64, 128, 64, 8, 2)],
    },
    90: {
        "rows": [
            Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 4), Config(64, 256, 64, 8, 3),
            Config(64, 256, 64, 4, 2), Config(64, 256, 32, 4, 5),
            Config(128, 128, 64, 8, 2, maxnreg=128), Config(64, 128, 64, 4, 4),
        ],
        "both": [
            Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 4),
            Config(128, 64, 64, 8, 3, maxnreg=128), Config(64, 128, 64, 4, 3),
        ],
    },
    100: {
        "rows": [Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 3, maxnreg=255)],
        "both": [Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)],
    },
}  # fmt: skip
_TABLES = {
    arch: {sides: for_compiler(tiles) for sides, tiles in table.items()}
    for arch, table in _TABLES.items()
}


def tiles(dtype: torch.dtype, precision: str, both: bool, arch: int) -> list[Config]:
    """The tiles that suit, the default first."""
    if INTERPRETED:
        return [_TINY]
    if dtype == torch.float32:
        # IEEE products run on the ordinary cores, where loads in flight would cost the registers.
        return [Config(64, 64, 32, 8, 2 if precision == "tf32" else 1, maxnreg=255)]
    return of_architecture(_TABLES, arch)["both" if both else "rows"]


# ---------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------

# Slots that a unit's tiles are cut from, along either side. More of them fill its last tile better;
# where both sides are reduced, each slot of the rows costs every program 48 bytes of scratch.
_MOST_SLOTS = 4096
_MOST_SLOTS_WITH_SCRATCH = 2048


@lru_cache(maxsize=256)
def _items_per_unit(
    row_size: int, most_rows: int, block_m: int,
    column_size: int, most_columns: int, block_n: int, most_pairs: int,
) -> tuple[int, int]:  # fmt: skip
    """How many items a unit takes of either side: at most most_pairs pairs that fill their tiles.

    Sizes are slots an item. Of counts that fill their tiles about equally well the larger: fewer
    units load their rows less often.
    """

    def fill(size: int, block: int) -> float:
        return size / (-(-size // block) * block)

    def useful(counts: tuple[int, int]) -> tuple[float, int]:
        rows, columns = counts
        filled = fill(rows * row_size, block_m) * fill(columns * column_size, block_n)
        return round(filled, 2), rows * columns

    return max(
        (
            (rows, columns)
            for rows in range(1, min(most_rows, most_pairs) + 1)
            for columns in range(1, min(most_columns, most_pairs // rows) + 1)
        ),
        key=useful,
    )


def items_per_unit(
    rows: TokenRows, columns: TokenRows, both: bool, block_m: int, block_n: int, programs: int
) -> tuple[int, int]:
    """How many items of the rows and of the columns a unit takes."""

    def size(side: TokenRows, granule: int) -> int:
        # The mean of packed items is known, of masked ones only the longest.
        padded = side.total == side.items * side.longest
        tokens = side.longest if padded else -(-side.total // side.items)
        return -(-max(tokens, 1) // granule) * granule

    row_size, column_size = size(rows, GRANULE if both else 1), size(columns, GRANULE)
    most_rows = _MOST_SLOTS_WITH_SCRATCH if both else _MOST_SLOTS
    return _items_per_unit(
        row_size, max(1, min(rows.items, most_rows // row_size)), block_m,
        column_size, max(1, min(columns.items, _MOST_SLOTS // column_size)), block_n,
        # Units enough for every program to have several, so that all finish at about one time.
        max(1, rows.items * columns.items // (8 * programs)),
    )  # fmt: skip


def _programs(device: torch.device) -> int:
    """Enough programs to fill the device at the occupancy that these tiles reach."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    images: TokenRows,
    texts: TokenRows,
    direction: str,
    save_winners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `token_rows.new_outputs`, filled."""
    outputs = new_outputs(images, texts, direction, save_winners)
    if 0 in (images.items, texts.items, images.total, texts.total):
        return outputs
    both, dtype, device = direction == "both", images.rows.dtype, images.rows.device
    precision = float32_precision(dtype)
    rows, columns = (texts, images) if direction == "text_to_image" else (images, texts)
    # The rows of one direction are reduced one by one, and need no granules.
    row_granule = GRANULE if both else 1
    row_slots, column_slots = slots(rows, row_granule), slots(columns, GRANULE)

    def launch(config: Config) -> None:
        programs = _programs(device)
        rows_per_unit, columns_per_unit = items_per_unit(
            rows, columns, both, config.block_m, config.block_n, programs
        )
        units = triton.cdiv(rows.items, rows_per_unit)
        units *= triton.cdiv(columns.items, columns_per_unit)
        grid = (min(units, programs),)
        constexprs = dict(
            D=rows.rows.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=config.block_d, SAVE_WINNERS=save_winners, PRECISION=precision,
        )  # fmt: skip
        if both:
            _launch_both(
                grid, config, outputs, rows, row_slots, rows_per_unit,
                columns, column_slots, columns_per_unit, constexprs,
            )  # fmt: skip
            return
        scores, winners = outputs[0::2] if direction == "text_to_image" else outputs[1::2]
        row_axis = 1 if direction == "text_to_image" else 0
        maxsim_rows_kernel[grid](
            scores, winners,
            rows.rows, *row_slots,
            columns.rows, column_slots.row, column_slots.item_slots, columns.starts,
            columns.lengths,
            rows.items, columns.items, rows.total, rows_per_unit, columns_per_unit,
            scores.stride(row_axis), scores.stride(1 - row_axis),
            HOLES=columns.has_holes, **constexprs, **config.launch,
        )  # fmt: skip

    kind = (
        dtype, precision, rows.rows.shape[1], save_winners, size_class(rows.longest),
        size_class(columns.longest), size_class(rows.items), size_class(columns.items),
    )  # fmt: skip
    table = tiles(dtype, precision, both, architecture(device))
    launch(choose_config("both" if both else "rows", kind, table, launch, device))
    return outputs


def _launch_both(
    grid: tuple[int],
    config: Config,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    images: TokenRows,
    image_slots: Slots,
    images_per_unit: int,
    texts: TokenRows,
    text_slots: Slots,
    texts_per_unit: int,
    constexprs: dict,
) -> None:
    t2i, i2t, t2i_winners, i2t_winners = outputs
    device = images.rows.device
    longest_unit = min(images_per_unit * (images.longest + GRANULE - 1), len(image_slots.row))
    scratch_rows = triton.cdiv(longest_unit, config.block_m) * config.block_m
    scratch = grid[0], scratch_rows
    granules = grid[0], scratch_rows // GRANULE, config.block_n
    maxsim_both_kernel[grid](
        i2t, t2i, i2t_winners, t2i_winners,
        torch.empty(scratch, dtype=torch.float32, device=device),
        torch.empty(scratch, dtype=torch.int32, device=device),
        torch.empty(granules, dtype=torch.float32, device=device),
        torch.empty(granules, dtype=torch.int8, device=device),
        images.rows, *image_slots, images.starts, images.lengths,
        texts.rows, *text_slots, texts.starts, texts.lengths,
        images.items, texts.items, images.total, texts.total, images_per_unit, texts_per_unit,
        i2t.stride(0), i2t.stride(1), scratch_rows,
        IMAGE_HOLES=images.has_holes, TEXT_HOLES=texts.has_holes, **constexprs, **config.launch,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What gets compiled
# ---------------------------------------------------------------------------------------------


def _pointer_type(name: str) -> str | None:
    """What a kernel's parameter points at; None = it is a size or a stride."""
    if name in ("queries", "keys", "images", "texts"):
        return "tokens"
    if name == "scratch_granule_place":
        return "*i8"
    if name == "scratch_winner" or name.endswith(("slot_rows", "slot_items", "lengths")):
        return "*i32"
    if name.endswith("item_slots"):
        return "*i32"
    if name.endswith("starts"):
        return "*i64"
    if name.endswith("winners"):
        return "*u8"
    if name.endswith(("scores", "weights", "best")):
        return "*fp32"
    return None


def compile_cases(arch: int) -> list[CompileCase]:
    """Every tile of the tables; the defaults at more widths, one of which no tile divides."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        default = [(512, True, False, "ieee"), (1000, True, True, "ieee")]
        if dtype == torch.bfloat16:
            default += [(768, True, False, "ieee"), (512, False, False, "ieee")]
        if dtype == torch.float32:  # what torch.set_float32_matmul_precision("high") allows
            default.append((512, True, False, "tf32"))
        for both in (False, True):
            wanted = [(tiles(dtype, row[3], both, arch)[0], *row) for row in default]
            if dtype == torch.bfloat16:
                others = tiles(dtype, "ieee", both, arch)[1:]
                wanted += [(config, 512, True, False, "ieee") for config in others]
            for config, dim, save, holes, precision in wanted:
                constexprs: dict[str, object] = dict(
                    D=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                    BLOCK_D=config.block_d, SAVE_WINNERS=save, PRECISION=precision,
                )  # fmt: skip
                if both:
                    constexprs.update(IMAGE_HOLES=holes, TEXT_HOLES=holes)
                else:
                    constexprs.update(HOLES=holes)
                label = f"D={dim}" + " winners" * save + " masked" * holes
                kernel = maxsim_both_kernel if both else maxsim_rows_kernel
                cases.append(tile_case(kernel, label, dtype, config, constexprs, _pointer_type))
    return cases

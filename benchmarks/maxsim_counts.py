"""Count what MaxSim costs before it is measured: the tables of docs/kernels/maxsim.md.

    python -m benchmarks.maxsim_counts [--captions FOLDER] [--page docs/kernels/maxsim.md]

Operations, bytes and the floors they set; how much of the multiplied tiles is useful, pair by pair
and packed into slots; what the instruction counts of the compiled kernels predict; and the lengths
of real captions (JSON files, a list of rows with a "caption" each). Prints the tables, or writes
them between the page's markers. Nothing here is a measurement of this repository's kernels.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import product
from pathlib import Path
from statistics import fmean, quantiles
from typing import NamedTuple

import torch

from fastgoal_kernels.ops import maxsim_forward_triton as launcher
from fastgoal_kernels.ops.maxsim_forward_triton import GRANULE
from fastgoal_kernels.ops.token_rows import TokenRows, token_rows, winner_dtype

from .workloads import Workload, make_inputs

# ---------------------------------------------------------------------------------------------
# Rates
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a GPU does a second."""

    name: str
    flop: float  # dense bf16, on the matrix units
    bytes: float  # of main memory
    vector_flop: float  # float32, on the ordinary cores


# Measured on an H200: a large dense bf16 product, and a copy. Not by this repository's sweep, and
# the ordinary cores' rate is the datasheet's.
H200 = Rates("H200", 790e12, 4.3e12, 67e12)
# NVIDIA's A100 datasheet (80 GB): leads, which no program reaches.
A100 = Rates("A100", 312e12, 2.0e12, 19.5e12)

# H200 and H100 SXM datasheets: dense bf16. The measured rate is taken to be this share of every
# matrix instruction's time; were it a lower clock instead, predicted shares would be lower.
H200_PEAK = 989.4e12
H200_SMS = 132
# A multiprocessor's dense bf16 FLOP a cycle, which with 132 of them at 1.83 GHz makes H200_PEAK.
FLOP_A_CYCLE = 4096
SCHEDULERS = 4  # a multiprocessor

# From L2 to all multiprocessors: a published lead for Hopper, no datasheet's figure and not ours.
L2_BYTES = 5.5e12

# bf16 tokens and gradients, float32 scores and their gradients.
TOKEN_BYTES, SCORE_BYTES = 2, 4

# ---------------------------------------------------------------------------------------------
# Operations and bytes
# ---------------------------------------------------------------------------------------------

BATCH = 1024
TEXT_TOKENS, IMAGE_TOKENS, DIMS = (77, 248), (196, 256, 576), (512, 768)


@dataclass(frozen=True)
class Size:
    """One call: BATCH images meet as many texts, unless said otherwise."""

    text_tokens: int
    image_tokens: int
    dim: int
    both: bool = False
    images: int = BATCH
    texts: int = BATCH

    @property
    def pairs(self) -> int:
        return self.images * self.texts

    @property
    def query_rows(self) -> int:
        """Tokens that search for a best match, of one pair."""
        return self.text_tokens + self.image_tokens * self.both

    @property
    def forward_flop(self) -> int:
        """The products, once, whatever the directions."""
        return 2 * self.pairs * self.text_tokens * self.image_tokens * self.dim

    @property
    def input_bytes(self) -> int:
        rows = self.images * self.image_tokens + self.texts * self.text_tokens
        return rows * self.dim * TOKEN_BYTES

    @property
    def score_bytes(self) -> int:
        return self.pairs * SCORE_BYTES * (1 + self.both)

    @property
    def winner_bytes(self) -> int:
        """Kept for the backward: which region won each word, and with both, which word a region."""
        of_text = self.text_tokens * winner_dtype(self.image_tokens).itemsize
        of_image = self.image_tokens * winner_dtype(self.text_tokens).itemsize
        return self.pairs * (of_text + of_image * self.both)

    @property
    def forward_bytes(self) -> int:
        """Every input read once, every output written once."""
        return self.input_bytes + self.score_bytes + self.winner_bytes

    @property
    def backward_flop(self) -> int:
        """A multiply-add a channel, for the query's gradient and for its winner's."""
        return 2 * 2 * self.pairs * self.query_rows * self.dim

    @property
    def backward_bytes(self) -> int:
        """Inputs, winners and gradients of the scores read once, gradients written once."""
        return 2 * self.input_bytes + self.score_bytes + self.winner_bytes

    @property
    def gathered_bytes(self) -> int:
        """Rows that the backward reads, one a multiply-add of `dim` channels, wherever they lie."""
        return 2 * self.pairs * self.query_rows * self.dim * TOKEN_BYTES


def sizes() -> list[Size]:
    """The benchmark sizes, one direction, at the smaller width."""
    return [Size(t, r, DIMS[0]) for t, r in product(TEXT_TOKENS, IMAGE_TOKENS)]


# ---------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------


def covered(length: int, widths: Sequence[int]) -> int:
    """The fewest slots that tiles of these widths need to hold `length` rows."""
    best = [0]  # best[n]: slots for n rows
    for n in range(1, length + 1):
        best.append(min(width + best[max(n - width, 0)] for width in widths))
    return best[length]


# Widths along the texts and along the images of a tile that holds rows of one pair only. A wgmma
# instruction is 64 rows by a multiple of 8 columns, up to 256; the last two lines are all that its
# own granularity allows.
_ANY_N = tuple(range(8, 257, 8))
PAIR_WISE: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "128 × 128": ((128,), (128,)),
    "128 × 256": ((128,), (256,)),
    "64 and 16 × 64 and 16": ((64, 16), (64, 16)),
    "wgmma, texts its 64 rows": ((64,), _ANY_N),
    "wgmma, images its 64 rows": (_ANY_N, (64,)),
}


def pair_wise_share(text_tokens: float, texts_covered: float, regions: int, covered: int) -> float:
    return text_tokens * regions / (texts_covered * covered)


class Issue(NamedTuple):
    """Cycles in which one warp keeps its scheduler's arithmetic, and its way to memory, busy.

    Each instruction counts by the lanes a cycle of the CUDA C++ Programming Guide's throughput
    table for 9.0, as a share of 128. Arithmetic: 1 for float add and fma and for whatever is
    uniform or control, 2 for comparisons, minima and maxima, selects and integers (64 lanes).
    Memory: 4 for a shuffle (32 lanes), and for a load or store of 32 bits a thread.
    """

    arithmetic: float
    memory: float

    def times(self, count: float) -> Issue:
        return Issue(self.arithmetic * count, self.memory * count)

    @property
    def together(self) -> float:
        """Nothing overlapping."""
        return self.arithmetic + self.memory


_NOTHING = Issue(0, 0)


@dataclass(frozen=True)
class Kernel:
    """A packed kernel: its tile, and what a warp issues in its epilogue.

    Read block by block from the sm_90 disassembly of version 3 (Triton 3.9, bf16, D 512,
    winners kept).
    """

    name: str
    block_m: int
    block_n: int
    row_granule: int
    tile: Issue  # once a tile: its granules, and what it stores of them
    segment: Issue  # once for every item that has columns in a tile
    complete: Issue  # once an item and tile of rows: its winners and its share of the scores
    row_item: Issue = _NOTHING  # once an item of rows and tile column: its granules from scratch
    tile_column: Issue = _NOTHING  # once a tile column
    warps: int = 8


ROWS = Kernel(
    "one direction", 128, 256, 1,
    tile=Issue(586, 12), segment=Issue(415, 36), complete=Issue(122, 128),
)  # fmt: skip
BOTH = Kernel(
    "both", 128, 128, GRANULE,
    tile=Issue(819, 620), segment=Issue(247, 36), complete=Issue(121, 128),
    row_item=Issue(409, 180), tile_column=Issue(176, 100),
)  # fmt: skip
# The loads of a tile's first stages before its first product, in cycles: an assumption.
PIPELINE_FILL = 700
# Registers allow one block of either kernel a multiprocessor; the launcher starts two for each.
BLOCKS_STARTED = 2 * H200_SMS


class Side(NamedTuple):
    """One side's line of slots, as the launcher cuts it into units."""

    slots: list[int]  # of each item, granules filled up
    tokens: int
    items_per_unit: int
    block: int

    @property
    def units(self) -> list[list[int]]:
        starts = range(0, len(self.slots), self.items_per_unit)
        return [self.slots[start : start + self.items_per_unit] for start in starts]

    @property
    def unit_tiles(self) -> list[int]:
        return [-(-sum(unit) // self.block) for unit in self.units]

    @property
    def multiplied(self) -> int:
        """Slots of all tiles, empty ones too."""
        return sum(self.unit_tiles) * self.block

    @property
    def segments(self) -> int:
        """Over all tiles, the items that have a slot in it."""
        found = 0
        for unit in self.units:
            begin = 0
            for slots in unit:
                if slots:
                    found += (begin + slots - 1) // self.block - begin // self.block + 1
                begin += slots
        return found

    @property
    def live_items(self) -> int:
        return sum(slots > 0 for slots in self.slots)


class Plan(NamedTuple):
    """All tiles of one forward."""

    kernel: Kernel
    rows: Side
    columns: Side

    @property
    def useful(self) -> float:
        """The share of the multiplied elements that are a word and a region."""
        useful = self.rows.tokens * self.columns.tokens
        return useful / (self.rows.multiplied * self.columns.multiplied)

    @property
    def tiles(self) -> int:
        return sum(self.rows.unit_tiles) * sum(self.columns.unit_tiles)

    @property
    def balance(self) -> float:
        """Work of all multiprocessors over that of the one which works longest.

        Program p takes the units p, p + programs, …; a multiprocessor that is done with a program
        takes the next.
        """
        costs = [m * n for n in self.columns.unit_tiles for m in self.rows.unit_tiles]
        programs = min(len(costs), BLOCKS_STARTED)
        ends = [0] * H200_SMS  # a heap: the first is done first
        for program in range(programs):
            heapreplace(ends, ends[0] + sum(costs[program::programs]))
        return sum(costs) / H200_SMS / max(ends)

    def epilogue(self, overlapping: bool = False) -> float:
        """Cycles a tile that the warps of one scheduler need to issue.

        overlapping: while one warp's arithmetic runs, another's shuffles and stores do.
        """
        kernel, column_tiles = self.kernel, sum(self.columns.unit_tiles)
        row_tiles = sum(self.rows.unit_tiles)
        parts = (
            kernel.tile,
            kernel.segment.times(self.columns.segments / column_tiles),
            kernel.complete.times(self.columns.live_items / column_tiles),
            kernel.row_item.times(self.rows.live_items / row_tiles),
            kernel.tile_column.times(len(self.rows.units) / row_tiles),
        )
        issued = Issue(sum(part.arithmetic for part in parts), sum(part.memory for part in parts))
        return (max(issued) if overlapping else issued.together) * kernel.warps / SCHEDULERS

    def product(self, dim: int) -> float:
        """Cycles of a tile's matrix instructions at the measured rate."""
        flop = 2 * self.kernel.block_m * self.kernel.block_n * dim
        return flop / FLOP_A_CYCLE * H200_PEAK / H200.flop

    def cycles(self, dim: int, epilogue: float | None = None) -> float:
        """A tile's: one block a multiprocessor has no other's product to hide its epilogue."""
        epilogue = self.epilogue() if epilogue is None else epilogue
        return self.product(dim) + PIPELINE_FILL + epilogue

    def share_of_gemm(self, dim: int, epilogue: float | None = None) -> float:
        """Predicted useful FLOP a second, of the measured rate."""
        return self.useful * self.balance * self.product(dim) / self.cycles(dim, epilogue)

    def time(self, dim: int) -> float:
        """Predicted, in multiprocessor cycles of the whole device."""
        return self.tiles * self.cycles(dim) / self.balance


def plan(images: TokenRows, texts: TokenRows, direction: str, kernel: Kernel | None = None) -> Plan:
    """What the launcher does on an H200 with these sides."""
    if kernel is None:
        kernel = BOTH if direction == "both" else ROWS
    rows, columns = (texts, images) if direction == "text_to_image" else (images, texts)
    row_items, column_items = launcher.items_per_unit(
        rows, columns, direction == "both", kernel.block_m, kernel.block_n, BLOCKS_STARTED
    )

    def side(of: TokenRows, granule: int, items: int, block: int) -> Side:
        lengths = of.lengths.tolist()
        slots = [-(-length // granule) * granule for length in lengths]
        return Side(slots, sum(lengths), items, block)

    return Plan(
        kernel,
        side(rows, kernel.row_granule, row_items, kernel.block_m),
        side(columns, GRANULE, column_items, kernel.block_n),
    )


def full_side(items: int, tokens: int) -> TokenRows:
    return token_rows(torch.empty(items, tokens, 1), None, None, 0, mean=True)


def masked_side(lengths: Sequence[int], context: int) -> TokenRows:
    mask = torch.arange(context) < torch.tensor(lengths)[:, None]
    return token_rows(torch.empty(len(lengths), context, 1), mask, None, 0, mean=True)


def ragged_side(lengths: Sequence[int]) -> TokenRows:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return token_rows(torch.empty(sum(lengths), 1), None, offsets, max(lengths), mean=True)


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


def read_captions(path: Path) -> list[str]:
    """All captions of a JSON list of rows, whose "caption" is a string or several."""
    captions = []
    for row in json.loads(path.read_text()):
        caption = row["caption"]
        captions += [caption] if isinstance(caption, str) else caption
    return captions


def token_counts(captions: Iterable[str]) -> list[int]:
    """Tokens of CLIP's tokenizer, begin and end among them, before the context cuts them off."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return [len(tokenizer.encode(caption)) + 2 for caption in captions]


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(amount: float, rate: float) -> str:
    ms = amount / rate * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.2g}" if ms < 1 else f"{ms:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _size(size: Size) -> str:
    return f"T {size.text_tokens}, R {size.image_tokens}, D {size.dim}"


def floors_table() -> str:
    """Forward: operations and bytes, and the least time that each allows.

    At the smaller width only: operations and inputs grow with it.
    """
    rows = []
    for one in sizes():
        both = replace(one, both=True)
        rows.append((
            _size(one), f"{one.forward_flop / 1e12:.1f}", f"{one.input_bytes / 1e6:,.0f}",
            f"{(one.score_bytes + one.winner_bytes) / 1e6:,.0f}",
            f"{(both.score_bytes + both.winner_bytes) / 1e6:,.0f}",
            *(
                cell for gpu in (H200, A100) for cell in (
                    f"**{_ms(one.forward_flop, gpu.flop)}**",
                    f"{_ms(one.forward_bytes, gpu.bytes)} / {_ms(both.forward_bytes, gpu.bytes)}",
                )
            ),
        ))  # fmt: skip
    head = ("", "TFLOP", "inputs MB", "outputs MB, one", "both",
            "H200: product ms", "bytes ms, one / both", "A100: product ms",
            "bytes ms, one / both")  # fmt: skip
    return table(head, rows)


def backward_table() -> str:
    """Backward: what it must move, and what it would cost as a matrix product.

    At the smaller width only: operations and gathered rows grow with it.
    """
    rows = []
    for one in sizes():
        both = replace(one, both=True)

        def each(show: Callable[[Size], str], one: Size = one, both: Size = both) -> str:
            return f"{show(one)} / {show(both)}"

        rows.append((
            _size(one), each(lambda s: f"{s.backward_flop / 1e12:.2f}"),
            each(lambda s: _ms(s.backward_flop, H200.vector_flop)),
            each(lambda s: _ms(s.backward_flop, A100.vector_flop)),
            each(lambda s: f"{s.backward_bytes / 1e6:,.0f}"),
            each(lambda s: _ms(s.backward_bytes, H200.bytes)),
            each(lambda s: _ms(s.backward_bytes, A100.bytes)),
            each(lambda s: f"{s.gathered_bytes / 1e9:,.0f}"),
            # dt = G v and dv = Gᵀ t, G the (words, regions) matrix of both directions' winners.
            _ms(2 * one.forward_flop, H200.flop),
        ))  # fmt: skip
    head = ("one / both", "TFLOP", "H200: multiply-adds ms", "A100", "bytes once, MB",
            "H200: bytes ms", "A100", "rows gathered, GB",
            "as one-hot products, H200 ms")  # fmt: skip
    return table(head, rows)


def waste_table() -> str:
    """The useful share of the multiplied elements at full length."""
    shapes = list(product(TEXT_TOKENS, IMAGE_TOKENS))
    rows = []
    for name, (text_widths, image_widths) in PAIR_WISE.items():
        cells = (
            _percent(pair_wise_share(t, covered(t, text_widths), r, covered(r, image_widths)))
            for t, r in shapes
        )
        rows.append((f"pair by pair, {name}", *cells))
    packed = (
        ("packed 128 × 256, words are rows", "text_to_image", ROWS),
        ("packed 128 × 256, regions are rows", "image_to_text", ROWS),
        ("packed 128 × 128, granules along both", "both", BOTH),
    )
    for name, direction, kernel in packed:
        cells = (
            _percent(plan(full_side(BATCH, r), full_side(BATCH, t), direction, kernel).useful)
            for t, r in shapes
        )
        rows.append((f"**{name}**", *cells))
    return table(("", *(f"T {t}, R {r}" for t, r in shapes)), rows)


def units_table() -> str:
    """What the launcher cuts the benchmark sizes into, on an H200."""
    cases = [(BATCH, 77, 196), (BATCH, 248, 196)]
    cases += [(batch, 77, 196) for batch in (256, 128)]
    rows = []
    for direction, (batch, t, r) in product(("text_to_image", "both"), cases):
        made = plan(full_side(batch, r), full_side(batch, t), direction)
        cells = []
        for side in (made.rows, made.columns):
            unit, tiles = side.units[0], side.unit_tiles[0]
            fill = sum(unit) / (tiles * side.block)
            cells.append(f"{len(unit)} × {unit[0]} in {tiles} ({100 * fill:.1f} %)")
        units = len(made.rows.units) * len(made.columns.units)
        rows.append((f"{made.kernel.name}, {batch:,}², T {t}, R {r}", *cells, f"{units:,}",
                     _percent(made.useful), _percent(made.balance)))  # fmt: skip
    head = ("", "rows: items × slots in tiles (fill)", "columns", "units", "useful", "balance")
    return table(head, rows)


# The first estimate of the one-direction epilogue in cycles, before the kernel was compiled:
# two warps a scheduler, 990 issue cycles for the granules and one item, and half as much again
# for the further items of a tile.
FIRST_ESTIMATE = 3000


def prediction_table() -> str:
    """The share of the measured product rate, from instruction counts."""
    rows = []
    for (t, r), dim in product(((77, 196), (77, 256), (248, 196)), DIMS):
        images, texts = full_side(BATCH, r), full_side(BATCH, t)
        floor = Size(t, r, dim).forward_flop / H200.flop
        cells, shares = [], []
        for direction in ("text_to_image", "both"):
            made = plan(images, texts, direction)
            low, high = made.epilogue(overlapping=True), made.epilogue()
            shares.append([made.share_of_gemm(dim, cycles) for cycles in (high, low)])
            if direction == "text_to_image":
                cells.append(_percent(made.share_of_gemm(dim, FIRST_ESTIMATE)))
            cells += [
                f"{made.product(dim):,.0f} + {low:,.0f} – {high:,.0f}",
                " – ".join(_percent(share) for share in shares[-1]),
                " – ".join(f"{floor / share * 1e3:.1f}" for share in shares[-1][::-1]),
            ]
        ratios = [one / both for one, both in zip(*shares, strict=True)]
        rows.append((f"T {t}, R {r}, D {dim}", *cells, f"{min(ratios):.1f} – {max(ratios):.1f}"))
    head = ("", "one: share, first estimate", "one: product + epilogue cycles", "share", "ms",
            "both: product + epilogue cycles", "share", "ms", "both / one")  # fmt: skip
    return table(head, rows)


def traffic_table() -> str:
    """What tiles read through L2, in all and a cycle and multiprocessor."""
    rows = []
    images, texts = full_side(BATCH, IMAGE_TOKENS[0]), full_side(BATCH, TEXT_TOKENS[0])
    for direction, dim in product(("text_to_image", "both"), DIMS):
        made = plan(images, texts, direction)
        read = (made.kernel.block_m + made.kernel.block_n) * dim * TOKEN_BYTES
        rows.append((
            f"{made.kernel.name}, {made.kernel.block_m} × {made.kernel.block_n}, D {dim}",
            f"{read / 1e3:,.0f}", f"{made.tiles * read / 1e9:,.0f}",
            _ms(made.tiles * read, L2_BYTES),
            f"{read / made.product(dim):.0f}", f"{read / made.cycles(dim):.0f}",
        ))  # fmt: skip
    head = ("T 77, R 196", "KB a tile", "GB in all", "ms at 5.5 TB/s",
            "bytes a cycle of its product", "of the whole tile")  # fmt: skip
    return table(head, rows)


RAGGED_HEAD = (
    "fill", "padded: useful", "masked, pair by pair: useful", "slots: useful, one / both",
    "masked: time, one / both", "packed: tiles, one / both", "packed: time, one / both",
)  # fmt: skip


def ragged_cells(lengths: Sequence[int], context: int) -> list[str]:
    """Useful shares and predicted times of a batch; times and tiles as shares of the padded call's.

    Padded: without a mask, so that padding is multiplied as well.
    """
    regions, dim = IMAGE_TOKENS[0], DIMS[0]
    images = full_side(BATCH, regions)
    fill = sum(lengths) / (len(lengths) * context)
    useful, masked_time, tiles, time = [], [], [], []
    padded_useful = ""
    for direction in ("text_to_image", "both"):
        padded, masked, packed = (
            plan(images, texts, direction)
            for texts in (
                full_side(len(lengths), context), masked_side(lengths, context),
                ragged_side(lengths),
            )
        )  # fmt: skip
        padded_useful = padded_useful or _percent(padded.useful * fill)
        useful.append(_percent(packed.useful))
        masked_time.append(f"{masked.time(dim) / padded.time(dim):.2f}")
        tiles.append(f"{packed.tiles / padded.tiles:.2f}")
        time.append(f"{packed.time(dim) / padded.time(dim):.2f}")
    blocks = sum(covered(length, (128,)) for length in lengths)
    pair_wise = pair_wise_share(sum(lengths), blocks, regions, covered(regions, (128,)))
    pairs = (" / ".join(cells) for cells in (useful, masked_time, tiles, time))
    return [_percent(fill), padded_useful, _percent(pair_wise), *pairs]


def sweep_ragged_table() -> str:
    """The sweep's ragged workload: lengths spread evenly around 55 % of 248."""
    work = Workload(
        "maxsim_scores", "both", "inference", 1, BATCH, 248, 1, 1, "float32", "packed", 0.55
    )
    lengths = make_inputs(work, torch.device("cpu")).captions.lengths
    assert lengths is not None
    rows = [("the sweep's, T 248", *ragged_cells(lengths.tolist(), 248))]
    return table(("", *RAGGED_HEAD), rows)


def lengths_table(counts: dict[str, list[int]]) -> str:
    """The distribution of caption lengths, in tokens."""
    rows = []
    for name, lengths in counts.items():
        low, middle, high = quantiles(lengths, n=4)
        cells = [f"{len(lengths):,}", f"{fmean(lengths):.0f}",
                 f"{low:.0f} / {middle:.0f} / {high:.0f}", f"{max(lengths):,}"]  # fmt: skip
        for context in TEXT_TOKENS:
            cells.append(f"{100 * fmean(length > context for length in lengths):.1f} %")
            cells.append(_percent(fmean(min(length, context) for length in lengths) / context))
        rows.append((name, *cells))
    head = ("", "captions", "mean", "quartiles", "longest", "past 77", "fill of 77", "past 248",
            "fill of 248")  # fmt: skip
    return table(head, rows)


def real_ragged_table(counts: dict[str, list[int]]) -> str:
    """What 1,024 random captions of each set cost, in the smallest context that suits them."""
    rows = []
    for name, lengths in counts.items():
        context = min((t for t in TEXT_TOKENS if t >= fmean(lengths)), default=max(TEXT_TOKENS))
        drawn = random.Random(0).sample(lengths, min(BATCH, len(lengths)))
        cut = [min(length, context) for length in drawn]
        rows.append((f"{name}, T {context}", *ragged_cells(cut, context)))
    return table(("", *RAGGED_HEAD), rows)


TABLES: dict[str, Callable[[], str]] = {
    "floors": floors_table,
    "backward": backward_table,
    "waste": waste_table,
    "units": units_table,
    "prediction": prediction_table,
    "traffic": traffic_table,
    "ragged": sweep_ragged_table,
}
CAPTION_TABLES: dict[str, Callable[[dict[str, list[int]]], str]] = {
    "lengths": lengths_table,
    "captions": real_ragged_table,
}


def write(page: str, tables: dict[str, str]) -> str:
    """The page with each table in its place, between <!-- counts: NAME --> and <!-- end -->."""
    for name, text in tables.items():
        marked = re.compile(rf"(<!-- counts: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(marked.findall(page)) != 1:
            raise ValueError(f"the page has not one place for the table {name!r}")
        page = marked.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.maxsim_counts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--captions", type=Path, help="a folder of JSON files with captions")
    parser.add_argument("--page", type=Path, help="write the tables there instead of printing them")
    arguments = parser.parse_args(argv)
    tables = {name: make() for name, make in TABLES.items()}
    if arguments.captions:
        files = sorted(arguments.captions.glob("*.json"))
        counts = {path.stem: token_counts(read_captions(path)) for path in files}
        tables |= {name: make(counts) for name, make in CAPTION_TABLES.items()}
    if arguments.page:
        arguments.page.write_text(write(arguments.page.read_text(), tables))
        print(f"{len(tables)} tables -> {arguments.page}")
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The counts behind docs/kernels/maxsim.md, against counting one by one."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import maxsim_counts as counts
from benchmarks.workloads import Workload, make_inputs, useful_flop
from fastgoal_kernels.ops.maxsim_forward_triton import compile_cases
from fastgoal_kernels.ops.slots import slots
from fastgoal_kernels.ops.token_rows import new_outputs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "maxsim.md"
LENGTHS = [3, 17, 0, 16, 40, 1, 33, 32, 9]


@pytest.mark.parametrize("widths", [(4,), (4, 3), (8, 2), (7, 3, 2)])
def test_tiles_of_several_widths_cover_with_the_fewest_slots(widths):
    for length in range(1, 30):
        counts_of_each = product(*(range(length // width + 2) for width in widths))
        sums = [sum(n * w for n, w in zip(of, widths, strict=True)) for of in counts_of_each]
        assert counts.covered(length, widths) == min(total for total in sums if total >= length)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("text_tokens, image_tokens", [(7, 6), (5, 300)])
def test_outputs_are_counted_as_they_are_made(both, text_tokens, image_tokens):
    size = counts.Size(text_tokens, image_tokens, 4, both, images=3, texts=5)
    images, texts = counts.full_side(3, image_tokens), counts.full_side(5, text_tokens)
    outputs = new_outputs(images, texts, "both" if both else "text_to_image", True)
    made = sum(tensor.nbytes for tensor in outputs)
    assert size.score_bytes + size.winner_bytes == made
    inputs = (torch.empty(3, image_tokens, 4), torch.empty(5, text_tokens, 4))
    assert size.input_bytes == sum(tensor.bfloat16().nbytes for tensor in inputs)
    assert size.forward_bytes == size.input_bytes + made
    assert size.backward_bytes == 2 * size.input_bytes + made


def test_operations_are_those_that_the_sweep_counts():
    work = Workload("maxsim_scores", "both", "inference", 3, 5, 7, 6, 4, "float32")
    captions = make_inputs(work, torch.device("cpu")).captions
    size = counts.Size(7, 6, 4, both=True, images=3, texts=5)
    assert size.forward_flop == useful_flop(work, captions)
    queries = 3 * 5 * (7 + 6)  # each adds its winner's row to its gradient, and itself to its
    assert size.backward_flop == queries * 2 * 4 * 2
    assert size.gathered_bytes == queries * 2 * 4 * 2


@pytest.mark.parametrize("granule, block, items_per_unit", [(16, 32, 4), (1, 8, 3), (16, 16, 9)])
@pytest.mark.parametrize("layout", ["full", "ragged", "masked"])
def test_tiles_are_those_of_the_slots(layout, granule, block, items_per_unit):
    tokens = {
        "full": lambda: counts.full_side(9, 21),
        "ragged": lambda: counts.ragged_side(LENGTHS),
        "masked": lambda: counts.masked_side(LENGTHS, 40),
    }[layout]()
    line = slots(tokens, granule)
    bounds = line.item_slots.tolist()
    multiplied = useful = segments = 0
    for first in range(0, 9, items_per_unit):
        begin, end = bounds[first], bounds[min(first + items_per_unit, 9)]
        for tile in range(begin, end, block):
            inside = slice(tile, min(tile + block, end))
            multiplied += block
            useful += int((line.weight[inside] != 0).sum())
            segments += len(line.item[inside].unique())

    lengths = tokens.lengths.tolist()
    padded = [bounds[i + 1] - bounds[i] for i in range(9)]
    side = counts.Side(padded, sum(lengths), items_per_unit, block)
    assert (side.multiplied, side.tokens, side.segments) == (multiplied, useful, segments)
    # ... and `plan` lays them out the same way.
    made = counts.plan(counts.full_side(9, 20), tokens, "both")
    assert made.columns.slots == [-(-length // 16) * 16 for length in lengths]
    if granule == 16:
        assert made.columns.slots == padded


def test_the_useful_share_is_counted_over_whole_tiles():
    made = counts.plan(counts.full_side(4, 20), counts.full_side(4, 10), "text_to_image")
    tiles = sum(made.rows.unit_tiles) * sum(made.columns.unit_tiles)
    assert made.tiles == tiles
    assert made.useful == pytest.approx(4 * 20 * 4 * 10 / (tiles * 128 * 256))


def test_multiprocessors_share_the_units_as_the_launcher_deals_them():
    sms = counts.H200_SMS

    def balance(units: int) -> float:
        one_tile = counts.Side([128], 128, 1, 128)
        return counts.Plan(counts.BOTH, counts.Side([128] * units, 0, 1, 128), one_tile).balance

    assert balance(1) == pytest.approx(1 / sms)
    assert balance(sms) == balance(2 * sms) == balance(4 * sms) == pytest.approx(1)
    assert balance(2 * sms + 1) == pytest.approx((2 * sms + 1) / (3 * sms))


def test_an_epilogue_is_what_its_warps_issue():
    # Two images of 208 slots in two tiles of 256: three segments, for one was cut in two.
    made = counts.Plan(
        counts.ROWS, counts.Side([128], 128, 1, 128), counts.Side([208, 208], 392, 2, 256)
    )
    rows = counts.ROWS
    issued = rows.tile.together + 1.5 * rows.segment.together + rows.complete.together
    assert made.columns.segments == 3
    assert made.epilogue() == pytest.approx(issued * 8 / 4)
    assert issued > made.epilogue(overlapping=True) / 2 > rows.tile.arithmetic
    # 128 x 256 x 512 multiply-adds at 4,096 FLOP a cycle, and the measured share of the peak.
    assert made.product(512) == pytest.approx(8192 * 989.4 / 790)


@pytest.mark.parametrize("kernel, name", [(counts.ROWS, "rows"), (counts.BOTH, "both")])
def test_the_tiles_are_the_launchers(kernel, name):
    if counts.launcher.INTERPRETED:
        pytest.skip("the interpreter has tiles of its own")
    case = next(case for case in compile_cases(90) if case.name == f"maxsim_{name}_kernel")
    assert (case.constexprs["BLOCK_M"], case.constexprs["BLOCK_N"]) == (
        kernel.block_m, kernel.block_n,
    )  # fmt: skip
    assert case.num_warps == kernel.warps


def test_captions_are_counted_with_clips_tokenizer(tmp_path):
    pytest.importorskip("open_clip")
    path = tmp_path / "some.json"
    path.write_text(json.dumps([{"caption": "a photo of a cat"}, {"caption": ["a dog", "a"]}]))
    captions = counts.read_captions(path)
    assert captions == ["a photo of a cat", "a dog", "a"]
    assert counts.token_counts(captions) == [7, 4, 3]
    assert "| some | 3 | 5 |" in counts.lengths_table({"some": [7, 4, 3]})


def test_tables_go_to_their_place_and_nowhere_else():
    page = "a\n<!-- counts: x -->\nold\n<!-- end -->\nb\n<!-- counts: y -->\n<!-- end -->\n"
    new = counts.write(page, {"x": "| new |"})
    assert new == page.replace("old", "| new |")
    assert counts.write(new, {"x": "| new |"}) == new
    with pytest.raises(ValueError, match="'z'"):
        counts.write(page, {"z": ""})


@pytest.mark.skipif(counts.launcher.INTERPRETED, reason="needs the launcher's own tiles")
def test_the_page_holds_what_the_counts_say():
    page = PAGE.read_text()
    tables = {name: make() for name, make in counts.TABLES.items()}
    assert counts.write(page, tables) == page, (
        f"python -m benchmarks.maxsim_counts --page {PAGE.relative_to(PAGE.parents[2])}"
    )

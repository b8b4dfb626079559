"""Token rows in slots: every valid row once, items at granules, repeats that no maximum sees."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgoal_kernels.ops.slots import slots
from fastgoal_kernels.ops.token_rows import token_rows

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
sides = st.tuples(
    st.sampled_from(["padded", "masked", "ragged"]),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(side=sides, granule=st.sampled_from([1, 4, 16]))
def test_slots_against_a_loop(device, side, granule):
    layout, items, longest, seed = side
    generator = torch.Generator().manual_seed(seed)
    if layout == "ragged":
        lengths = torch.randint(0, longest + 1, (items,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        tokens = torch.zeros(int(offsets[-1]), 2)
        if len(tokens) == 0:
            return  # the launchers stop before
        mask = None
        valid = [list(range(int(a), int(b))) for a, b in pairwise(offsets)]
    else:
        tokens, offsets = torch.zeros(items, longest, 2), None
        mask = torch.rand(items, longest, generator=generator) < 0.6
        mask = mask if layout == "masked" else None
        valid = [
            [i * longest + k for k in range(longest) if mask is None or mask[i, k]]
            for i in range(items)
        ]
    move = {"device": device}
    rows = token_rows(
        tokens.to(**move),
        None if mask is None else mask.to(**move),
        None if offsets is None else offsets.to(**move),
        longest,
        mean=True,
    )
    line = slots(rows, granule)

    begin = 0
    for item, expected in enumerate(valid):
        size = -(-len(expected) // granule) * granule
        assert line.item_slots[item] == begin
        mine = slice(begin, begin + size)
        repeats = [expected[-1]] * (size - len(expected)) if expected else []
        assert line.row[mine].tolist() == expected + repeats
        assert line.item[mine].tolist() == [item] * size
        weight = line.weight[mine].cpu()
        assert torch.equal(weight[: len(expected)], rows.row_weight[expected].cpu())
        assert not weight[len(expected) :].any()
        begin += size
    assert line.item_slots[-1] == begin <= len(line.row)
    # A kernel may look behind the end; it must find rows there that exist.
    assert int(line.row.min()) >= 0 and int(line.row.max()) < rows.total
    assert int(line.item.min()) >= 0 and int(line.item.max()) < items

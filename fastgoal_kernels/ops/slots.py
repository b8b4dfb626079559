"""Token rows laid out in slots, so that a matrix kernel's tiles hold nothing but tokens.

A tile of fixed size wastes what an item leaves of it: 77 words in 128 rows, 196 regions in 256.
So the valid rows of all items stand one behind the other, and tiles are cut from that line wherever
they fall. The kernels reduce tiles by granules of a few slots; every item starts at a granule, and
the slots between its last row and the next granule repeat that row: a maximum does not see them,
and the lowest index wins before them.

Nothing here looks at a value on the host: the line is as long as it could be, and its true end is
item_slots[-1], on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .token_rows import TokenRows


class Slots(NamedTuple):
    """Where each slot's row is, and which slots are an item's."""

    row: Tensor  # (slots,) int32: the row a slot shows
    item: Tensor  # (slots,) int32: the item it belongs to
    weight: Tensor  # (slots,) as TokenRows.row_weight; 0 where a row is repeated
    item_slots: Tensor  # (items + 1,) int32: item i is slots item_slots[i] to item_slots[i + 1]


def slots(side: TokenRows, granule: int) -> Slots:
    """The line of one side's rows."""
    device = side.rows.device
    if side.full:
        counts = side.lengths
    else:
        counts = torch.zeros_like(side.lengths)
        counts = counts.index_add_(0, side.row_item, (side.row_weight != 0).int())
    per_item = (counts + (granule - 1)) // granule * granule
    item_slots = torch.zeros(side.items + 1, dtype=torch.int32, device=device)
    torch.cumsum(per_item, 0, out=item_slots[1:])

    # No item wastes more than granule - 1 slots.
    slot = torch.arange(side.total + side.items * (granule - 1), dtype=torch.int32, device=device)
    item = torch.searchsorted(item_slots[1:], slot, right=True, out_int32=True)
    item = item.clamp_(max=side.items - 1)
    place = slot - item_slots[item]
    shown = torch.minimum(place, counts[item] - 1).clamp_(min=0)
    if side.has_holes:
        # Valid rows first, in their order: item i's begin where those of the items before it end.
        valid_rows = torch.argsort(side.row_weight == 0, stable=True)
        first = counts.cumsum(0) - counts
        row = valid_rows[(first[item] + shown).clamp_(max=side.total - 1)]
    else:
        row = (side.starts[item] + shown).clamp_(0, side.total - 1)
    weight = torch.where(place < counts[item], side.row_weight[row], 0)
    return Slots(row.int(), item, weight, item_slots)

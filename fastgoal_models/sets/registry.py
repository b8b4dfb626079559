"""The sets by name."""

from __future__ import annotations

from pathlib import Path

from . import coco, dci, docci, flickr30k, iiw, jsonl, sharegpt4v, urban1k
from .base import CaptionSet, Layout, SetError

SETS: dict[str, Layout] = {
    layout.name: layout
    for module in (docci, dci, urban1k, sharegpt4v, iiw, coco, flickr30k, jsonl)
    for layout in module.LAYOUTS
}


def read_set(name: str, root: str | Path) -> CaptionSet:
    """The set of that name in `SETS`, from a folder that holds it in its official layout.

    Rows that can not be used are in its `report`; `note` says so where the set is not complete.
    Raises SetError for a name that is not known, a file or folder that is missing or damaged, and
    a set without any usable row.
    """
    if name not in SETS:
        raise SetError(f'"{name}" is not a known set. Known are: {", ".join(SETS)}')
    layout = SETS[name]
    found = layout.read(Path(root), layout)
    if not found.images:
        raise SetError(
            f"{layout.title}: no row of {root} can be used. {found.report}\n"
            f"Fix: --root is the folder that holds {layout.holds}; get the set from {layout.source}"
        )
    here = (len(found.images), found.num_captions)
    if layout.counts is not None and here != layout.counts:
        found.note = (
            f"{layout.title} has {layout.counts[0]:,} images and {layout.counts[1]:,} captions, "
            f"of which {here[0]:,} and {here[1]:,} were read: results do not compare with "
            "published ones"
        )
    return found

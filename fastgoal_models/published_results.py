"""What papers report, to stand beside what was measured: R@1 text → image and image → text, in %.

FAST-GOAL: arXiv 2605.26615; GOAL: arXiv 2503.17782; CAFT: arXiv 2602.02977.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One row of a paper's table."""

    model: str
    text_to_image: float
    image_to_text: float


_ROWS = {
    "docci-goal": (
        Published("CLIP B/16", 58.5, 58.8),
        Published("Long-CLIP B/16", 71.6, 63.3),
        Published("GOAL B/16, trained on DCI", 71.2, 72.2),
        Published("FAST-GOAL B/16", 74.3, 74.7),
        Published("FAST-GOAL B/16, two stages", 84.2, 83.2),
        Published("FAST-GOAL L/14", 78.6, 78.6),
    ),
    "dci-goal": (
        Published("CLIP B/16", 33.4, 35.1),
        Published("Long-CLIP B/16", 48.4, 42.2),
        Published("GOAL B/16", 49.1, 51.9),
        Published("FAST-GOAL B/16", 56.6, 56.7),
        Published("FAST-GOAL B/16, two stages", 78.3, 77.3),
        Published("FAST-GOAL L/14", 59.7, 60.8),
    ),
    "dci": (Published("CAFT-3M, whole score", 55.8, 56.6),),
    "coco": (Published("FAST-GOAL B/16", 42.8, 61.0),),
    "flickr30k": (Published("FAST-GOAL B/16", 72.5, 86.8),),
}


def published_rows(set_name: str) -> tuple[Published, ...]:
    """The papers' rows for a set; none for sets that no table of theirs has."""
    return _ROWS.get(set_name, ())

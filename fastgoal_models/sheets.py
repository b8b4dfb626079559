"""Contact sheets: what a search found, with right and wrong marked where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .drawing import check_ending, new_figure
from .fonts import save_figure, wrap
from .pictures import load_image
from .search import Hit

_COLUMNS, _SIDE = 4, 2.6  # inches
_LINES = 4
_RIGHT, _WRONG, _UNKNOWN = "#2a7f3f", "#b3261e", "#bbbbbb"


def draw_sheet(
    query: str, hits: Sequence[Hit], path: Path, right: Sequence[bool] | None = None
) -> None:
    """Write a picture of the query and its images, best first; the ending chooses the format.

    Args:
        query: stands above, shortened to four lines.
        hits: of a search.
        path: where to write.
        right: whether each hit is a right answer; frames are green and red then.

    Raises ConfigError for an ending that names no picture.
    """
    check_ending(path)
    rows = -(-len(hits) // _COLUMNS)
    columns = min(_COLUMNS, max(len(hits), 1))
    lines = wrap(query, 26 * columns)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1][:-2]} …"]
    top = 0.3 + 0.2 * len(lines)
    figure = new_figure(_SIDE * columns, rows * (_SIDE + 0.35) + top)
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    axes = figure.subplots(max(rows, 1), columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for number, (axis, hit) in enumerate(zip(axes, hits, strict=False)):
        image = load_image(hit.image)
        image.thumbnail((420, 420))
        colour = _UNKNOWN if right is None else _RIGHT if right[number] else _WRONG
        axis.set_axis_on()
        axis.set(xticks=[], yticks=[])
        axis.imshow(image)
        title = f"{number + 1}. {hit.score:.3f}  {hit.image.name[:28]}"
        axis.set_title(title, fontsize=8, parse_math=False)  # a $ is a dollar
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=1 if right is None else 4)
    save_figure(figure, path, dpi=110)

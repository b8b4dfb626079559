"""What our pictures share: a figure without a window, a photograph, a box and a map over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from .errors import ConfigError
from .pictures import Box, load_image

_SIDE = 640
"""Pixels of a drawn photograph's longer side."""


def new_figure(width: float, height: float, *, layout: Any = "constrained") -> Figure:
    """A figure of inches that goes to a file; pyplot and a notebook's backend know nothing of it.

    Write it with `fonts.save_figure`.
    """
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def check_ending(path: Path) -> None:
    """Raises ConfigError for a file whose ending names no picture."""
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ConfigError(f"{path} should end in one of {', '.join(sorted(known))}")


def open_photograph(path: Path) -> tuple[Image.Image, tuple[int, int]]:
    """A photograph small enough to draw quickly, and its true width and height.

    Raises GlitError for one that can not be read.
    """
    photograph = load_image(path)
    size = photograph.size
    photograph.thumbnail((_SIDE, _SIDE))
    return photograph, size


def show_photograph(axis: Axes, photograph: Image.Image, size: tuple[int, int]) -> None:
    """The photograph alone, in coordinates of its true `size`, which are those of its boxes."""
    axis.set_axis_off()
    axis.imshow(photograph, extent=(0, size[0], size[1], 0))


def lay_over(
    axis: Axes,
    photograph: Image.Image,
    size: tuple[int, int],
    heat: Tensor,
    low: float,
    high: float,
) -> AxesImage:
    """A map over the grey photograph, dark at `low` and bright at `high`; what a colour bar wants.

    `heat` is (h, w), over the whole picture.
    """
    width, height = size
    show_photograph(axis, photograph.convert("L").convert("RGB"), size)
    return axis.imshow(
        heat.float().numpy(), extent=(0, width, height, 0), cmap="magma", alpha=0.6, vmin=low,
        vmax=high, interpolation="nearest",
    )  # fmt: skip


def outline(box: Box, colour: str, style: Any = "-") -> Rectangle:
    """The frame of a box, for `Axes.add_patch`."""
    x1, y1, x2, y2 = box
    return Rectangle(
        (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2.5, linestyle=style
    )

"""The report's pictures: loss curves, matched regions, and which patches a word resembles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from torch import Tensor

from ..drawing import lay_over, new_figure, open_photograph, outline, show_photograph
from ..fonts import save_figure, wrap
from ..glit import LocalPair
from ..training import StepRecord

# Okabe and Ito's palette: distinguishable with any colour vision.
TRAINED_ON, FOUND_AFTER = "#D55E00", "#0072B2"
_CURVES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
_LABELS = {
    "loss": "total",
    "global_loss": "global: photograph and caption",
    "local_loss": "local: region and sentence",
    "region_tsl_loss": "TSL: region patches and region",
    "span_tsl_loss": "TSL: sentence words and sentence",
}

SHEET_COLUMNS, SHEET_ROWS = 3, 2


class PairPicture(NamedTuple):
    """One photograph with the pair it was trained on and the pair the trained model would pick."""

    name: str
    image: Path
    sentences: Sequence[str]
    before: LocalPair
    after: LocalPair


class WordMaps(NamedTuple):
    """Cosines between the words of a sentence and the patches of a photograph."""

    words: list[str]
    before: Tensor  # (words, down, across)
    after: Tensor


def loss_curves(records: Sequence[StepRecord], path: Path) -> None:
    """The loss and the weighted parts it is the sum of, against the step."""
    steps = [record.step for record in records]
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for (name, label), colour in zip(_LABELS.items(), _CURVES, strict=True):
        values = [record.losses[name] for record in records]
        axes.plot(
            steps, values, color=colour, linewidth=2.4 if name == "loss" else 1.4, label=label
        )
    axes.set_title("FAST-GOAL loss while fine-tuning")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats; TSL: squared cosine distance)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path, dpi=100)


def contact_sheets(pictures: Sequence[PairPicture], folder: Path) -> list[Path]:
    """Photographs with their matched boxes, the sentences underneath; six on a sheet at most."""
    sheets = -(-len(pictures) // (SHEET_COLUMNS * SHEET_ROWS))
    per_sheet = -(-len(pictures) // sheets)  # evenly: no sheet with a single one
    paths = []
    for first in range(0, len(pictures), per_sheet):
        shown = pictures[first : first + per_sheet]
        rows = -(-len(shown) // SHEET_COLUMNS)
        columns = -(-len(shown) // rows)
        figure = new_figure(4.4 * columns, 5.0 * rows, layout=None)
        # A photograph and its text get a cell each: a wrapped text of any length then fits.
        grid = figure.add_gridspec(
            2 * rows,
            columns,
            height_ratios=[3.3, 1.4] * rows,
            left=0.01, right=0.99, bottom=0.005, top=1 - 0.3 / (5.0 * rows),
            hspace=0.08, wspace=0.05,
        )  # fmt: skip
        for position, picture in enumerate(shown):
            row, column = divmod(position, columns)
            _draw_pair(figure.add_subplot(grid[2 * row, column]), picture)
            _write_pair(figure.add_subplot(grid[2 * row + 1, column]), picture)
        paths.append(folder / f"pairs-{len(paths) + 1}.png")
        save_figure(figure, paths[-1], dpi=100)
    return paths


def heat_map(image: Path, pair: LocalPair, maps: WordMaps, path: Path) -> None:
    """Every word of a sentence against every patch, laid over the photograph, before and after."""
    columns = 6
    bands = -(-len(maps.words) // columns)
    photograph, size = open_photograph(image)
    cell = 2.2
    figure = new_figure(cell * columns + 1.0, (cell * size[1] / size[0] + 0.35) * 2 * bands + 1.2)
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for half, (label, cosines) in enumerate(
        (("before training", maps.before), ("after training", maps.after))
    ):
        # One colour scale for each half: the words can be compared with each other, and the two
        # halves differ in range so much that one scale for both would leave one of them flat.
        low, high = float(cosines.min()), float(cosines.max())
        block = axes[half * bands : (half + 1) * bands]
        drawn: Any = None
        for position, axis in enumerate(block.flat):
            axis.set_axis_off()
            if position >= len(maps.words):
                continue
            drawn = lay_over(axis, photograph, size, cosines[position], low, high)
            axis.add_patch(outline(pair.box, "white"))
            axis.set_title(maps.words[position], fontsize=12)
        bar = figure.colorbar(drawn, ax=list(block.flat), shrink=0.85)
        bar.set_label(f"cosine similarity, {label}")
    figure.suptitle(
        "Words and patches, before training (upper rows) and after (lower rows)\n"
        "white box: the region this sentence was matched with for training"
    )
    save_figure(figure, path, dpi=100)


def _draw_pair(axes: Axes, picture: PairPicture) -> None:
    show_photograph(axes, *open_photograph(picture.image))
    axes.set_title(picture.name.replace("_", " "), fontsize=12)
    axes.add_patch(outline(picture.before.box, TRAINED_ON))
    axes.add_patch(outline(picture.after.box, FOUND_AFTER, (0, (3, 2))))


def _write_pair(axes: Axes, picture: PairPicture) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    if picture.before[:2] == picture.after[:2]:
        captions = [("trained on, and found after", picture.before, TRAINED_ON)]
    else:
        captions = [
            ("trained on", picture.before, TRAINED_ON),
            ("found after", picture.after, FOUND_AFTER),
        ]
    y = 0.98
    for when, pair, colour in captions:
        text = f"{when}, {pair.region}: “{picture.sentences[pair.sentence]}”"
        lines = wrap(text, 54, max_lines=4, placeholder=" …")
        axes.text(0.0, y, "\n".join(lines), color=colour, fontsize=9.5, va="top", linespacing=1.15)
        y -= 0.125 * len(lines) + 0.05

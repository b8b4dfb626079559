"""One picture a record: its matched pairs, and where sentences and the class token look in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .drawing import lay_over, new_figure, open_photograph, outline, show_photograph
from .fonts import wrap
from .glit import GlitRecord, LocalPair

# Okabe and Ito's palette: distinguishable with any colour vision. As many sentences are shown.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
_COLUMNS, _CELL = len(_COLOURS), 3.4  # inches
_TITLE_WIDTH, _TEXT_LINES, _TITLE_LINES = 42, 6, 3  # characters, lines


class ModelMaps(NamedTuple):
    """What one model made of a record; its tensors are on the CPU."""

    name: str
    """what the model is called"""
    when: str
    """"before training", "after training", or "" where there is one model alone"""
    sentences: Sequence[Tensor]
    """(h, w) for each of the `shown_sentences`: its cosine with every patch"""
    attention: Tensor | None
    """(h, w), how the class token's attention is shared; None where that tells nothing"""


def shown_sentences(record: GlitRecord) -> list[int]:
    """Four sentences at most: those of the best pairs, then the caption's first ones."""
    order = [*(pair.sentence for pair in record.pairs), *range(len(record.sentences))]
    return list(dict.fromkeys(order))[:_COLUMNS]


def draw_maps(record: GlitRecord, models: Sequence[ModelMaps]) -> Figure:
    """Above the photograph with its boxes, their sentences, and where each class token looks.

    Below a row a model with a map a sentence, and the sentence's box in white. The maps of a row
    share a scale. Rows have their own: models differ in range so much that a common one would leave
    one of them flat.

    Args:
        record: its `shown_sentences` are drawn, each in its colour.
        models: one or two.

    Raises GlitError for a picture that can not be read.
    """
    photograph, size = open_photograph(record.image)
    shape = min(max(size[1] / size[0], 0.5), 2.5)  # a panorama has its titles, too
    rows = 1 + len(models)
    figure = new_figure(_CELL * _COLUMNS + 1.0, (_CELL * shape + 0.6) * rows + 0.4)
    grid = figure.add_gridspec(rows, _COLUMNS)
    first_map = _COLUMNS - len(models)
    _draw_pairs(figure.add_subplot(grid[0, 0]), record, photograph, size)
    text = figure.add_subplot(grid[0, 1:first_map])
    _write_sentences(text, record, (first_map - 1) * _TITLE_WIDTH)
    for row, maps in enumerate(models, start=1):
        if maps.attention is not None:
            axis = figure.add_subplot(grid[0, first_map + row - 1])
            most = float(maps.attention.max())
            lay_over(axis, photograph, size, maps.attention, 0.0, most)
            what = f"class token's attention {maps.when}".rstrip()
            _title(axis, f"{what}, at most {most:.1%} a patch")
        axes = [figure.add_subplot(grid[row, column]) for column in range(_COLUMNS)]
        _draw_similarity(figure, axes, record, photograph, size, maps)
    names = [f"{maps.when}: {maps.name}".removeprefix(": ") for maps in models]
    figure.suptitle("\n".join(names), fontsize=10, parse_math=False)
    return figure


def _pairs(record: GlitRecord) -> dict[int, LocalPair]:
    """The best pair of each sentence that has one."""
    return {pair.sentence: pair for pair in reversed(record.pairs)}


def _draw_pairs(
    axis: Axes, record: GlitRecord, photograph: Image.Image, size: tuple[int, int]
) -> None:
    show_photograph(axis, photograph, size)
    _title(axis, record.id)
    pairs = _pairs(record)
    boxes = [
        (pairs[sentence].box, colour)
        for sentence, colour in zip(shown_sentences(record), _COLOURS, strict=False)
        if sentence in pairs
    ]
    for box, colour in boxes:
        # Sentences that were matched with one region take turns along its frame.
        sharing = [other for same, other in boxes if same == box]
        turn = (-4 * sharing.index(colour), (4, 4 * (len(sharing) - 1)))
        axis.add_patch(outline(box, colour, turn if len(sharing) > 1 else "-"))


def _write_sentences(axis: Axes, record: GlitRecord, columns: int) -> None:
    axis.set_axis_off()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    pairs = _pairs(record)
    sentences = shown_sentences(record)
    for place, (sentence, colour) in enumerate(zip(sentences, _COLOURS, strict=False)):
        pair = pairs.get(sentence)
        where = "" if pair is None else f"{pair.region}, {pair.score:.3f}: "
        text = f"{where}{record.sentences[sentence]}"
        lines = wrap(text, columns, max_lines=_TEXT_LINES, placeholder=" …")
        axis.text(
            0.0, 1 - place / _COLUMNS, "\n".join(lines), color=colour, fontsize=9, va="top",
            parse_math=False,
        )  # fmt: skip


def _draw_similarity(
    figure: Figure,
    axes: Sequence[Axes],
    record: GlitRecord,
    photograph: Image.Image,
    size: tuple[int, int],
    maps: ModelMaps,
) -> None:
    pairs = _pairs(record)
    low = min(float(heat.min()) for heat in maps.sentences)
    high = max(float(heat.max()) for heat in maps.sentences)
    for axis in axes:
        axis.set_axis_off()
    shown = zip(axes, shown_sentences(record), maps.sentences, _COLOURS, strict=False)
    for axis, sentence, heat, colour in shown:
        drawn = lay_over(axis, photograph, size, heat, low, high)
        if sentence in pairs:
            axis.add_patch(outline(pairs[sentence].box, "white"))
        _title(axis, record.sentences[sentence], colour)
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8)
    bar.set_label(f"cosine of sentence and patch\n{maps.when}".rstrip())


def _title(axis: Axes, text: str, colour: str = "black") -> None:
    lines = wrap(text, _TITLE_WIDTH, max_lines=_TITLE_LINES, placeholder=" …")
    axis.set_title("\n".join(lines), fontsize=9, color=colour, parse_math=False)  # a $ is a dollar

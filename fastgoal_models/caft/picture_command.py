"""`fastgoal hierarchy`: one photograph and its caption, as a CAFT sees them."""

from __future__ import annotations

from pathlib import Path

from ..captions import split_sentences
from ..drawing import check_ending
from ..errors import UserError
from ..loading import caft_of
from ..pictures import image_tensor, load_image
from ..trained import load_trained
from .captions import evaluation_parts
from .data import text_rows
from .maps import caft_maps
from .model import Caft
from .pictures import draw_caft


def draw_hierarchy(
    image: Path,
    caption: str,
    checkpoint: Path,
    out: Path,
    model: str | None = None,
    superpixels: str | None = None,
) -> str:
    """Draw the segments of a photograph and the attention of its caption's parts.

    Returns what to call the model.

    Args:
        image: any photograph; it is squashed to the model's square.
        caption: its sentences become the model's parts.
        checkpoint: a weights file, or the folder of a run of `fastgoal train caft` or of one of its
            checkpoints, which knows its own configuration and superpixels.
        out: where to write; its ending chooses the format.
        model: a configuration's name or JSON file.
        superpixels: "sfcn", "slic" or "grid".

    Raises UserError, CheckpointError, ConfigError or GlitError for what can not be used.
    """
    check_ending(out)
    sentences = split_sentences(caption)
    if not sentences:
        raise UserError("the caption has no words")
    caft, name = _load(checkpoint, model, superpixels)
    picture = load_image(image)
    parts = evaluation_parts(sentences, caft.config.text.parts)
    pixels = image_tensor(picture, caft.config.image_size)
    maps = caft_maps(caft, pixels, text_rows(parts, caft.tokenizer))
    picture.thumbnail((640, 640))
    draw_caft(picture, parts, maps, out)
    return name


def _load(checkpoint: Path, model: str | None, superpixels: str | None) -> tuple[Caft, str]:
    if checkpoint.is_dir():
        trained = load_trained(checkpoint)
        return caft_of(trained, model, superpixels), trained.name
    caft = Caft.from_checkpoint(checkpoint, model or "caft-b", superpixels=superpixels or "sfcn")
    return caft, str(checkpoint)

"""`fastgoal hierarchy`: one photograph and its caption, as a CAFT sees them."""

from __future__ import annotations

from pathlib import Path

from ..captions import split_sentences
from ..checkpoints import load_checkpoint
from ..errors import UserError
from ..glit import image_tensor, load_image
from .captions import evaluation_parts
from .config import CaftConfig
from .data import text_rows
from .model import Caft
from .pictures import caft_maps, draw_caft


def draw_hierarchy(
    image: Path,
    caption: str,
    checkpoint: Path,
    out: Path,
    model: str | None = None,
    superpixels: str | None = None,
) -> None:
    """Draw the segments of a photograph and the attention of its caption's parts.

    Args:
        image: any photograph; it is squashed to the model's square.
        caption: its sentences become the model's parts.
        checkpoint: a weights file, or a checkpoint folder of `fastgoal train caft`, which knows its
            own configuration and superpixels.
        out: where to write; its ending chooses the format.
        model: a configuration's name or JSON file.
        superpixels: "sfcn", "slic" or "grid".

    Raises UserError, CheckpointError, ConfigError or GlitError for what can not be used.
    """
    sentences = split_sentences(caption)
    if not sentences:
        raise UserError("the caption has no words")
    caft = _load(checkpoint, model, superpixels)
    picture = load_image(image)
    parts = evaluation_parts(sentences, caft.config.text.parts)
    pixels = image_tensor(picture, caft.config.image_size)
    maps = caft_maps(caft, pixels, text_rows(parts, caft.tokenizer))
    picture.thumbnail((640, 640))
    draw_caft(picture, parts, maps, out)


def _load(checkpoint: Path, model: str | None, superpixels: str | None) -> Caft:
    if not checkpoint.is_dir():
        return Caft.from_checkpoint(
            checkpoint, model or "caft-b", superpixels=superpixels or "sfcn"
        )
    saved = load_checkpoint(checkpoint)
    noted = saved.config
    if not isinstance(noted.get("model"), dict):
        raise UserError(f"{checkpoint} is no checkpoint of `fastgoal train caft`")
    return Caft.from_checkpoint(
        checkpoint / "model.safetensors",
        CaftConfig.load(model or noted["model"]),
        superpixels=superpixels or noted["superpixels"],
        published=noted["published"],
    )

"""Which parts of a FAST-GOAL model train: both towers, their last blocks, or only one tower.

Only `requires_grad` changes. The training loop gives its optimizer nothing else, so that a part
that is locked has no gradient, no optimizer state, and keeps its weights to the bit.
"""

from __future__ import annotations

import re

from .errors import ConfigError
from .fast_goal import FastGoalModel

# Of open_clip's own names, those of a tower's last steps: final norm and projection.
_HEADS = ("ln_post.", "proj", "ln_final.", "text_projection")
_SCALES = ("logit_scale", "logit_bias")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")


def lock_towers(
    model: FastGoalModel, image_blocks: int | None = None, text_blocks: int | None = None
) -> None:
    """Let only the last blocks of each tower train, in place.

    A tower's final norm and projection train with its last block. Its embeddings (patches, words,
    positions) train only where the whole tower does. The logit scale always trains.

    Args:
        model: a parameter of it that was locked before stays so.
        image_blocks: how many of the image tower's last blocks train; 0 locks the tower, None lets
            all of it train.
        text_blocks: the same for the text tower.

    Raises ConfigError for fewer than 0 blocks, more than the tower has, or both towers locked.
    """
    if image_blocks == 0 and text_blocks == 0:
        raise ConfigError(
            "--unlocked-image-blocks 0 with --unlocked-text-blocks 0 leaves only the logit scale "
            "to train. Fix: leave one of them out"
        )
    names = [name for name, _ in model.clip.named_parameters() if name not in _SCALES]
    image = [name for name in names if name.startswith("visual.")]
    text = [name for name in names if not name.startswith("visual.")]
    locked = [
        *_locked("--unlocked-image-blocks", image_blocks, image, "visual."),
        *_locked("--unlocked-text-blocks", text_blocks, text, "text."),
    ]
    for name in locked:
        model.clip.get_parameter(name).requires_grad_(False)


def _locked(option: str, unlocked: int | None, names: list[str], tower: str) -> list[str]:
    """Those of a tower's parameters that do not train."""
    if unlocked is None:
        return []
    block_of = {name: int(match[1]) for name in names if (match := _BLOCK.search(name))}
    blocks = max(block_of.values()) + 1
    if not 0 <= unlocked <= blocks:
        raise ConfigError(
            f"{option} must be 0 (the tower is locked) to {blocks} (all of its blocks); got "
            f"{unlocked}. Fix: leave it out where the whole tower should train"
        )

    def trains(name: str) -> bool:
        if name in block_of:
            return block_of[name] >= blocks - unlocked
        return unlocked > 0 and name.removeprefix(tower).startswith(_HEADS)

    return [name for name in names if not trains(name)]

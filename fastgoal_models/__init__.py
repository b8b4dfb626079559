"""FAST-GOAL on open_clip: the model, its data and its local pairs."""

from .captions import TokenizedCaption, split_sentences, tokenize_caption
from .fast_goal import DEMO_CONFIG, FastGoalBatch, FastGoalModel
from .flism import best_pair, fixed_regions, match_pairs
from .glit import (
    FastGoalDataset,
    GlitError,
    GlitRecord,
    LocalPair,
    SkipReport,
    collate,
    read_glit,
    write_glit,
)
from .positional import stretch_positional_embedding

__all__ = [
    "DEMO_CONFIG",
    "FastGoalBatch",
    "FastGoalDataset",
    "FastGoalModel",
    "GlitError",
    "GlitRecord",
    "LocalPair",
    "SkipReport",
    "TokenizedCaption",
    "best_pair",
    "collate",
    "fixed_regions",
    "match_pairs",
    "read_glit",
    "split_sentences",
    "stretch_positional_embedding",
    "tokenize_caption",
    "write_glit",
]

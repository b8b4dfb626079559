"""FAST-GOAL on open_clip: the model, its data and its local pairs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captions import TokenizedCaption, split_sentences, tokenize_caption
    from .errors import GlitError
    from .fast_goal import DEMO_CONFIG, FastGoalBatch, FastGoalModel
    from .flism import best_pair, fixed_regions, match_pairs
    from .glit import GlitRecord, LocalPair, read_glit, write_glit
    from .glit_dataset import FastGoalDataset, collate
    from .positional import stretch_positional_embedding
    from .skips import SkipReport

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

# Where each name lives. A name's module, and with it PyTorch and open_clip, is imported when the
# name is first asked for: the `fastgoal` command, which lives in this package, would otherwise wait
# for both before it could say a word, and could not help where one of them is missing.
_HOMES = {
    "captions": ("TokenizedCaption", "split_sentences", "tokenize_caption"),
    "errors": ("GlitError",),
    "fast_goal": ("DEMO_CONFIG", "FastGoalBatch", "FastGoalModel"),
    "flism": ("best_pair", "fixed_regions", "match_pairs"),
    "glit": ("GlitRecord", "LocalPair", "read_glit", "write_glit"),
    "glit_dataset": ("FastGoalDataset", "collate"),
    "positional": ("stretch_positional_embedding",),
    "skips": ("SkipReport",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

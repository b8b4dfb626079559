"""Retrieval on a set of captioned pictures while a model trains."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .errors import ConfigError
from .evaluation import Evaluated, caption_set, evaluate_set
from .fast_goal import FastGoalModel
from .glit import read_glit
from .options import records_digest
from .training import Evaluation


def retrieval_evaluation(
    data: Path, root: Path | None, console: Console, *, strict: bool = False
) -> Evaluation:
    """Recall@K on a GLIT file, as `fastgoal eval --data` counts it; the score is the mean R@1.

    Raises ConfigError for a file without a usable record, GlitError for a record that is not usable
    under `strict`, OSError.
    """
    records, skipped = read_glit(data, root=root, strict=strict)
    console.print(escape(f"--eval-data: {skipped}"), highlight=False, soft_wrap=True)
    if not records:
        raise ConfigError(f"--eval-data: {data} has no usable record")
    captioned = caption_set(records, data.stem)

    def measure(model: FastGoalModel) -> tuple[float, dict[str, float]]:
        values = _values(evaluate_set(model, captioned))
        return values["mean_r1"], values

    return Evaluation(records_digest(records), measure)


def _values(found: Evaluated) -> dict[str, float]:
    ways = {name: getattr(found.retrieval, name) for name in ("text_to_image", "image_to_text")}
    values = {"mean_r1": sum(recalls[1] for recalls in ways.values()) / len(ways)}
    return values | {f"{way}_r{k}": ways[way][k] for way in ways for k in ways[way]}

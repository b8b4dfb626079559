"""Retrieval on a set of captioned pictures while a model trains."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .caft.model import Caft
from .errors import ConfigError, need_file
from .evaluation import Evaluated, caption_set, evaluate_set
from .fast_goal import FastGoalModel
from .glit import read_glit
from .options import records_digest
from .picture_check import PictureCheck, lines_in
from .training import Evaluation, TrainConfig


def check_evaluation(data: Path | None, root: Path | None, config: TrainConfig) -> None:
    """Raises ConfigError where `data` is no file, or None and something asks for an evaluation."""
    if data is not None:
        need_file(data, "--eval-data")
        return
    asked = {
        "--eval-root": root is not None,
        "--eval-every": config.eval_every is not None,
        "--keep-best": config.keep_best,
    }
    for name, given in asked.items():
        if given:
            raise ConfigError(f"{name} needs something to evaluate on. Fix: --eval-data FILE")


def retrieval_evaluation(
    data: Path,
    root: Path | None,
    console: Console,
    *,
    strict: bool = False,
    published: bool = False,
) -> Evaluation:
    """Recall@K on a GLIT file, as `fastgoal eval --data` counts it; the score is the mean R@1.

    `published`: cut captions for a CAFT as the published code does.

    Raises ConfigError for a file without a usable record, GlitError for a record that is not usable
    under `strict`, OSError.
    """
    check = PictureCheck()
    with check.watch(console):
        check.expect(lines_in(data))
        records, skipped = read_glit(data, root, strict, judge=check.judge)
    console.print(escape(f"--eval-data: {skipped}"), highlight=False, soft_wrap=True)
    if not records:
        raise ConfigError(f"--eval-data: {data} has no usable record")
    captioned = caption_set(records, data.stem)
    if len(records) <= max(captioned.ks):
        console.print(
            f"--eval-data: R@K from K = {len(records)} on is left out: that takes every candidate",
            highlight=False,
            soft_wrap=True,
        )

    def measure(model: FastGoalModel | Caft) -> tuple[float, dict[str, float]]:
        values = _values(evaluate_set(model, captioned, published=published))
        return values["mean_r1"], values

    return Evaluation(records_digest(records), measure)


def _values(found: Evaluated) -> dict[str, float]:
    ways = ("text_to_image", "image_to_text")
    values = {"mean_r1": sum(getattr(found.retrieval, way)[1] for way in ways) / len(ways)}
    return values | {f"{way}_r{k}": r for way in ways for k, r in found.recalls(way).items()}

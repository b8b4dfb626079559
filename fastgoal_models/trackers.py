"""Who is told of each step and each evaluation: the screen always, trackers if asked.

TensorBoard and Weights & Biases are imported when they are asked for. `log.jsonl` and `eval.jsonl`
are the record of a run; these only show it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from .errors import UserError
from .progress import StepPrinter
from .training import EvalRecord, StepRecord

Tell = Callable[[StepRecord | EvalRecord], None]
"""an `on_step` and `on_eval`"""
Tracker = AbstractContextManager[Tell]
"""a `with` that gives one"""


class TensorBoard:
    """Writes each step below `out/tensorboard`; what a resumed run makes again replaces the old.

    Raises UserError where tensorboard is not installed.
    """

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UserError(f"--tensorboard: {error}. Fix: pip install tensorboard") from error
        self.out, self.make_writer = Path(out), SummaryWriter
        self.writer: SummaryWriter | None = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def __call__(self, record: StepRecord | EvalRecord) -> None:
        if self.writer is None:  # only now is it known where the run goes on
            folder = str(self.out / "tensorboard")
            self.writer = self.make_writer(folder, purge_step=record.step)
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)


class WeightsAndBiases:
    """Sends each step to W&B, as one run also when it is resumed (`out/wandb-run` names it).

    W&B's own environment variables apply; without WANDB_PROJECT the project is "fastgoal". It takes
    no step twice: what a resumed run makes again keeps the values of the first time.

    Args:
        out: the run's folder.
        notes: shown as the run's configuration, as they are when it starts.
        resume: go on with the W&B run of this folder.

    Raises UserError where wandb is not installed, or (in `with`) will not start.
    """

    def __init__(self, out: Path, notes: Mapping[str, Any], resume: bool) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError(f"--wandb: {error}. Fix: pip install wandb") from error
        self.wandb: Any = wandb
        self.out, self.notes, self.resume = Path(out), notes, resume
        self.run: Any = None

    def __enter__(self) -> WeightsAndBiases:
        name = self.out / "wandb-run"
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.resume and name.is_file()):
            name.write_text(secrets.token_hex(4), "utf-8")
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fastgoal"),
                name=self.out.resolve().name,
                dir=str(self.out),
                id=name.read_text("utf-8"),
                resume="allow",
                config=json.loads(json.dumps(dict(self.notes), default=str)),  # paths as text
            )
        except self.wandb.Error as error:
            raise UserError(f"--wandb: W&B did not start: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.run.finish(exit_code=0 if kind is None else 1)

    def __call__(self, record: StepRecord | EvalRecord) -> None:
        self.run.log(scalars(record), step=record.step)


def scalars(record: StepRecord | EvalRecord) -> dict[str, float]:
    """A record's numbers by name, what was not measured left out."""
    if isinstance(record, EvalRecord):
        group = "eval_average" if record.averaged else "eval"
        return {f"{group}/{name}": value for name, value in record.values.items()}
    row = record._asdict()
    losses = row.pop("losses")
    del row["step"], row["total_steps"]
    return losses | {name: value for name, value in row.items() if value is not None}


def trackers(
    out: Path, notes: Mapping[str, Any], *, tensorboard: bool, wandb: bool, resume: bool
) -> list[Tracker]:
    """Those asked for, not started yet: a missing package should not wait for the data."""
    found: list[Tracker] = [TensorBoard(out)] if tensorboard else []
    if wandb:
        found.append(WeightsAndBiases(out, notes, resume))
    return found


@contextmanager
def watched(console: Console, others: Sequence[Tracker]) -> Iterator[Tell]:
    """An `on_step` and `on_eval` for `train` that tells the screen, and then `others`."""
    with ExitStack() as stack:
        printer = stack.enter_context(StepPrinter(console))
        everyone = [stack.enter_context(who) for who in others]

        def tell(record: StepRecord | EvalRecord) -> None:
            if isinstance(record, EvalRecord):
                _print_evaluation(console, record)
            else:
                printer(record)
            for who in everyone:
                who(record)

        yield tell


def _print_evaluation(console: Console, record: EvalRecord) -> None:
    values = "  ".join(f"{name} {value:.4g}" for name, value in record.values.items())
    what = " of the moving average" if record.averaged else ""
    console.print(
        f"evaluation{what} at step {record.step}/{record.total_steps}  {values}",
        highlight=False,
        soft_wrap=True,
    )

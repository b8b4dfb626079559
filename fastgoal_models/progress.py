"""What a person watching a run sees: a bar, and now and then a line with every loss."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .training import StepRecord


def counting(console: Console, what: str) -> Progress:
    """A bar for things that are counted, with the time that is left; only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{what}, left"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class StepPrinter:
    """Give it to `train` as `on_step`, inside a `with`: one line every `every` steps, and a bar.

    The bar needs a terminal; the lines also go to a file or a pipe. Steps per second are those
    since the line before.
    """

    def __init__(self, console: Console, every: int = 10) -> None:
        self.console, self.every = console, every
        self.bar = counting(console, "steps")
        self.task = self.bar.add_task("fine-tuning", total=None)
        self.since: tuple[int, float] | None = None

    def __enter__(self) -> StepPrinter:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def __call__(self, record: StepRecord) -> None:
        now = time.perf_counter()
        if self.since is None:
            self.since = (record.step - 1, now - record.seconds)
        self.bar.update(self.task, completed=record.step, total=record.total_steps)
        if record.step % self.every and record.step != record.total_steps and record.step != 1:
            return
        first, began = self.since
        rate = (record.step - first) / max(now - began, 1e-9)
        self.since = (record.step, now)
        parts = "  ".join(
            f"{name.removesuffix('_loss')} {value:.4f}" for name, value in record.losses.items()
        )
        skipped = f"  {record.skipped_steps} skipped" if record.skipped_steps else ""
        width = len(str(record.total_steps))
        self.console.print(
            f"step {record.step:>{width}}/{record.total_steps}  {parts}  "
            f"lr {record.learning_rate:.1e}  {rate:.2f} steps/s{skipped}",
            highlight=False,
            soft_wrap=True,
        )

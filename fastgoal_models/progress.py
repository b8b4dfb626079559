"""What a person watching a run sees: a bar, and now and then a line with every loss."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .training import StepRecord

_SECONDS_A_LINE = 60.0  # where there is no terminal


def counting(console: Console, what: str) -> Progress:
    """A bar for things that are counted, with the time that is left.

    Outside of a terminal, in the file of a job, a plain line a minute instead; none before the
    first minute is over.
    """
    if not console.is_terminal:
        return _Lines(console, what)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{what}, left"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )


class _Lines(Progress):
    """What a bar shows, as a line that is printed at most once a minute."""

    def __init__(self, console: Console, what: str) -> None:
        super().__init__(console=console, disable=True)
        self.what = what
        self.due = self.get_time() + _SECONDS_A_LINE
        self.since: dict[TaskID, tuple[float, float]] = {}  # when the pace began, and at how many

    def add_task(self, *arguments: Any, **options: Any) -> TaskID:
        task = super().add_task(*arguments, **options)
        self._begin(task)
        return task

    def update(self, task_id: TaskID, **changes: Any) -> None:
        task = self._tasks[task_id]
        begins = task.total is None and changes.get("total") is not None
        super().update(task_id, **changes)
        if begins:  # what an earlier run did is no part of the pace
            self._begin(task_id)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _begin(self, task_id: TaskID) -> None:
        self.since[task_id] = (self.get_time(), self._tasks[task_id].completed)

    def _say(self, task_id: TaskID) -> None:
        with self._lock:  # pictures are counted in threads
            now, task = self.get_time(), self._tasks[task_id]
            if now < self.due or task.finished:
                return
            self.due = now + _SECONDS_A_LINE
        began, first = self.since[task_id]
        rate = (task.completed - first) / max(now - began, 1e-9)
        said = f"{task.description}: {task.completed:.0f}"
        said += "" if task.total is None else f"/{task.total:.0f}"
        said += f" {self.what}, {rate:.3g} {self.what}/s"
        if task.total is not None and rate > 0:
            said += f", {timedelta(seconds=round((task.total - task.completed) / rate))} left"
        self.console.print(said, highlight=False, markup=False, soft_wrap=True)


class StepPrinter:
    """Give it to `train` as `on_step`, inside a `with`: one line every `every` steps, and a bar.

    The lines also go to a file or a pipe. Steps per second are those since the line before.
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

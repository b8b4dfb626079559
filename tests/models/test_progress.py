"""A long run tells how far it is, also where there is no terminal for a bar."""

import io

import pytest
from rich.console import Console

from fastgoal_models.progress import StepPrinter, counting
from fastgoal_models.training import StepRecord


@pytest.fixture
def clock(monkeypatch):
    """The seconds that progress reads, which the test sets."""
    now = [1000.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    return now


def shown() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=60), file


def test_a_line_a_minute_with_the_time_left(clock):
    console, file = shown()
    with counting(console, "images") as bar:
        task = bar.add_task("local pairs [1]", total=None)
        for number in range(1, 401):
            clock[0] += 0.5
            bar.update(task, completed=number, total=1000)
    assert file.getvalue().splitlines() == [
        "local pairs [1]: 120/1000 images, 2 images/s, 0:07:20 left",
        "local pairs [1]: 240/1000 images, 2 images/s, 0:06:20 left",
        "local pairs [1]: 360/1000 images, 2 images/s, 0:05:20 left",
    ]


def test_nothing_of_what_takes_less(clock):
    console, file = shown()
    with counting(console, "images") as bar:
        task = bar.add_task("encoding", total=59)
        for _ in range(59):
            clock[0] += 1
            bar.advance(task)
    assert file.getvalue() == ""


def test_without_a_total_there_is_no_time_left(clock):
    console, file = shown()
    with counting(console, "images") as bar:
        task = bar.add_task("reading", total=None)
        clock[0] += 100
        bar.update(task, completed=5)
        clock[0] += 100
        bar.advance(task, 5)
    assert file.getvalue().splitlines() == [
        "reading: 5 images, 0.05 images/s", "reading: 10 images, 0.05 images/s",
    ]  # fmt: skip


def test_the_pace_of_a_resumed_run_is_its_own(clock):
    console, file = shown()
    with StepPrinter(console, every=10**6) as printer:
        for step in range(901, 960):
            clock[0] += 2
            printer(StepRecord(step, 1000, {"loss": 1.0}, 1.0, 1.0, 1e-3, 2.0))
    # 30 steps, in 58 seconds since the first one.
    assert file.getvalue().splitlines() == [
        "fine-tuning: 930/1000 steps, 0.5 steps/s, 0:02:20 left"
    ]

"""Ctrl-C: the loop finishes its step, and its readers of images stay for that."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag; the second one interrupts as always."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set signal handlers
        return
    before = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def ignore_interrupts(_worker: int) -> None:
    # A terminal sends Ctrl-C to every process; the loop still needs its readers for the last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

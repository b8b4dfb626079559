"""The `fastgoal` command, a module for each of its commands; `app` puts them together.

Exit codes: 0 done, 1 `doctor` or `bench` found our results wrong, 2 the user's input is at fault,
130 Ctrl-C.

A command imports what it runs inside its own body: PyTorch and open_clip take seconds, which --help
should not wait for, and `fastgoal doctor` must work where one of them is missing or broken.
"""

from .app import app

__all__ = ["app"]

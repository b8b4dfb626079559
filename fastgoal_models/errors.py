"""What the `fastgoal` command shows in one line instead of a traceback.

This module imports nothing, so that the command can name these errors, and still show its help,
without waiting for PyTorch.
"""

from __future__ import annotations


class UserError(Exception):
    """The user can mend it: an option, a file, a package. The message says what and how."""


class ConfigError(UserError, ValueError):
    """An option makes no sense, or can not be used here; the message names it."""

"""Replacing methods of other people's classes, and putting them back."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Method = Callable[..., Any]


@dataclass(frozen=True)
class Patch:
    """One method to replace: of `class_name` in `module`, by `replace(original method)`."""

    module: str
    class_name: str
    method: str
    replace: Callable[[Method], Method]


@dataclass
class PatchSet:
    """A table of patches that is applied and undone as one.

    Methods are replaced, not classes: subclasses, names that were imported before, instances that
    exist, `isinstance` and pickles all go on working.
    """

    package: str
    patches: tuple[Patch, ...]
    _originals: list[tuple[type, str, Method]] = field(default_factory=list)

    def apply(self) -> None:
        """Replace every method of the table; does nothing when it is applied already.

        Raises:
            ImportError: the package is not installed.
        """
        if self._originals:
            return
        if importlib.util.find_spec(self.package) is None:
            raise ImportError(f"{self.package} is not installed, so there is nothing to patch")
        found = []
        for patch in self.patches:
            # An older release may not have the model; its package is then missing.
            if importlib.util.find_spec(patch.module.rpartition(".")[0]) is not None:
                owner = getattr(importlib.import_module(patch.module), patch.class_name)
                found.append((patch, owner, vars(owner)[patch.method]))
        # After all of them are found, so that a failure leaves nothing half patched.
        for patch, owner, original in found:
            self._originals.append((owner, patch.method, original))
            setattr(owner, patch.method, patch.replace(original))

    def undo(self) -> None:
        """Put the very same functions back; does nothing when nothing is applied."""
        while self._originals:
            owner, method, original = self._originals.pop()
            setattr(owner, method, original)

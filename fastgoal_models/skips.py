"""What is left out of a data set: each record with its reason, and their counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SkipReport:
    """What was left out of a data set and why: counts, and the first few names, per reason."""

    read: int = 0
    """records that are kept"""
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    hint: str | None = None
    """what to do about it, where that is known"""

    NAMES_KEPT = 3

    @property
    def skipped(self) -> int:
        return sum(self.counts.values())

    def add(self, reason: str, name: str) -> None:
        """Count one more, and keep its name if it is among the first of its reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < self.NAMES_KEPT:
            kept.append(name)

    def __str__(self) -> str:
        if not self.counts:
            return f"{self.read} records read, none skipped"
        lines = [f"{self.read} records read, {self.skipped} skipped:"]
        for reason, count in self.counts.items():
            more = ", …" if count > len(self.names[reason]) else ""
            lines.append(f"  {count} × {reason}: {', '.join(self.names[reason])}{more}")
        return "\n".join([*lines, self.hint] if self.hint else lines)


class Unusable(Exception):
    """A record that is left out: why, and what to call it."""

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason, self.name = reason, name

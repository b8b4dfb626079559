"""Said wherever a model's weights are nobody's, in one colour: a result of it means nothing."""

from __future__ import annotations

from rich.console import Console


def warn_of_random_weights(console: Console, so: str) -> None:
    """`so`: what follows, a whole sentence after the colon."""
    console.print(f"[yellow]The weights are random: {so}[/]", highlight=False, soft_wrap=True)

"""Pictures whose texts may be in any script: drawn in installed fonts that have their characters.

Matplotlib's own font has no Chinese, Devanagari or Thai. Given a list of families it takes each
character from the first that has it, but does not look for one. Fonts are only looked through when
a character is missing.
"""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from rich.cells import cell_len

_EXAMPLES = 5  # characters that a warning shows

Codes = np.ndarray[Any, Any]
"""uint32, the code points that a font has"""


class MissingFontWarning(UserWarning):
    """No installed font has some characters of a picture; the message names them and a font."""


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure, each character of it in a font that has it; the ending chooses the format.

    What no installed font has is drawn as boxes, of which one MissingFontWarning a script tells.
    """
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    families = families_for("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_fontfamily(families)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # One for each character and each time that it is measured.
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from", UserWarning)
        figure.savefig(path, dpi=dpi)


def families_for(text: str) -> list[str]:
    """Font families that between them have the characters of a text, matplotlib's own first."""
    families = list(rcParams["font.family"])
    missing = {character for character in text if _is_drawn(character)}
    for family in families:
        # A list: a mere name would be read as fontconfig's pattern, in which a dash means a size.
        path = font_manager.findfont(font_manager.FontProperties(family=[family]))
        missing -= _covered(_codes(path), missing)
    installed = _installed() if missing else {}
    while missing:
        found = {name: _covered(codes, missing) for name, codes in installed.items()}
        best = max(found, key=lambda name: len(found[name]), default="")
        if not found.get(best):
            break
        families.append(best)
        missing -= found[best]
    _tell(missing)
    return families


def wrap(text: str, columns: int, **options: Any) -> list[str]:
    """`textwrap.wrap`, but Chinese and other wide characters take two columns each."""
    return textwrap.wrap(text, max(1, columns * len(text) // max(cell_len(text), 1)), **options)


def _is_drawn(character: str) -> bool:
    """Not so: controls, joiners, line ends, and what only chooses a variant of the one before."""
    return unicodedata.category(character)[0] != "C" and not "\ufe00" <= character <= "\ufe0f"


def _covered(codes: Codes, characters: set[str]) -> set[str]:
    some = sorted(characters)
    has = np.isin(np.array([ord(character) for character in some], np.uint32), codes)
    return {character for character, here in zip(some, has, strict=True) if here}


@cache
def _installed() -> dict[str, Codes]:
    """What each installed family has, by name, in its regular face."""
    manager = font_manager.fontManager
    # Matplotlib's list is older than a font that was installed since.
    for path in set(font_manager.findSystemFonts()) - {font.fname for font in manager.ttflist}:
        with suppress(OSError, RuntimeError, ValueError, NotImplementedError):
            manager.addfont(path)

    def irregular(font: Any) -> float:
        return manager.score_style("normal", font.style) + manager.score_weight(400, font.weight)

    regular: dict[str, Any] = {}
    for font in sorted(manager.ttflist, key=irregular):
        # The font of last resort has a box for everything.
        if not font.name.lstrip(".").replace(" ", "").startswith("LastResort"):
            regular.setdefault(font.name, font)
    return {
        name: _codes(font.fname, getattr(font, "index", 0))
        for name, font in sorted(regular.items())
    }


@cache
def _codes(path: str, face: int = 0) -> Codes:
    """What a font file has; nothing where it can not be read."""
    try:
        font = FT2Font(path, face_index=face) if face else FT2Font(path)
    except (OSError, RuntimeError):
        return np.empty(0, np.uint32)
    return np.fromiter(font.get_charmap(), np.uint32)


_told: set[str] = set()


def _tell(missing: set[str]) -> None:
    """Warn of the scripts that no font has, of each once."""
    scripts: dict[tuple[str, str], list[str]] = {}
    for character in sorted(missing):
        scripts.setdefault(_script(character), []).append(character)
    for (script, font), characters in scripts.items():
        if script in _told:
            continue
        _told.add(script)
        more = ", …" if len(characters) > _EXAMPLES else ""
        warnings.warn(
            f"no installed font has {', '.join(characters[:_EXAMPLES])}{more} ({script}): they "
            f"are drawn as boxes. Fix: install a font that has them, such as {font}",
            MissingFontWarning,
            stacklevel=4,
        )


def _script(character: str) -> tuple[str, str]:
    """What a character belongs to, and a font for it."""
    kind = unicodedata.category(character)
    if kind[0] != "S" and unicodedata.east_asian_width(character) in "WF":
        return "Chinese, Japanese or Korean", "Noto Sans CJK"
    if kind[0] in "LMN":
        script = unicodedata.name(character, "other").split()[0].capitalize()
        return script, f"Noto Sans {script}"
    return "signs and emoji", "Noto Emoji or Noto Sans Symbols"

"""Pictures with texts in any script: which fonts are taken, and what is said where none has it."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: models)")

from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from PIL import Image

from fastgoal_models import fonts
from fastgoal_models.fonts import MissingFontWarning, families_for, save_figure, wrap
from fastgoal_models.search import Hit
from fastgoal_models.sheets import draw_sheet

DEFAULT = list(rcParams["font.family"])


def codes(text: str) -> np.ndarray:
    return np.array(sorted(map(ord, text)), np.uint32)


@pytest.fixture
def installed(monkeypatch) -> dict[str, np.ndarray]:
    """The families that are installed besides matplotlib's own, none at first."""
    families: dict[str, np.ndarray] = {}
    monkeypatch.setattr(fonts, "_installed", lambda: families)
    monkeypatch.setattr(fonts, "_told", set())
    return families


def told(text: str) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        families_for(text)
    assert all(warning.category is MissingFontWarning for warning in found)
    return [str(warning.message) for warning in found]


def test_fonts_are_looked_through_only_when_a_character_is_missing(monkeypatch):
    def look():
        raise AssertionError("looked through")

    monkeypatch.setattr(fonts, "_installed", look)
    assert families_for("A café,\n“Ωμέγα”, привет. \u2764\ufe0f\u200d") == DEFAULT
    assert families_for("") == DEFAULT
    with pytest.raises(AssertionError, match="looked through"):
        families_for("猫")


def test_the_fewest_families_that_have_it_all(installed):
    installed |= {"Kana": codes("ねこ"), "Han": codes("猫ね犬"), "Thai": codes("แมว")}
    assert families_for("猫") == [*DEFAULT, "Han"]
    assert families_for("a 猫犬ねこ") == [*DEFAULT, "Han", "Kana"]
    assert families_for("แมว ねこ") == [*DEFAULT, "Thai", "Kana"]
    installed["Also Han"] = codes("猫ね犬")
    assert families_for("猫犬") == [*DEFAULT, "Han"]  # of equal ones the first


def test_what_no_font_has_is_told_once_a_script(installed):
    installed["Thai"] = codes("แมว")
    assert told("แมว") == []
    (said,) = told("a 猫。「犬」 แมว")
    assert said == (
        "no installed font has 。, 「, 」, 犬, 猫 (Chinese, Japanese or Korean): they are drawn as "
        "boxes. Fix: install a font that has them, such as Noto Sans CJK"
    )
    assert told("鳥") == []
    (said,) = told("बिल्ली鳥")
    assert "(Devanagari)" in said and said.endswith("such as Noto Sans Devanagari")
    (said,) = told("🦤🪿")
    assert "signs and emoji" in said and "Noto Emoji" in said
    assert told("\u200d\ufe0f\n\t") == []


def make_font(path, family: str, text: str) -> None:
    """A font whose every character is one solid square."""
    pytest.importorskip("fontTools")
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def square(side: int):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, side), (side, side), (side, 0)):
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    names = {ord(character): f"u{ord(character):04X}" for character in text}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({".notdef": square(10), **{name: square(900) for name in names.values()}})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names.values()), (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def square_font(tmp_path, monkeypatch):
    """A font that was installed after matplotlib made its list."""
    path = tmp_path / "squares.ttf"
    make_font(path, "Squares", "猫犬")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path), "gone.ttf"])
    fonts._installed.cache_clear()
    monkeypatch.setattr(fonts, "_told", set())
    yield path
    fonts._installed.cache_clear()
    manager._findfont_cached.cache_clear()


def test_a_sheet_is_drawn_in_a_font_that_has_its_text(square_font, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "猫.png")
    hits = [Hit(tmp_path / "猫.png", 0.5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_sheet("猫猫猫猫 cat", hits, tmp_path / "has.png")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            draw_sheet("鳥鳥鳥鳥 cat", hits, tmp_path / "has-not.png")
    (warning,) = found  # and no word of glyphs from matplotlib
    assert "鳥 (Chinese, Japanese or Korean)" in str(warning.message)
    dark = [
        (np.asarray(Image.open(tmp_path / name).convert("L")) < 40).sum()
        for name in ("has.png", "has-not.png")
    ]
    assert dark[0] > dark[1] + 300  # four squares that are filled


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_other_formats(square_font, tmp_path, ending):
    figure = Figure()
    figure.text(0.5, 0.5, "a 猫")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "new" / f"a.{ending}", dpi=50)
    assert (tmp_path / "new" / f"a.{ending}").stat().st_size > 500


def test_the_font_of_last_resort_and_broken_files_have_nothing(square_font, tmp_path, monkeypatch):
    (tmp_path / "broken.ttf").write_bytes(b"nothing")
    broken = SimpleNamespace(
        fname=str(tmp_path / "broken.ttf"), name="Broken", style="normal", weight=400
    )
    monkeypatch.setattr(
        font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, broken]
    )
    found = fonts._installed()
    assert found["Squares"].tolist() == codes("猫犬").tolist() and found["Broken"].size == 0
    assert not any("Last Resort" in name for name in found)


def test_wide_characters_take_two_columns():
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("猫" * 10, 8) == ["猫" * 4, "猫" * 4, "猫" * 2]
    assert wrap("", 8) == []

"""Fonts for the texts of figures."""

import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import vitscope as vs
from vitscope.views import figure, fonts, scene

UNKNOWN = "\U0010fffd"  # of the private use area
CIRCLED = "\u24c6"  # a Q in a circle: STIX has it, DejaVu Sans lacks its bold form


def titled(text: str) -> scene.Scene:
    image = vs.InputImage(Image.new("RGB", (8, 8)), (0.0, 0.0, 8.0, 8.0))
    return scene.Scene([scene.Row([scene.Panel(image, None, text)], 1)], text)


def keep_fonts(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretend that no other fonts are installed."""
    entries = [entry for entry in font_manager.fontManager.ttflist if entry.name in names]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)


def rendered(text: str) -> np.ndarray:
    drawn = figure.draw(titled(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_plain_text_needs_no_other_font() -> None:
    assert fonts.font_families("Kätzchen 7,5 × ≤") == (matplotlib.rcParams["font.family"], frozenset())


def test_a_character_of_no_font_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_fonts(monkeypatch, "DejaVu Sans")
    drawn = figure.draw(titled(f"a{UNKNOWN}b猫"))
    assert [text.get_text() for text in drawn.texts].count(r"a\U0010fffdb\u732b") == 2
    rendered(f"a{UNKNOWN}b猫")


def test_a_font_that_has_a_missing_character_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_fonts(monkeypatch, "DejaVu Sans", "STIXGeneral")
    families, missing = fonts.font_families(f"a{CIRCLED}{UNKNOWN}")
    assert families == [*matplotlib.rcParams["font.family"], "STIXGeneral"]
    assert missing == {UNKNOWN}
    rendered(CIRCLED)

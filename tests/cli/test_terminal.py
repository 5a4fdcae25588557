"""Names and labels cannot act on the terminal: their control characters are printed as escapes."""

import dataclasses
import io
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import vitscope as vs
import vitscope.models
from tests.helpers.command_line import call, needs_bundled, printed_results
from vitscope.cli import tables, terminal
from vitscope.metrics.agreement import Agreement
from vitscope.views import figure, scene
from vitscope.views.plain_text import visible

pytestmark = needs_bundled

HOSTILE = {
    "colour": ("\x1b[31mRED", r"\x1b[31mRED"),
    "window title": ("a\x1b]0;owned\x07b", r"a\x1b]0;owned\x07b"),
    "C1": ("a\x9b31mb", r"a\x9b31mb"),
    "reversed": ("a\u202egpj.b", r"a\u202egpj.b"),
    "isolate": ("a\u2066b\u2069", r"a\u2066b\u2069"),
    "newline": ("a\nb", r"a\nb"),
    "carriage return": ("good\rbad", r"good\rbad"),
    "tab": ("a\tb", r"a\tb"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "delete": ("a\x7fb", r"a\x7fb"),
    "tag": ("a\U000e0041b", r"a\U000e0041b"),
    "surrogate": ("a\udc80b", r"a\udc80b"),
}
cases = pytest.mark.parametrize(("text", "escaped"), HOSTILE.values(), ids=HOSTILE)


def harmless(text: str) -> bool:
    return all(letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl") for letter in text)


@pytest.fixture(name="photo")
def small_photo_and_an_empty_folder(
    tmp_path: Path, chelsea: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> Image.Image:
    monkeypatch.chdir(tmp_path)
    return Image.fromarray(chelsea).resize((64, 48))


def load_a_model_named(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    """Give the model that the command line loads, and all of its classes, this name."""
    model = vs.load("vit-nano")
    hostile = dataclasses.replace(model, name=label, labels=tuple(f"{label} {i}" for i in range(len(model.labels))))
    monkeypatch.setattr(vitscope.models, "load", lambda *_, **__: hostile)


@cases
def test_control_characters_are_escaped(text: str, escaped: str) -> None:
    assert visible(text) == escaped


@pytest.mark.parametrize("text", ["cat", "é ß 猫 кот", "x² × 3 — „so“", "👩\u200d🚀", "می\u200cخواهم", ""])
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert visible(text) == text


@pytest.mark.slow
@cases
def test_names_of_photos_are_harmless(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, text: str, escaped: str
) -> None:
    photo.save(f"{text}.png")
    code, out, err = call(capsys, monkeypatch, "explain", f"{text}.png")
    assert (code, err) == (0, "")
    assert out.startswith(f"{escaped}.png, as vit-nano sees it:\n")
    assert out.endswith(f"\nwrote {escaped}-explain.png\n")
    assert harmless(out)


@pytest.mark.slow
@cases
def test_labels_and_model_names_are_harmless(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, text: str, escaped: str
) -> None:
    photo.save("cat.png")
    load_a_model_named(monkeypatch, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # fonts have no glyph for a control character
        code, out, err = call(capsys, monkeypatch, "explain", "cat.png", "--top-k", "2")
        assert (code, err) == (0, "")
        assert f"{escaped} " in out.splitlines()[2]
        assert len(out.splitlines()) == 7
        assert harmless(out)
        code, more, err = call(capsys, monkeypatch, "lime", "cat.png", "-n", "30", "--segments", "patches")
    assert code == 0
    assert harmless(more + err)
    assert escaped in more


@pytest.mark.slow
def test_json_is_harmless(photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(text for text, _ in HOSTILE.values() if "\udc80" not in text)
    photo.save("cat.png")
    load_a_model_named(monkeypatch, text)
    code, out, _ = call(capsys, monkeypatch, "explain", "cat.png", "--json")
    assert code == 0
    assert harmless(out)
    assert printed_results(out)[0]["predictions"][0]["label"].startswith(text)


@pytest.mark.slow
@cases
@pytest.mark.parametrize(
    "arguments", [["explain", "{}.png"], ["explain", "cat.png", "--out", "{}.jpg"], ["{}"]], ids=str
)
def test_errors_are_one_harmless_line(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str, escaped: str
) -> None:
    photo.save("cat.png")
    code, out, err = call(capsys, monkeypatch, *(argument.replace("{}", text) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert harmless(err)
    assert escaped in err or escaped.replace("\\", "\\\\") in err  # a library may quote it with repr


@pytest.mark.slow
def test_vitscopes_warnings_are_one_harmless_line(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitscope.errors import warn

    photo.save("cat.png")
    model = vs.load("vit-nano")

    def load(*_: Any, **__: Any) -> vs.VisionModel:
        warn("the file \x1b[31m\nb is unusual")
        return model

    monkeypatch.setattr(vitscope.models, "load", load)
    code, _, err = call(capsys, monkeypatch, "explain", "cat.png")
    assert (code, err) == (0, "vitscope: the file \\x1b[31m\\nb is unusual\n")


@cases
def test_a_table_keeps_its_rows(capsys: Any, text: str, escaped: str) -> None:
    tables.print_table((text, "n"), [(text, "1"), ("b", "2")], right=(1,))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert out.count(escaped) == 2


def test_the_stream_escapes_what_libraries_print() -> None:
    plain, terminal_like = io.StringIO(), io.StringIO()
    terminal_like.isatty = lambda: True  # type: ignore[method-assign]
    hostile = "\x1b[1mbold\x1b[0m \x1b]0;owned\x07 \x1b[2J \u202e\n"
    terminal.SafeStream(plain, terminal._STYLES).write(hostile)
    assert plain.getvalue() == "\\x1b[1mbold\\x1b[0m \\x1b]0;owned\\x07 \\x1b[2J \\u202e\n"
    terminal.SafeStream(terminal_like, terminal._STYLES).write(hostile)
    assert terminal_like.getvalue() == "\x1b[1mbold\x1b[0m \\x1b]0;owned\\x07 \\x1b[2J \\u202e\n"


@pytest.mark.slow
@cases
def test_figures_have_a_glyph_for_every_character(text: str, escaped: str) -> None:
    image = vs.InputImage(Image.new("RGB", (8, 8)), (0.0, 0.0, 8.0, 8.0))
    panels: list[Any] = [
        scene.Panel(image, None, text, lines=[text], regions=np.zeros((2, 2), int), numbers=[(0.0, 0.0, text)]),
        scene.Bars([text], [0.5], title=text),
        scene.Dots([text], [0.5], [(0.4, 0.6)], [0], text),
        scene.Matrix(np.ones((2, 2), int), [text, "b"], text, text, text),
        scene.Curves([text], [[0.5, 1.0]], [[0.1, 0.2]], text, text),
    ]
    drawing = scene.Scene([scene.Row(panels, len(panels))], text, text, [text], [text] * 5, text, text, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figure.draw(drawing)
        FigureCanvasAgg(drawn).draw()
    assert [letters.get_text() for letters in drawn.texts].count(escaped) >= 5
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", "".join(letters.get_text() for letters in drawn.texts))


def test_math_signs_in_a_title_are_letters() -> None:
    panel = scene.Panel(vs.InputImage(Image.new("RGB", (8, 8)), (0.0, 0.0, 8.0, 8.0)), None, "$x^$")
    drawn = figure.draw(scene.Scene([scene.Row([panel], 1)], "$x^$"))
    FigureCanvasAgg(drawn).draw()
    assert [text.get_text() for text in drawn.texts].count("$x^$") == 2


def test_an_agreement_of_almost_zero_has_no_minus(capsys):
    for count in (2, 6):
        square = np.full((count, count), -0.001)
        tables.print_agreement(Agreement(list("abcdef"[:count]), square, abs(square), abs(square), 0.2))
        out = capsys.readouterr().out
        assert "+0.00" in out
        assert "-0.00" not in out

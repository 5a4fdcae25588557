"""Names and labels cannot act on the terminal: their control characters are printed as escapes."""

import dataclasses
import io
import json
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
from tests.helpers.command_line import call
from vitscope.cli import output, terminal
from vitscope.models import bundled_path
from vitscope.views import figure, scene
from vitscope.views.plain_text import visible

pytestmark = pytest.mark.skipif(not (bundled_path("vit-nano") / "config.json").exists(), reason="no bundled model")

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
cases = pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)


def harmless(text: str) -> bool:
    return all(letter == "\n" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl") for letter in text)


@pytest.fixture(name="photo")
def photo_in_an_empty_folder(tmp_path: Path, chelsea: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    monkeypatch.chdir(tmp_path)
    return Image.fromarray(chelsea).resize((64, 48))


def labelled(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    """Every class of the model that the command line loads is called ``label``, and so is the model."""
    model = vs.load("vit-nano")
    hostile = dataclasses.replace(model, name=label, labels=tuple(f"{label} {i}" for i in range(len(model.labels))))
    monkeypatch.setattr(vitscope.models, "load", lambda *_, **__: hostile)


@cases
def test_one_function_spells_them_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("text", ["cat", "é ß 猫 кот", "x² × 3 — „so“", "👩\u200d🚀", "می\u200cخواهم", ""])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@cases
def test_a_photo_is_named_harmlessly(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    photo.save(f"{text}.png")
    code, out, err = call(capsys, monkeypatch, "explain", f"{text}.png")
    assert (code, err) == (0, "")
    assert out.startswith(f"{shown}.png, as vit-nano sees it:\n")
    assert out.endswith(f"\nwrote {shown}-explain.png\n")
    assert harmless(out)


@cases
def test_labels_and_model_names_are_harmless(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    photo.save("cat.png")
    labelled(monkeypatch, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # fonts have no glyph for a control character
        code, out, err = call(capsys, monkeypatch, "explain", "cat.png", "--top-k", "2")
        assert (code, err) == (0, "")
        assert f"{shown} " in out.splitlines()[2]
        assert len(out.splitlines()) == 5
        assert harmless(out)
        code, more, err = call(capsys, monkeypatch, "lime", "cat.png", "-n", "30", "--segments", "patches")
    assert code == 0
    assert harmless(more + err)
    assert shown in more


def test_json_escapes_them_itself(photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(text for text, _ in HOSTILE.values() if "\udc80" not in text)
    photo.save("cat.png")
    labelled(monkeypatch, text)
    code, out, _ = call(capsys, monkeypatch, "explain", "cat.png", "--json")
    assert code == 0
    assert harmless(out)
    assert json.loads(out)[0]["predictions"][0]["label"].startswith(text)


@cases
@pytest.mark.parametrize(
    "arguments", [["explain", "{}.png"], ["explain", "cat.png", "--out", "{}.jpg"], ["{}"]], ids=str
)
def test_errors_are_one_harmless_line(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str, shown: str
) -> None:
    photo.save("cat.png")
    code, out, err = call(capsys, monkeypatch, *(argument.replace("{}", text) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert harmless(err)
    assert shown in err or shown.replace("\\", "\\\\") in err  # a library may quote it with repr


def test_vitscopes_warnings_are_one_harmless_line(
    photo: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitscope.errors import warn

    photo.save("cat.png")
    model = vs.load("vit-nano")

    def load(*_: Any, **__: Any) -> vs.VisionModel:
        warn("the file \x1b[31m\nb is odd")
        return model

    monkeypatch.setattr(vitscope.models, "load", load)
    code, _, err = call(capsys, monkeypatch, "explain", "cat.png")
    assert (code, err) == (0, "vitscope: the file \\x1b[31m\\nb is odd\n")


@cases
def test_a_table_keeps_its_rows(capsys: Any, text: str, shown: str) -> None:
    output.print_table((text, "n"), [(text, "1"), ("b", "2")], right=(1,))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert out.count(shown) == 2


def test_what_other_commands_print_is_tamed_by_the_stream() -> None:
    """Text that reaches the stream unescaped, from a library for example."""
    plain, terminal_like = io.StringIO(), io.StringIO()
    terminal_like.isatty = lambda: True  # type: ignore[method-assign]
    hostile = "\x1b[1mbold\x1b[0m \x1b]0;owned\x07 \x1b[2J \u202e\n"
    terminal.SafeStream(plain, terminal._STYLES).write(hostile)
    assert plain.getvalue() == "\\x1b[1mbold\\x1b[0m \\x1b]0;owned\\x07 \\x1b[2J \\u202e\n"
    terminal.SafeStream(terminal_like, terminal._STYLES).write(hostile)
    assert terminal_like.getvalue() == "\x1b[1mbold\x1b[0m \\x1b]0;owned\\x07 \\x1b[2J \\u202e\n"


@cases
def test_figures_have_a_glyph_for_everything(text: str, shown: str) -> None:
    image = vs.InputImage(Image.new("RGB", (8, 8)), (0.0, 0.0, 8.0, 8.0))
    panels: list[Any] = [
        scene.Panel(image, None, text, lines=[text], regions=np.zeros((2, 2), int), numbers=[(0.0, 0.0, text)]),
        scene.Bars([text], [0.5], title=text),
        scene.Dots([text], [0.5], [(0.4, 0.6)], [0], text),
        scene.Matrix(np.ones((2, 2), int), [text, "b"], text, text, text),
        scene.Curves([text], [[0.5, 1.0]], [[0.1, 0.2]], text, text),
    ]
    whole = scene.Scene([scene.Row(panels, len(panels))], text, text, [text], [text] * 5, text, text, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figure.draw(whole)
        FigureCanvasAgg(drawn).draw()
    assert [letters.get_text() for letters in drawn.texts].count(shown) >= 5
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", "".join(letters.get_text() for letters in drawn.texts))

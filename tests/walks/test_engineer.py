"""An engineer's walk: why did the classifier say this, and a report to send."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder, printed_results

pytestmark = [pytest.mark.slow, needs_bundled]
photo = photo_in_an_empty_folder


def test_the_first_command_answers_on_one_screen_and_writes_a_small_figure(photo, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "explain", photo, "--target", "dog")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert lines[0] == "cat.png, as vit-nano sees it:"
    assert re.fullmatch(r"  cat +7\d\.\d% .*", lines[2])
    assert lines[-1] == "wrote cat-explain.png"
    with Image.open("cat-explain.png") as figure:
        assert figure.mode == "RGB"
        assert 1200 <= figure.width <= 2000
        assert figure.height <= 2000
    assert Path("cat-explain.png").stat().st_size < 1_500_000


def test_the_report_is_one_page_that_says_what_the_model_predicts_and_what_was_asked(photo, capsys, monkeypatch):
    code, out, err = call(capsys, monkeypatch, "explain", photo, "-t", "dog", "--out", "report.html", "--dpi", "60")
    assert (code, err, out.splitlines()[-1]) == (0, "", "wrote report.html")
    page = Path("report.html").read_text(encoding="utf-8")
    assert len(page) < 2_000_000
    assert re.search(r"What supports dog \(\d+\.\d%; predicted: cat, 7\d\.\d%\)", page)
    for text in ("cat.png", "vit-nano", "How to read", "weights_sha256", "preprocessing", "squash"):
        assert text in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]{0,80}', page) == []  # nothing is loaded from elsewhere
    assert page.count("data:image/png;base64,") == page.count("<img ") >= 2


def test_numbers_without_a_figure_have_one_shape(photo, capsys, monkeypatch):
    commands = [("explain",), ("rollout",), ("heads", "-t", "dog", "--by", "gradient"), ("lime", "-n", "120")]
    for command in commands:
        code, out, _ = call(capsys, monkeypatch, command[0], photo, *command[1:], "--no-figure", "--json")
        (entry,) = printed_results(out)
        assert (code, entry["image"], entry["model"], entry["figure"]) == (0, photo, "vit-nano", None)
    assert [path.name for path in Path().iterdir()] == [photo]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["explain", "cat.png", "--target", "tabby"], "'tabby' is not a label of this model: the nearest labels are"),
        (["explain", "cat.png", "--model", "vit_small_patch16_224"], "timm:vit_small_patch16_224"),
        (["explain", "cat.png", "--model", "hf-hub:timm/vit_tiny"], "timm:hf-hub:timm/vit_tiny"),
        (["explain", "cat.png", "--model", "last.ckpt"], "--weights"),
        (["explain", "cat.png", "--target", "cat", "--target", "dog"], "--target was passed 2 times"),
        (["explain", "cat.png", "--out", "report.jpg"], ".html"),
        (["explain", "missing.png"], "missing.png"),
        (["lime", "cat.png", "--num-samples", "0"], "at least 2"),
        (["compose", "cat.png"], "--object"),
    ],
)
def test_a_wrong_call_is_one_line_that_helps(photo, capsys, monkeypatch, arguments, answer):
    code, out, err = call(capsys, monkeypatch, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert answer in err
    assert [path.name for path in Path().iterdir()] == [photo]


def test_a_composition_fits_a_page_and_a_screen(photo, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, "compose", photo, "--object", "cat=105,20,235,200", "--out", "edited")
    assert code == 0
    table = out.splitlines()
    assert len(table) <= 40
    for path in Path("edited").glob("*.png"):
        with Image.open(path) as figure:
            assert figure.height <= 2.2 * figure.width, path
    shutil.rmtree("edited")


def test_improbable_classes_have_significant_digits_and_advice(photo, capsys, monkeypatch):
    arguments = ("lime", photo, "--target", "truck", "--segments", "patches", "-n", "150", "--no-figure")
    code, out, _ = call(capsys, monkeypatch, *arguments)
    assert code == 0
    assert "0.0000 " not in out
    assert "--output logit" in out

"""Reports of commands: one HTML file each, and refusals of other suffixes."""

import pytest

from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder

pytestmark = needs_bundled
photo = photo_in_an_empty_folder
COARSE = ("--dpi", "20")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["explain", "--method", "libra", "--method", "rollout"], ["completeness: error", "rank correlation"]),
        (["explain"], ["rollout, max of heads", "How to read"]),
        (["lime", "-n", "500"], ["R² of the linear fit on held-out samples", "Perturbation maps"]),
        (["rollout", "--evolution"], ["mean of heads, to layer 6 (index 5)", "Attention maps"]),
        (["compose", "--object", "cat=105,20,235,200", "--test", "size", "--scales", "0.5,1"], ["cat × 0.5"]),
    ],
)
def test_a_command_writes_one_page(photo, tmp_path, capsys, monkeypatch, arguments, texts):
    code, out, err = call(capsys, monkeypatch, arguments[0], photo, *arguments[1:], "--out", "a.html", *COARSE)
    assert (code, err) == (0, "")
    assert out.endswith("wrote a.html\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "cat.png"]
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    for text in ["cat.png", "vit-nano", "preprocessing", "weights_sha256", *texts]:
        assert text in page
    code, _, err = call(capsys, monkeypatch, arguments[0], photo, *arguments[1:], "--out", "a.html", *COARSE)
    assert (code, "exists already" in err) == (2, True)


@pytest.mark.parametrize(
    ("command", "formats"), [("explain", ".png, .pdf, .svg or .html"), ("attention", ".png, .pdf or .svg")]
)
def test_another_suffix_is_refused_with_a_list(photo, capsys, monkeypatch, command, formats):
    code, _, err = call(capsys, monkeypatch, command, photo, "--out", "a.jpg")
    assert (code, err) == (2, f"vitscope: --out is a.jpg: end the name in {formats}\n")
    code, _, err = call(capsys, monkeypatch, command, photo, "--cmap", "jet")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_the_options_of_figures_are_used(photo, tmp_path, capsys, monkeypatch):
    from PIL import Image

    for suffix in ("png", "svg", "pdf"):
        out = f"a.{suffix}"
        code, _, _ = call(capsys, monkeypatch, "rollout", photo, "-o", out, "--width", "5", "--dpi", "50", "--no-title")
        assert code == 0
    with Image.open("a.png") as image:
        assert image.width == 250
    assert "Attention rollout" not in (tmp_path / "a.svg").read_text()

"""Files of figures: formats, sizes, repeatable bytes, and pixels that stay as they were drawn."""

import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from skimage.data import chelsea

import vitscope as vs
from vitscope.views import figure_file
from vitscope.views.figure import draw, save_figure
from vitscope.views.figure_file import TOLERANCE
from vitscope.views.scene import Panel, Row, Scene
from vitscope.views.style import FigureStyle

FORMATS = ("png", "pdf", "svg")


@pytest.fixture
def content():
    photo = Image.fromarray(chelsea())
    image = vs.InputImage(photo, (0.0, 0.0, float(photo.width), float(photo.height)))
    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    return Scene(
        [Row([Panel(image, title="photo"), Panel(image, values, "$map$ <&>", signed=True)], 2)], "title", "note"
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_figure_gives_the_same_bytes(content, tmp_path, suffix):
    first, second = (save_figure(content, tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
    assert first == second
    assert not re.search(rb"CreationDate|<dc:date>", first)


def test_a_png_is_rgb_half_the_size_and_as_drawn(content, tmp_path):
    canvas = FigureCanvasAgg(draw(content))
    canvas.print_png(tmp_path / "matplotlib.png")
    path = save_figure(content, tmp_path / "figure.png")
    assert path.stat().st_size < 0.6 * (tmp_path / "matplotlib.png").stat().st_size
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    with Image.open(path) as image:
        assert image.mode == "RGB"
        difference = np.abs(np.asarray(image) - drawn)
    assert difference.max() <= TOLERANCE == 2
    assert difference.mean() < 1
    assert not difference[(drawn == 255).all(-1)].any(), "white stays white"


def test_the_width_is_that_of_the_page(content, tmp_path):
    style = FigureStyle(dpi=100, width=5)
    with Image.open(save_figure(content, tmp_path / "a.png", style=style)) as image:
        assert (image.width, round(image.info["dpi"][0])) == (500, 100)
        ratio = image.height / image.width
    svg = save_figure(content, tmp_path / "a.svg", style=style).read_text()
    width, height = map(float, re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups())
    assert width == pytest.approx(360)
    assert height / width == pytest.approx(ratio, abs=0.01)
    pdf = save_figure(content, tmp_path / "a.pdf", style=style).read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
    assert [float(side) for side in box.groups()] == pytest.approx([width, height], abs=0.1)
    assert b"/FontFile2" in pdf


def test_texts_of_an_svg_are_texts(content, tmp_path):
    svg = save_figure(content, tmp_path / "a.svg").read_text()
    assert "$map$ &lt;&amp;&gt;</text>" in svg


def test_a_png_of_too_many_pixels_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.setattr(figure_file, "MAX_PIXELS", 100_000)
    with pytest.raises(vs.CallError, match=r"1,000 × [\d,]+ pixels: lower --dpi or --width"):
        save_figure(content, tmp_path / "a.png", style=FigureStyle(dpi=100, width=10))
    assert not list(tmp_path.iterdir())

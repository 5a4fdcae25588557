"""The style of figures: its ranges, its colour maps, and figures without titles."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from vitscope.views.figure import draw, render
from vitscope.views.scene import Panel, Row, Scene
from vitscope.views.style import DIVERGING, SEQUENTIAL, FigureStyle, style_of

IMAGE = vs.InputImage(Image.new("RGB", (60, 40), "gray"), (0.0, 0.0, 60.0, 40.0))
VALUES = np.array([[-1, 0.0], [0.5, 1]], dtype=np.float32)
SCENE = Scene(
    [Row([Panel(IMAGE, VALUES, alpha=1.0, flat=True), Panel(IMAGE, VALUES, alpha=1.0, flat=True, signed=True)], 2)],
    "title",
    "note",
)


def lightness(name):
    """Return the luma of a colour map from its first to its last colour."""
    return matplotlib.colormaps[name](np.linspace(0, 1, 65))[:, :3] @ (0.299, 0.587, 0.114)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_map_becomes_steadily_lighter_or_darker(name):
    steps = np.diff(lightness(name))
    assert (steps > -0.01).all() or (steps < 0.01).all()


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_map_is_palest_in_the_middle(name):
    luma = lightness(name)
    assert abs(int(luma.argmax()) - 32) <= 1
    assert luma[32] > 0.8


def test_colour_maps_change_the_maps_that_they_fit():
    style = style_of(colormaps=["viridis_r", "PuOr"])
    plain, signed = style.applied_to(SCENE).rows[0].panels
    assert (plain.colormap, signed.colormap) == ("viridis_r", "PuOr")
    middle = np.asarray(render(signed, (60, 40)))[5, 45] / 255
    np.testing.assert_allclose(middle, matplotlib.colormaps["PuOr"](0.5)[:3], atol=0.01)
    lowest = np.asarray(render(plain, (60, 40)))[5, 5] / 255
    np.testing.assert_allclose(lowest, matplotlib.colormaps["viridis"](1.0)[:3], atol=0.01)
    only_plain = style_of(colormaps=["viridis"]).applied_to(SCENE).rows[0].panels
    assert [panel.colormap for panel in only_plain] == ["viridis", ""], "signed maps stay red and blue"


def test_legends_have_the_colours_of_the_maps():
    drawn = draw(SCENE, style_of(colormaps=["viridis", "PuOr"]))
    assert [axes.images[0].get_cmap().name for axes in drawn.axes[-2:]] == ["PuOr", "viridis"]


def test_the_bar_under_a_large_map_has_its_colours():
    large = replace(SCENE, rows=[Row(SCENE.rows[0].panels, 2, 3.0)])
    drawn = draw(large, style_of(colormaps=["viridis", "PuOr"]))
    bars = [axes.images[0].get_cmap().name for axes in drawn.axes if axes.get_label() == "colour bar"]
    assert bars == ["viridis", "PuOr", "PuOr", "viridis"], "under each map, and at the foot"


def test_a_figure_without_a_title_is_lower_and_says_the_same_otherwise():
    titled, bare = draw(SCENE), draw(SCENE, FigureStyle(title=False))
    assert {text.get_text() for text in titled.texts} - {text.get_text() for text in bare.texts} == {"title", "note"}
    assert bare.get_size_inches()[1] < titled.get_size_inches()[1] - 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpi": 5}, "--dpi is 5: pass 20 to 1200 pixels per inch"),
        ({"dpi": float("nan")}, "dpi"),
        ({"width": 0.5}, "--width is 0.5: pass 1 to 60 inches"),
        ({"colormaps": ["jet"]}, "--cmap is 'jet': choose a sequential map"),
        ({"colormaps": ["viridis", "magma"]}, "--cmap is 'viridis' and 'magma'"),
    ],
)
def test_wrong_values_are_refused_in_one_line(options, message):
    with pytest.raises(vs.CallError, match=message) as error:
        style_of(**options)
    assert "\n" not in str(error.value)

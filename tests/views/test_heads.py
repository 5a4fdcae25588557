"""A figure of one value per head: colours, numbers, scale."""

import matplotlib as mpl
import numpy as np
import pytest

import vitscope as vs
from vitscope.results.colours import SIGNED_COLORMAP
from vitscope.views import figure
from vitscope.views.heads import head_values

VALUES = np.array([[0.5, -0.25, 0.0], [0.001, 0.1, np.nan]])


def drawn_cells(values, **options):
    """Return the axes of the cells and of the colour bar."""
    cells, bar = figure.draw(head_values(values, title="Heads", **options)).axes
    return cells, bar


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_cells_have_the_numbers_of_their_heads():
    cells, bar = drawn_cells(VALUES, layers=[4, 5])
    assert texts(cells) == ["+0.50", "−0.25", "0", "0", "+0.10"]
    assert [text.get_position() for text in cells.texts] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert [label.get_text() for label in cells.get_yticklabels()] == ["4", "5"]
    assert [label.get_text() for label in cells.get_xticklabels()] == ["0", "1", "2"]
    assert (cells.get_ylabel(), cells.get_xlabel()) == ("layer", "head")
    assert [label.get_text() for label in bar.get_yticklabels()] == ["−0.50", "0", "+0.50"]


def test_red_supports_blue_opposes_and_a_missing_head_is_grey():
    (image,) = drawn_cells(VALUES)[0].images
    colours = image.to_rgba(image.get_array())
    colormap = mpl.colormaps[SIGNED_COLORMAP]
    np.testing.assert_allclose(colours[0, 0], colormap(1.0))
    np.testing.assert_allclose(colours[0, 1], colormap(0.25))
    np.testing.assert_allclose(colours[0, 2], colormap(0.5))
    assert colours[0, 0, 0] > colours[0, 0, 2]
    assert colours[0, 1, 2] > colours[0, 1, 0]
    red, green, blue, _ = colours[1, 2]
    assert max(red, green, blue) - min(red, green, blue) < 0.1
    assert red < 0.9


@pytest.mark.parametrize(
    ("factor", "scale", "first"),
    [
        (1e-6, "drop of the logit (×10⁻⁷)", "+5.0"),
        (1e6, "drop of the logit (×10⁵)", "+5.0"),
        (100, "drop of the logit", "+50"),
    ],
)
def test_small_and_large_numbers_name_their_power_of_ten(factor, scale, first):
    content = head_values(VALUES * factor, title="Heads", scale="drop of the logit")
    assert content.rows[0].panels[0].title == scale
    assert texts(figure.draw(content).axes[0])[0] == first


def test_equal_zeros_are_drawn():
    cells, bar = drawn_cells(np.zeros((2, 3)))
    assert texts(cells) == ["0"] * 6
    assert len(bar.images) == 1


@pytest.mark.parametrize("shape", [(1, 1), (6, 12), (12, 12), (24, 16)])
def test_cells_and_colour_bar_are_on_the_page(shape):
    drawn = figure.draw(head_values(np.ones(shape), title="Heads", note="note", scale="scale"))
    boxes = [axes.get_position() for axes in drawn.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not boxes[0].overlaps(boxes[1])
    width, height = drawn.get_size_inches()
    assert boxes[0].width * width / shape[1] == pytest.approx(0.56, abs=0.02)
    assert boxes[0].height * height / shape[0] == pytest.approx(0.36, abs=0.01)


@pytest.mark.parametrize("values", [np.full((2, 2), np.nan), np.array([[1.0, np.inf]])], ids=str)
def test_values_without_a_finite_number_are_refused(values):
    with pytest.raises(vs.CallError, match="finite numbers") as caught:
        head_values(values, title="Heads")
    assert "\n" not in str(caught.value)


def test_layers_of_another_length_are_refused():
    with pytest.raises(vs.CallError, match="layers lists 1 layers for 2 rows"):
        head_values(VALUES, title="Heads", layers=[3])

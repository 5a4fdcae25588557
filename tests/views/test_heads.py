"""Figures of one value per head, as cells and as frames of maps: colours, numbers, scale."""

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.families import ALL
from vitscope.results.colours import SIGNED_COLORMAP
from vitscope.views import figure, palette
from vitscope.views.heads import head_maps, head_values
from vitscope.views.scene import head_grid

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
    assert [label.get_text() for label in cells.get_yticklabels()] == ["5 (4)", "6 (5)"]
    assert [label.get_text() for label in cells.get_xticklabels()] == ["0", "1", "2"]
    assert (cells.get_ylabel(), cells.get_xlabel()) == ("layer (index)", "index of the head")
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


FAMILY = next(family for family in ALL if family.name == "transformers-dinov2-registers")  # 3 layers of 4 heads
PARAMETERS = {"by": "ablation", "replacement": "mean", "output": "logit"}


@pytest.fixture(scope="module")
def trace():
    return vs.capture(FAMILY.model(), FAMILY.pixels(2))


@pytest.fixture
def importance():
    """Return values for two images; the first image is not shown."""
    values = torch.full((2, 3, 4), 9.0)
    values[1] = torch.tensor([[0.5, -0.25, 0.0, 0.1], [torch.nan] * 4, [0.001, 0.2, -0.4, 0.3]])
    record = {"parameters": PARAMETERS, "outputs": [1.0, 2.5]}
    return vs.HeadImportance(values, (0, 1, 2), ("x", "tabby, tabby cat"), record)


def frames_of(drawn):
    """Return the colours and the numbers of the frames, in rows of four."""
    colours = [patch.get_facecolor() for patch in drawn.artists]
    places = [patch.get_bbox() for patch in drawn.artists]
    numbers = [
        next((text.get_text() for text in drawn.texts if text.get_text() and place.contains(*text.get_position())), "")
        for place in places
    ]
    return np.reshape(colours, (3, 4, 4)), np.reshape(numbers, (3, 4))


def test_every_map_has_a_frame_of_its_value(trace, importance):
    content = head_maps(trace, importance, index=1)
    for row, expected in zip(content.rows, head_grid(trace, index=1).rows, strict=True):
        for panel, alone in zip(row.panels, expected.panels, strict=True):
            np.testing.assert_array_equal(panel.values, alone.values)
    np.testing.assert_array_equal(content.frames.values, importance.values[1])
    colours, numbers = frames_of(figure.draw(content))
    assert numbers.tolist() == [["+0.50", "−0.25", "0", "+0.10"], [""] * 4, ["0", "+0.20", "−0.40", "+0.30"]]
    colormap = mpl.colormaps[SIGNED_COLORMAP]
    np.testing.assert_allclose(colours[0, 0], colormap(1.0))
    np.testing.assert_allclose(colours[0, 1], colormap(0.25))
    np.testing.assert_allclose(colours[2, 2], colormap(0.1))
    np.testing.assert_allclose(colours[0, 2], colormap(0.5))
    np.testing.assert_allclose(colours[1, 0], mpl.colors.to_rgba(palette.FRAME))
    assert colours[0, 0, 0] > colours[0, 0, 2]
    assert colours[0, 1, 2] > colours[0, 1, 0]


def test_the_texts_name_class_output_measure_and_scale(trace, importance):
    content = head_maps(trace, importance, index=1)
    model = trace.provenance["model"]
    assert content.title == f"What each head of {model} does for tabby (logit 2.5)"
    assert content.note == (
        "maps: attention of the readout; frames: importance of the head, measured with its output replaced by its mean "
        "over tokens"
    )
    scale = "drop of the logit without the head; red: the head supports tabby, blue: it opposes tabby"
    assert content.frames.scale == scale
    texts = [text.get_text() for text in figure.draw(content).texts]
    assert {"−0.50", "+0.50", scale, "layer (index)", "index of the head"} <= set(texts)


def test_a_gradient_is_an_estimate_and_a_contrast_a_difference(trace, importance):
    record = {"parameters": {**PARAMETERS, "by": "gradient", "output": "log_odds"}, "outputs": [0.0, -2.0]}
    result = dataclasses.replace(importance, targets=("x", "tabby, tabby cat − fox, kit fox"), provenance=record)
    content = head_maps(trace, result, index=1)
    assert content.title.endswith(" does for tabby − fox (log-odds difference −2)")
    assert content.frames.scale.startswith("estimated drop of the log-odds difference without the head; red: ")
    assert content.note.endswith("importance of the head, estimated by gradient")
    zero = dataclasses.replace(result, provenance={**record, "parameters": {**PARAMETERS, "replacement": "zero"}})
    assert head_maps(trace, zero, index=1).note.endswith("measured with its output replaced by zero")


def test_small_values_of_frames_name_their_power_of_ten(trace, importance):
    small = dataclasses.replace(importance, values=importance.values * 1e-6)
    content = head_maps(trace, small, index=1)
    assert content.frames.scale.startswith("drop of the logit without the head (×10⁻⁷); red: ")
    assert frames_of(figure.draw(content))[1][0, 0] == "+5.0"


def test_frames_and_maps_are_on_the_page(trace, importance):
    """Each map lies within its frame and has the proportions of its photo; no frame overlaps another."""
    drawn = figure.draw(head_maps(trace, importance, index=1))
    frames = [patch.get_bbox() for patch in drawn.artists]
    maps = [axes.get_position() for axes in drawn.axes[:12]]
    photo = trace.images[1].photo
    width, height = drawn.get_size_inches()
    for i, (frame, box) in enumerate(zip(frames, maps, strict=True)):
        assert 0 <= frame.x0 < box.x0 < box.x1 < frame.x1 <= 1
        assert 0 <= frame.y0 < box.y0 < box.y1 < frame.y1 <= 1
        assert box.width * width / (box.height * height) == pytest.approx(photo.width / photo.height, rel=1e-6)
        assert not any(frame.overlaps(following) for following in frames[i + 1 :])


def test_the_columns_of_a_swin_are_named_up_to_its_widest_layer(chelsea):
    swin = vs.load("swin-nano")
    content = head_maps(vs.capture(swin, chelsea), vs.head_importance(swin, chelsea, by="gradient"))
    assert [len(row.panels) for row in content.rows] == [4, 4, 8, 8, 8, 8, 16, 16]
    assert content.note.startswith("maps: attention that each patch receives in its window; ")
    drawn = figure.draw(content)
    names = {text.get_text(): text.get_position()[0] for text in drawn.texts if text.get_text().isdigit()}
    last = drawn.axes[sum(len(row.panels) for row in content.rows) - 1].get_position()
    assert last.x0 < names["15"] < last.x1


def test_values_of_another_model_are_refused(trace, importance):
    with pytest.raises(vs.CallError, match="the trace has 3 layers, the importance 2: use one model"):
        head_maps(trace, dataclasses.replace(importance, values=importance.values[:, :2], layers=(0, 1)))
    with pytest.raises(vs.CallError, match="up to 4 heads, the importance 3: use one model"):
        head_maps(trace, dataclasses.replace(importance, values=importance.values[..., :3]))
    with pytest.raises(vs.CallError, match="no head has a value"):
        head_maps(trace, dataclasses.replace(importance, values=importance.values * torch.nan))

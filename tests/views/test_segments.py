"""Figures of segments: supporting and opposing segments with their weights and intervals; methods side by side."""

import dataclasses
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import vitscope as vs
from tests.helpers.families import ALL
from vitscope.results import colours
from vitscope.views import figure, palette, scene, segments

FAMILY = next(family for family in ALL if family.name == "transformers-vit")


@pytest.fixture(scope="module", name="result")
def lime_result():
    return vs.lime(FAMILY.model(), FAMILY.pixels(1), segments="patches", num_samples=200, output="logit")


def test_the_scene_shows_the_first_two_classes(result):
    content = segments.supporting_regions(result, count=3)
    titles = [[panel.title for panel in row.panels] for row in content.rows]
    first, second = result.classes[:2]
    assert titles[1][:2] == [f"supports {first}", f"opposes {first}"]
    assert titles[2][:2] == [f"supports {second}", f"opposes {second}"]
    assert "200 samples" in content.note
    assert content.caption == scene.SIGNED_CAPTION


def test_lit_pixels_are_the_regions_of_the_result(result):
    content = segments.supporting_regions(result, count=3)
    np.testing.assert_array_equal(content.rows[1].panels[0].lit, result.regions(3).numpy())
    np.testing.assert_array_equal(content.rows[1].panels[1].lit, result.regions(3, sign="negative").numpy())


def test_supporting_segments_are_red_and_opposing_ones_blue(result):
    content = segments.supporting_regions(result, count=3)
    supporting, opposing, _ = content.rows[1].panels
    assert (supporting.outline, opposing.outline) == ("supports", "opposes")
    outlined = {
        name: {
            mpl.colors.to_hex(axes.collections[-1].get_edgecolor()[0]) for axes in figure.draw(scene_of(panel)).axes[:1]
        }
        for name, panel in (("supports", supporting), ("opposes", opposing))
    }
    assert outlined == {"supports": {palette.SUPPORTS}, "opposes": {palette.OPPOSES}}
    red, _, blue = mpl.colors.to_rgb(palette.SUPPORTS)
    assert red > blue
    low, high = (mpl.colormaps[colours.SIGNED_COLORMAP](end) for end in (0.1, 0.9))
    assert low[2] > low[0]
    assert high[0] > high[2]


def scene_of(panel):
    return scene.Scene([scene.Row([panel], 1)], "title", caption="")


def test_bars_are_coloured_by_sign():
    bars = scene.Bars(["a", "b"], [0.5, -0.2])
    axes = figure.draw(scene_of(bars)).axes[0]
    colours = [mpl.colors.to_hex(patch.get_facecolor()) for patch in axes.patches]
    assert colours == [palette.SUPPORTS, palette.OPPOSES]


def test_bars_have_the_weights_and_intervals_of_the_named_segments(result):
    bars = segments.supporting_regions(result, count=3).rows[1].panels[2]
    places = segments.segment_names(result, 3)
    assert list(bars.names) == list(places) == ["1", "2", "3", "a", "b", "c"]
    assert bars.values == result.weights[list(places.values())].tolist()
    assert [list(pair) for pair in bars.intervals] == result.intervals[list(places.values())].tolist()


def test_each_number_is_inside_its_segment(result):
    for panel in segments.supporting_regions(result).rows[1].panels[:2]:
        for row, column, name in panel.numbers:
            place = segments.segment_names(result)[name]
            assert result.index[round(row), round(column)] == place


def test_a_result_without_weights_is_drawn_too():
    """All weights are zero, so no segment supports or opposes the class."""
    model = FAMILY.model()
    for parameter in model.module.classifier.parameters():
        parameter.data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        result = vs.lime(model, FAMILY.pixels(1), segments="patches", num_samples=60)
    content = segments.supporting_regions(result)
    assert content.rows[1].panels[0].title.endswith("nothing")
    figure.draw(content)


@pytest.mark.slow
def test_the_figure_is_drawn_on_the_page(result, tmp_path):
    path = figure.save_figure(segments.supporting_regions(result), tmp_path / "lime.png")
    with Image.open(path) as image:
        assert image.width > 1000
    drawn = figure.draw(segments.supporting_regions(result))
    boxes = [axes.get_position() for axes in drawn.axes]
    assert all(-1e-9 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)


def test_faded_pixels_are_grey_and_lit_pixels_unchanged():
    photo = Image.new("RGB", (20, 10), (200, 40, 40))
    lit = np.array([[True, False]])
    panel = scene.Panel(vs.InputImage(photo, (0.0, 0.0, 20.0, 10.0)), lit=lit)
    drawn = np.asarray(figure.render(panel, (20, 10)))
    assert drawn[5, 4].tolist() == [200, 40, 40]
    assert len(set(drawn[5, 15].tolist())) == 1


def written(content):
    return {text.get_text() for text in figure.draw(content).texts}


def test_the_agreement_of_three_maps_is_a_matrix_and_that_of_two_a_number(result):
    rollout = vs.rollout(FAMILY.model(), FAMILY.pixels(1))
    negative = dataclasses.replace(rollout, values=-rollout.values)
    results, names = [rollout, negative, result], ["rollout", "negative", "lime"]
    alike = vs.agreement(results, names=names)
    content = segments.side_by_side(results, names, title="three", agreement=alike)
    (cells,) = content.rows[-1].panels
    assert cells.row_names == ["rollout  1", "negative  2", "lime  3"]
    assert cells.column_names == ["1", "2", "3"]
    assert np.isnan(np.diag(cells.values)).all()
    assert cells.values[0, 1] == cells.values[1, 0] == pytest.approx(-1)
    assert cells.values[2, 0] == pytest.approx(alike.rank_correlation[2, 0])
    drawn = figure.draw(content)
    axes = next(axes for axes in drawn.axes if "lime  3" in [label.get_text() for label in axes.get_yticklabels()])
    box = axes.get_position()
    assert box.width * drawn.get_size_inches()[0] / 3 == pytest.approx(0.56, abs=0.02)
    renderer = FigureCanvasAgg(drawn).get_renderer()
    labels = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert min(label.x0 for label in labels) >= 0, "the names are on the page"
    pair = segments.side_by_side(
        results[:2], names[:2], title="two", agreement=vs.agreement(results[:2], names=names[:2])
    )
    assert (len(pair.rows), pair.note) == (1, "rank correlation of the maps: −1.00")


def test_constant_maps_have_no_agreement():
    rollout = vs.rollout(FAMILY.model(), FAMILY.pixels(1))
    constant = dataclasses.replace(rollout, values=torch.ones_like(rollout.values))
    for count in (2, 3):
        results, names = [constant] * count, [str(number) for number in range(count)]
        content = segments.side_by_side(results, names, title="", agreement=vs.agreement(results, names=names))
        assert (len(content.rows), content.note) == (1, "")


def test_signed_and_unsigned_maps_have_their_own_legends(result):
    rollout = vs.rollout(FAMILY.model(), FAMILY.pixels(1))
    mixed = segments.side_by_side([result, rollout], ["lime", "rollout"], title="two")
    panels = [panel for row in mixed.rows for panel in row.panels]
    assert [panel.title for panel in panels] == ["photo", "lime", "rollout"]
    assert [panel.signed for panel in panels] == [False, True, False]
    assert mixed.caption == scene.UNSIGNED_CAPTION
    assert written(mixed) >= {
        "opposes",
        "supports",
        f"{scene.SIGNED_CAPTION}; {scene.PALE_CAPTION}",
        scene.UNSIGNED_CAPTION,
    }
    signed = segments.side_by_side([result, result], ["one", "two"], title="two")
    assert signed.caption == scene.SIGNED_CAPTION
    assert written(signed) >= {"opposes", "supports", f"{scene.SIGNED_CAPTION}; {scene.PALE_CAPTION}"}
    assert scene.UNSIGNED_CAPTION not in written(signed)


def test_regions_are_limited_to_the_pixels_of_a_panel():
    regions = np.arange(300 * 400).reshape(300, 400)
    assert figure._limit_cells(regions, (40, 30)).shape == (30, 40)
    assert figure._limit_cells(regions, (1000, 1000)).shape == (300, 400)

"""Figures of artefact tokens: what they show and say."""

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.planted_artefacts import BLOCK, NEURON, PLAIN, Planted, planted
from vitscope.views.artefacts import artefact_scene, register_scene
from vitscope.views.charts import BINS
from vitscope.views.figure import draw, save_figure
from vitscope.views.scene import Curves, Histogram, Panel, Row, Scene

pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module")
def example() -> Planted:
    return planted()


def test_the_artefacts_are_marked_and_the_valley_is_drawn(example: Planted, tmp_path) -> None:
    result = vs.artefact_tokens(example.model, example.pixels)
    scene = artefact_scene(result, index=1)
    photo, norms, attention = scene.rows[0].panels
    histogram, curves = scene.rows[1].panels
    assert isinstance(photo, Panel)
    assert tuple(photo.marks) == PLAIN
    assert photo.title == "4 artefacts"
    assert np.array_equal(norms.values, result.norms[1, 2, 5:].view(8, 12).numpy())
    assert np.array_equal(attention.values, result.attention[1].numpy())
    assert isinstance(histogram, Histogram)
    assert histogram.threshold == result.threshold
    assert len(histogram.values) == 4 * 96
    assert isinstance(curves, Curves)
    assert list(curves.names) == ["highest", "median", "CLS"]
    assert curves.ys[0][0] < result.threshold < curves.ys[0][1]
    assert scene.note == result.summary
    assert save_figure(scene, tmp_path / "artefacts.png").stat().st_size > 10_000


def test_maps_without_and_with_registers_share_their_scale(example: Planted) -> None:
    before = vs.artefact_tokens(example.model, example.pixels)
    with vs.test_time_registers(example.model, [(BLOCK, NEURON)]) as model:
        after = vs.artefact_tokens(model, example.pixels)
    scene = register_scene(before, after)
    (photo, norms, attention), (cured, cured_norms, cured_attention) = (row.panels for row in scene.rows)
    assert (len(photo.marks), len(cured.marks)) == (4, 0)
    assert norms.limits == cured_norms.limits
    assert attention.limits == cured_attention.limits == (0.0, pytest.approx(float(before.attention[0].max())))
    assert cured_norms.values.max() < norms.values.max() / 1.5
    assert "with: no valley between the norms" in scene.note
    draw(scene)


def test_a_histogram_colours_what_lies_above_the_threshold() -> None:
    values = np.array([1.0, 1.1, 1.2, 10.0, 0.0], dtype=np.float32)
    scene = Scene([Row([Histogram(values, 5.0, title="norms")], 1)], "title", caption="")
    (axes,) = draw(scene).axes
    colours = {bar.get_facecolor() for bar in axes.patches if bar.get_height()}
    assert len(axes.patches) == BINS
    assert sum(bar.get_height() for bar in axes.patches) == 4  # zero is not on a logarithmic axis
    assert len(colours) == 2
    assert len(axes.lines) == 1
    without = Scene([Row([Histogram(values)], 1)], "title", caption="")
    (axes,) = draw(without).axes
    assert len({bar.get_facecolor() for bar in axes.patches}) == 1
    assert not axes.lines
    draw(Scene([Row([Histogram(np.zeros(3, dtype=np.float32))], 1)], "title"))

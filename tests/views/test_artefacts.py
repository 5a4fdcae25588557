"""Figures of artefact tokens: what they show and say."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import LineCollection

import vitscope as vs
from tests.helpers.families import ALL
from tests.helpers.planted_artefacts import BLOCK, NEURON, PLAIN, Planted, planted
from vitscope.interventions.artefact_dropping import dropped_artefacts
from vitscope.views.artefacts import artefact_scene, mark_dropped, register_scene
from vitscope.views.charts import BINS
from vitscope.views.figure import draw, render, save_figure
from vitscope.views.scene import Curves, Histogram, Panel, Row, Scene, head_overlays

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
    photo, cls, *registers = scene.rows[2].panels
    assert [panel.title for panel in (photo, cls, *registers)] == [
        "input",
        "CLS",
        *(f"register {number}" for number in range(1, 5)),
    ]
    trace = vs.capture(example.model, example.pixels)
    for number, panel in enumerate((cls, *registers)):
        expected = trace.map(-1, query="cls" if number == 0 else f"register_{number}")[1]
        np.testing.assert_allclose(panel.values, expected, rtol=1e-5)
        assert panel.limits == (0.0, float(panel.values.max()))
    assert "row of registers: attention of each token in block 3 (index 2), mean of heads" in scene.caption
    assert save_figure(scene, tmp_path / "artefacts.png").stat().st_size > 10_000


def test_maps_without_and_with_registers_share_their_scale(example: Planted) -> None:
    before = vs.artefact_tokens(example.model, example.pixels)
    with vs.test_time_registers(example.model, [(BLOCK, NEURON)]) as model:
        after = vs.artefact_tokens(model, example.pixels)
    scene = register_scene(before, after)
    (photo, norms, attention), (cured, cured_norms, cured_attention), tokens = (row.panels for row in scene.rows)
    assert (len(photo.marks), len(cured.marks)) == (4, 0)
    assert norms.limits == cured_norms.limits
    assert attention.limits == cured_attention.limits == (0.0, pytest.approx(float(before.attention[0].max())))
    assert cured_norms.values.max() < norms.values.max() / 1.5
    assert "with: no valley between the norms" in scene.note
    assert [panel.title for panel in tokens] == [
        "input",
        "CLS",
        *(f"register {number}" for number in range(1, 5)),
        "test register 1",
    ]
    assert np.array_equal(tokens[-1].values, after.register_attention[0, 4].numpy())
    assert float(tokens[-1].values.sum()) > 0
    draw(scene)


def test_a_model_without_registers_has_no_row_of_them() -> None:
    family = next(each for each in ALL if each.name == "timm-vit")
    result = vs.artefact_tokens(family.model(), family.pixels())
    scene = artefact_scene(result)
    assert (result.registers, result.register_attention.shape) == ((), (2, 0, 4, 6))
    assert len(scene.rows) == 2
    assert scene.caption == "colours: each map from zero to its highest value"


def test_dropped_patches_are_hatched_and_named(example: Planted) -> None:
    result = vs.artefact_tokens(example.model, example.pixels)
    trace = vs.capture(example.model, example.pixels)
    dropped = dropped_artefacts(trace, result, trace)
    assert dropped is not None
    scene = head_overlays(dropped.masked(trace), -1, "cls", index=1)
    marked = mark_dropped(scene, dropped, index=1)
    assert marked.note == "query: cls; 4 of 96 patches left out: norm above 16.01 after block 3 (index 2)"
    assert marked.caption.endswith("hatched: artefact patches, left out")
    photo, mean = marked.rows[0].panels[:2]
    assert isinstance(photo, Panel)
    assert isinstance(mean, Panel)
    assert photo.dropped is None
    assert np.array_equal(mean.dropped, example.places[1].numpy())
    strokes = [
        len(collection.get_segments())
        for axes in draw(marked).axes
        for collection in axes.collections
        if isinstance(collection, LineCollection)
    ]
    assert strokes == [3 * 4] * 5  # the mean and four heads
    pixels = np.asarray(render(mean, (96, 64)), dtype=int)
    grey = np.ptp(pixels, axis=-1) == 0
    row, column = PLAIN[1]
    assert grey[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].all()
    assert grey.mean() == pytest.approx(4 / 96, abs=0.02)
    none = mark_dropped(scene, replace(dropped, places=example.places & False, reason="no valley"), index=1)
    assert none.rows is scene.rows
    assert none.note == "query: cls; no artefacts, nothing is left out"


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

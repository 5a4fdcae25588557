"""Figures: the content of scenes, and panels in the proportions of their photos."""

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.families import ALL
from vitscope.views import figure, rollouts, scene

FAMILY = next(family for family in ALL if family.name == "transformers-dinov2-registers")


def panels_of(drawn):
    return [axes for axes in drawn.axes if axes.get_label() != "colour bar"]


@pytest.fixture
def trace():
    return vs.capture(FAMILY.model(), FAMILY.pixels(1))


def test_head_grid_has_a_row_per_layer_and_a_panel_per_head(trace):
    content = scene.head_grid(trace)
    assert [len(row.panels) for row in content.rows] == [4, 4, 4]
    assert content.row_names == ["1 (0)", "2 (1)", "3 (2)"]
    expected = trace.map(1, 3, "readout")[0].numpy()
    np.testing.assert_array_equal(content.rows[1].panels[3].values, expected)


def test_head_overlays_show_every_head_once(trace):
    content = scene.head_overlays(trace, -1, "register_2")
    panels = [panel for row in content.rows for panel in row.panels]
    assert [panel.title for panel in panels] == ["photo", "mean of heads", *(f"head {i}" for i in range(4))]
    np.testing.assert_array_equal(panels[2].values, trace.map(-1, 0, "register_2")[0].numpy())
    assert "register_2" in content.note
    assert not any(panel.marks for panel in panels)


def test_head_overlays_mark_the_query(trace):
    content = scene.head_overlays(trace, -1, (1, 2))
    panels = [panel for row in content.rows for panel in row.panels]
    assert all(list(panel.marks) == [(1, 2)] for panel in panels)
    assert {panel.regions.shape for panel in panels} == {trace.map(-1, "mean", (1, 2)).shape[1:]}


def test_evolution_ends_with_the_rollout(trace):
    content = rollouts.evolution(vs.rollout_evolution(trace, start_layer=1))
    panels = [panel for row in content.rows for panel in row.panels]
    assert [panel.title for panel in panels] == ["photo", "after layer 2 (index 1)", "after layer 3 (index 2)"]
    np.testing.assert_allclose(panels[-1].values, vs.rollout(trace, start_layer=1).values[0], atol=1e-7)


def test_the_note_lists_the_options_of_a_rollout(trace):
    content = rollouts.rollout_panels([vs.rollout(trace, normalize=False, discard_ratio=0.9, start_layer=1)])
    assert content.note == "rows not normalised, lowest 90% discarded, from layer 2 (index 1) on"


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64)])
def test_panels_have_the_photos_proportions(size):
    image = vs.InputImage(Image.new("RGB", size, "gray"), (0.0, 0.0, float(size[0]), float(size[1])))
    panel = scene.Panel(image, np.eye(3, dtype=np.float32), "title")
    drawn = figure.draw(scene.Scene([scene.Row([panel] * 3, 3)], "title"))
    inches = drawn.get_size_inches()
    for axes in panels_of(drawn):
        box = axes.get_position()
        assert box.width * inches[0] / (box.height * inches[1]) == pytest.approx(size[0] / size[1], rel=1e-6)


def test_panels_are_on_the_page_and_do_not_overlap(trace):
    rollouts = [vs.rollout(trace), vs.rollout(trace, head_fusion="max")]
    top = [scene.Panel(trace.images[0], title="photo"), *scene.rollout_maps(rollouts, 0)]
    heads = [scene.map_panel(vs.attention_map(trace, head=head)) for head in range(4)]
    drawn = figure.draw(scene.Scene([scene.Row(top, 3), *scene.rows_of(heads, 4)], "title"))
    boxes = [axes.get_position() for axes in drawn.axes]
    assert len(panels_of(drawn)) == 3 + 4
    assert len(boxes) == 3 + 4 + (2 + 4) + 1, "each map has a colour bar, and the figure has one"
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(following) for following in boxes[i + 1 :])


def test_the_brightest_patch_is_drawn_where_it_is():
    """The model sees a centre crop: the bright patch of the grid is drawn in it, surrounded by grey."""
    image = vs.InputImage(Image.new("RGB", (200, 100), "black"), (50.0, 0.0, 150.0, 100.0))
    values = np.zeros((2, 2), dtype=np.float32)
    values[0, 1] = 1
    drawn = np.asarray(figure.render(scene.Panel(image, values, alpha=1.0), (200, 100))).astype(int)
    assert drawn[25, 125].sum() > 600, "the hot patch"
    assert drawn[75, 75].sum() < 60, "a cold patch"
    for unseen in (drawn[50, 20], drawn[50, 180]):
        assert len(set(unseen)) == 1
        assert 100 < unseen[0] < 255, "what the model did not see is grey"


@pytest.mark.slow
def test_save_figure_writes_a_png(trace, tmp_path):
    path = figure.save_figure(scene.head_grid(trace), tmp_path / "new" / "grid.png")
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_drawing_does_not_change_the_settings_of_matplotlib(trace):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure.draw(scene.head_grid(trace))
    assert dict(matplotlib.rcParams) == before
    assert torch.is_grad_enabled()

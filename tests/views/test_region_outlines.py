"""Outlines of regions over photos and maps."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import vitscope as vs
from vitscope.views.figure import draw
from vitscope.views.region_outlines import draw_region_outlines, mean_map_scene, outlined
from vitscope.views.scene import Bars, Outline, Panel, Row, Scene

IMAGE = vs.InputImage.from_photo(Image.new("RGB", (60, 40), "white"))


def mask(top: int = 10, bottom: int = 30) -> np.ndarray:
    pixels = np.zeros((40, 60), dtype=bool)
    pixels[top:bottom, 20:50] = True
    return pixels


def drawn(panel: Panel) -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.imshow(np.zeros((80, 120)))
    draw_region_outlines(axes, panel, (120, 80))
    return figure


def test_an_outline_follows_the_region_and_has_its_name() -> None:
    figure = drawn(Panel(IMAGE, outlines=[Outline("tumour", mask())]))
    (axes,) = figure.axes
    white, black = axes.collections
    for contour in (white, black):
        points = np.concatenate([path.vertices for path in contour.get_paths()])
        assert points.min(0) == pytest.approx((39.5, 19.5))
        assert points.max(0) == pytest.approx((99.5, 59.5))
    (text,) = axes.texts
    assert (text.get_text(), text.xy) == ("tumour", (40, 20))


def test_names_at_the_same_place_are_written_below_each_other() -> None:
    outlines = [Outline(name, pixels) for name, pixels in (("a", mask()), ("b", mask(11)), ("c", mask(20)))]
    (axes,) = drawn(Panel(IMAGE, outlines=outlines)).axes
    heights = [text.get_position()[1] for text in axes.texts]
    assert heights[0] - heights[1] > 8
    assert heights[2] == heights[0]


def test_an_empty_region_and_the_whole_photo_have_no_outline() -> None:
    for pixels in (np.zeros((40, 60), dtype=bool), np.ones((40, 60), dtype=bool)):
        (axes,) = drawn(Panel(IMAGE, outlines=[Outline("region", pixels)])).axes
        assert not [*axes.collections, *axes.texts]


def test_large_panels_of_the_photo_are_outlined() -> None:
    other = Panel(vs.InputImage.from_photo(Image.new("RGB", (30, 30))))
    scene = Scene([Row([Panel(IMAGE), other, Bars(["a"], [1.0])], 3), Row([Panel(IMAGE)] * 6, 6)], "title")
    first, heads = outlined(scene, {"tumour": mask()}).rows
    assert [len(panel.outlines) for panel in first.panels if isinstance(panel, Panel)] == [1, 0]
    assert all(not panel.outlines for panel in heads.panels if isinstance(panel, Panel))
    assert draw(outlined(scene, {"\x07tumour": mask()})).axes


def test_mean_maps_have_a_row_for_each_method_and_a_column_for_each_group() -> None:
    import torch

    maps = [vs.Attribution(torch.rand(1, 4, 6), vs.Grid(4, 6), [IMAGE]) for _ in range(9)]
    mean = vs.mean_maps(maps, [f"class {index}" for index in range(9)])
    masks = [{"tumour": mask()}] * 9
    lines = {name: [[f"{name} {index}"] for index in range(9)] for name in ("rollout", "libra")}
    scene = mean_map_scene({"rollout": mean, "libra": mean}, masks, lines, title="Means", note="note")
    assert scene.note == "note; 2 more groups are not drawn"
    assert [len(row.panels) for row in scene.rows] == [7, 7]
    panel = scene.rows[1].panels[2]
    assert isinstance(panel, Panel)
    assert (panel.title, panel.lines, panel.outlines[0].name) == ("libra: class 2 (1 photo)", ["libra 2"], "tumour")

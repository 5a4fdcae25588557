"""Figures of compositions: the plate, location maps, size curves, controls and effects."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers import families
from tests.helpers.tiny import LABELS, tiny_vit
from tests.reference import stage as slow
from tests.reference.stage import noise, painted, seeing
from vitscope.compositing.ranking import Ranked
from vitscope.results.colours import stretch
from vitscope.views import figure, legends
from vitscope.views.compositing import (
    change,
    controls,
    extremes,
    format_output,
    on_controls,
    on_plate,
    places_and_sizes,
    plate,
)
from vitscope.views.scene import Bars, Curves, Panel, Row, Scene

PHOTO = noise(40, 56)
OBJECTS = {"dog": (4, 6, 14, 10), "cat": (30, 16, 13, 16)}


def composed(model: Any = None, **options: Any) -> vs.Composition:
    tests = {"tests": ("size", "location", "split", "controls"), "places": 3}
    return vs.compose(vs.load(tiny_vit()) if model is None else model, PHOTO, OBJECTS, **(tests | options))


def bare() -> vs.VisionModel:
    return next(family for family in families.ALL if family.name == "transformers-vit-bare").model()


@pytest.fixture(scope="module", name="result")
def of_a_vit() -> vs.Composition:
    return composed(attention=True)


@pytest.fixture(scope="module", name="logits")
def of_logits() -> vs.Composition:
    return composed(output="logit", target=2)


def interrupted(after: int, **options: Any) -> vs.Composition:
    left = [after]

    def press(_: vs.Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        return composed(batch_size=4, progress=press, **options)


def panels(scene: Scene) -> list[Any]:
    return [panel for row in scene.rows for panel in row.panels]


def drawn(scene: Scene, tmp_path: Path) -> tuple[int, int]:
    """Draw a figure, check that all axes are on the page, and return its size."""
    figures, draw = [], figure.draw
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figure, "draw", lambda *arguments: figures.append(draw(*arguments)) or figures[-1])
        path = figure.save_figure(scene, tmp_path / "figure.png")
    boxes = [axes.get_position() for axes in figures[0].axes]
    assert all(-1e-9 <= box.x0 < box.x1 <= 1 + 1e-9 and -1e-9 <= box.y0 < box.y1 <= 1 + 1e-9 for box in boxes)
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 5
        return image.size


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures with fewer pixels, to save time."""
    monkeypatch.setattr(figure, "DPI", 50)


# Texts


@pytest.mark.parametrize(
    ("by", "output", "words"),
    [
        (0.1234, "probability", "▲+12.3"),
        (-0.1234, "probability", "▼−12.3"),
        (0.0004, "probability", "="),
        (-0.0006, "probability", "▼−0.1"),
        (0.0, "logit", "="),
        (0.004, "logit", "="),
        (0.126, "logit", "▲+0.13"),
        (-1.5, "similarity", "▼−1.50"),
    ],
)
def test_a_change_has_a_sign_and_an_arrow(by: float, output: str, words: str) -> None:
    assert change(Ranked("a", 0, 0.5, by), output) == words


def test_outputs_have_their_unit() -> None:
    assert format_output(0.7956, "probability") == "79.6 %"
    assert format_output(0.7956, "probability", unit=False) == "79.6"
    assert format_output(-1.234, "logit") == format_output(-1.234, "logit", unit=False) == "-1.23"


# The plate


def test_the_plate_shows_the_images_with_their_classes(result: vs.Composition) -> None:
    scene = plate(result, full=True)
    images = [panel for row in scene.rows[::2] for panel in row.panels]
    indices = on_plate(result)
    assert len(images) == len(indices)
    for index, panel in zip(indices, images, strict=True):
        name = result.names[index]
        assert panel.title == (name if len(name) <= 27 else f"{name[:26]}…")
        assert np.array_equal(np.asarray(panel.image.photo), np.asarray(result.image(index)))
        assert panel.values is None
        ranked = result.ranking(index).classes
        assert len(panel.lines) == 3
        for line, entry in zip(panel.lines, ranked, strict=True):
            text = f"{entry.label} {100 * entry.value:.1f} %"
            assert line == (text if index == 0 else f"{text}  {change(entry, 'probability')}")
    assert scene.title == f"Outputs of {result.provenance['model']} for edited images"
    assert "objects: dog and cat; fill: inpaint" in scene.note
    assert f"of {len(result)} images" in scene.note
    assert "percentage points" in scene.note


def test_the_rollout_of_each_image_is_below_it(result: vs.Composition) -> None:
    scene, indices = plate(result, full=True), on_plate(result)
    rollouts = [panel for row in scene.rows[1::2] for panel in row.panels]
    for index, panel in zip(indices, rollouts, strict=True):
        assert np.array_equal(panel.values, result.rollouts[index])
        visible = [placed.name for placed in result.edited_images[index].show]
        expected = []
        for name in OBJECTS:
            if name in visible:
                share, area = result.rollout_mass(index, name)
                expected.append(f"{100 * share:.0f} % on {name} ({100 * area:.0f} % of the area)")
        assert list(panel.lines) == expected
    assert "lowest to its highest" in scene.caption
    without = plate(composed(tests="split"))
    assert without.caption == ""
    assert all(panel.values is None for panel in panels(without))


def test_the_plate_leaves_out_duplicates_and_most_places(result: vs.Composition) -> None:
    names = [result.names[index] for index in on_plate(result)]
    assert names[0] == "original"
    assert not [name for name in names if name.endswith("× 1")]
    assert not [index for index in on_plate(result) if result.edited_images[index].test == "controls"]
    for name in OBJECTS:
        column = result.column(None, name)
        values = {index: result.outputs[index, column] for index in result.select("location", name)}
        ranked = sorted(values, key=lambda index: -values[index])
        assert extremes(result, name) == [*ranked[:3], *ranked[-3:]]
        assert [index for index in on_plate(result) if index in values] == extremes(result, name)
    few = composed(tests="location", places=2)
    assert len(extremes(few, "dog")) == 4
    names_of_controls = [result.names[index] for index in on_controls(result, "cat")]
    assert names_of_controls == [result.names[index] for index in result.select("controls", "cat", placed=False)]


def test_images_are_shown_uncropped() -> None:
    from vitscope.images.preprocessing import Preprocessing

    base = seeing(slow.share_of_red, 32, 32)
    model = dataclasses.replace(base, preprocessing=Preprocessing((32, 32), fit="crop", resize_to=(32, 32)))
    scene = plate(vs.compose(model, painted(40, 80, (36, 10, 9, 9)), (36, 10, 9, 9), tests="size"))
    assert {panel.image.box for panel in panels(scene)} == {(0.0, 0.0, 80.0, 40.0)}


def test_labels_are_shortened_to_their_first_synonym() -> None:
    base = vs.load(tiny_vit())
    model = dataclasses.replace(base, labels=tuple(f"{label}, some synonym" for label in LABELS))
    scene = plate(composed(model, tests="split"))
    assert all("synonym" not in line for panel in panels(scene) for line in panel.lines)


# Maps and curves


def test_maps_over_the_photo_share_their_colours(result: vs.Composition, logits: vs.Composition) -> None:
    scene = places_and_sizes([result])
    (row,) = scene.rows
    maps, (curves,) = row.panels[:2], row.panels[2:]
    location_maps = [result.location_map(name) for name in OBJECTS]
    low, high = (float(end) for end in (torch.stack([location_map.values for location_map in location_maps]).min(), max(
        location_map.values.max() for location_map in location_maps)))  # fmt: skip
    for name, panel, location_map in zip(OBJECTS, maps, location_maps, strict=True):
        assert np.array_equal(panel.values, location_map.values[0].numpy())
        assert panel.limits == pytest.approx((low, high))
        assert panel.title == f"{location_map.target}, by place of {name}"
        assert panel.lines[0] == f"{100 * location_map.values.min():.1f} % to {100 * location_map.values.max():.1f} %"
        assert panel.lines[1] == f"original: {100 * result.outputs[0, result.column(None, name)]:.1f} %"
        ((down, across, mark),) = panel.numbers
        left, top, right, bottom = panel.image.box
        x, y = result.objects[name].centre
        assert mark == "×"
        assert (left + (across + 0.5) / 3 * (right - left), top + (down + 0.5) / 3 * (bottom - top)) == pytest.approx(
            (x, y)
        )
    assert isinstance(curves, Curves)
    for index, name in enumerate(OBJECTS):
        curve = result.size_curve(name)
        assert curves.names[index] == f"{curve.target}, by size of {name}"
        assert (list(curves.xs[index]), list(curves.ys[index])) == (curve.areas.tolist(), curve.values.tolist())
    assert (curves.limits, curves.percent) == ((0.0, 1.0), True)
    assert scene.title == "Probability by place and by size"
    assert f"from {100 * low:.1f} % to {100 * high:.1f} %, the same in all maps" in scene.caption
    logit_scene = places_and_sizes([logits])
    assert logit_scene.title == "Logit by place and by size"
    assert (logit_scene.rows[0].panels[2].limits, logit_scene.rows[0].panels[2].percent) == (None, False)
    assert LABELS[2] in logit_scene.rows[0].panels[0].title


def test_each_model_has_a_row_with_its_name(result: vs.Composition) -> None:
    second = dataclasses.replace(
        result, provenance={**result.provenance, "model": "another"}, outputs=result.outputs / 2
    )
    scene = places_and_sizes([result, second], [1])
    assert len(scene.rows) == 2
    for row, name in zip(scene.rows, (result.provenance["model"], "another"), strict=True):
        assert all(panel.title.startswith(f"{name}: ") for panel in row.panels)
    ends = [
        float(end)
        for composition in (result, second)
        for name in OBJECTS
        for end in composition.location_map(name, 1).values.aminmax()
    ]
    for row in scene.rows:
        for panel in row.panels[:2]:
            assert panel.limits == pytest.approx((min(ends), max(ends)))


def test_several_classes_are_side_by_side(result) -> None:
    panels = [panel for row in places_and_sizes([result], [0, 1]).rows for panel in row.panels]
    names = [result.labels[index] for index in (0, 1)]
    titles = [f"{label}, by place of {name}" for name in result.tested("location") for label in names]
    assert [panel.title for panel in panels if isinstance(panel, Panel)] == titles
    (curves,) = (panel for panel in panels if isinstance(panel, Curves))
    assert [name.split(",")[0] for name in curves.names] == names * len(result.tested("size"))


def test_the_output_for_the_original_is_that_of_the_class_of_the_map() -> None:
    """ImageNet has two cranes."""
    base = seeing(lambda unit: torch.stack([slow.redness(unit).mean((1, 2)), unit[:, 2].mean((1, 2))], 1), 40, 56)
    model = dataclasses.replace(base, labels=("crane", "crane"))
    result = vs.compose(model, painted(40, 56, (6, 9, 9, 9)), (6, 9, 9, 9), tests="location", places=2, output="logit")
    panel = places_and_sizes([result], [1]).rows[0].panels[0]
    assert panel.lines[1] == f"original: {result.outputs[0, 1]:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["size", "location", ("size", "location")], ids=str)
def test_either_test_can_be_drawn_alone(tests: Any, tmp_path: Path) -> None:
    scene = places_and_sizes([composed(tests=tests)])
    width, height = drawn(scene, tmp_path)
    assert width > 300
    assert height > 100
    assert scene.caption == ("" if tests == "size" else scene.caption)


# Controls


def test_controls_show_the_images_the_maps_and_the_effects(result: vs.Composition) -> None:
    effects = vs.effects(result)
    scene = controls([result], effects)
    bars = scene.rows[-1].panels[0]
    assert isinstance(bars, Bars)
    assert list(bars.names) == [effect.name for effect in effects]
    assert list(bars.values) == [effect.mean for effect in effects]
    assert bars.intervals is None
    assert bars.title == "effects on the probability, this image"
    maps = [panel for panel in panels(scene) if isinstance(panel, Panel) and panel.flat]
    assert [panel.title.partition(" by place, ")[2] for panel in maps] == [
        "own background",
        "blank background",
        "blank, neutral positions",
    ] * 2
    for panel, (name, background, neutral) in zip(
        maps,
        [(name, *setting) for name in OBJECTS for setting in (("own", False), ("blank", False), ("blank", True))],
        strict=True,
    ):
        expected = result.location_map(name, test="controls", background=background, neutral=neutral).values[0]
        assert np.array_equal(panel.values, expected.numpy())
    assert len({panel.limits for panel in maps}) == 1
    titles = [panel.title for panel in panels(scene) if isinstance(panel, Panel)]
    for title in ("dog alone", "dog on blank background", "no cat", "cat on shuffled background"):
        assert title in titles


def test_effects_of_several_images_have_intervals(result: vs.Composition) -> None:
    second = dataclasses.replace(result, outputs=result.outputs[:, ::-1].copy())
    effects = vs.effects([result, second], target=1)
    bars = controls([result, second], effects, 1).rows[-1].panels[0]
    assert list(bars.intervals) == [effect.interval for effect in effects]
    assert bars.title == "effects on the probability, 2 images, 95 % intervals"


# Drawing


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["with attention", "logits", "without classes", "interrupted"])
def test_every_figure_is_drawn(kind: str, result: vs.Composition, logits: vs.Composition, tmp_path: Path) -> None:
    if kind == "interrupted":
        for after in (1, 5):
            partial = interrupted(after, attention=after == 1)
            assert [index for index in on_plate(partial) if index not in partial.evaluated] == []
            drawn(plate(partial), tmp_path)
        return
    if kind == "logits":
        drawn(places_and_sizes([logits]), tmp_path)
        return
    composition = result if kind == "with attention" else composed(bare(), scales=[0.5])
    assert drawn(plate(composition), tmp_path)[0] > 500
    drawn(places_and_sizes([composition]), tmp_path)
    drawn(controls([composition], vs.effects(composition)), tmp_path)
    if kind == "without classes":
        first = panels(plate(composition))[0]
        assert list(first.lines) == ["similarity 1.00"]
        assert places_and_sizes([composition]).title == "Similarity to the original by place and by size"


def test_rows_have_their_width() -> None:
    image = vs.InputImage(Image.new("RGB", (60, 30), "gray"), (0.0, 0.0, 60.0, 30.0))
    panel = Panel(image, title="one", lines=["a line", "another"])
    scene = Scene([Row([panel, panel], 2, 1.5), Row([panel], 1)], "title", caption="")
    drawing = figure.draw(scene)
    inches = drawing.get_size_inches()
    boxes = [axes.get_position() for axes in drawing.axes]
    assert [box.width * inches[0] for box in boxes] == pytest.approx([1.5, 1.5, 4.0])
    assert [box.height * inches[1] for box in boxes] == pytest.approx([0.75, 0.75, 2.0])
    # Between the rows there is room for two lines and a title.
    gap = (boxes[0].y0 - boxes[2].y1) * inches[1]
    assert gap > 2 * legends.LINE + 0.26
    texts = {text.get_text(): text.get_position() for text in drawing.texts}
    assert boxes[2].y1 < texts["a line"][1] or texts["a line"][1] < boxes[0].y0


def test_colours_range_between_the_limits() -> None:
    values = np.array([[0.2, 0.4]])
    assert stretch(values).tolist() == [[0.0, 1.0]]
    assert stretch(values, (0.0, 0.8)) == pytest.approx(np.array([[0.25, 0.5]]))
    assert stretch(values, (0.3, 0.35)).tolist() == [[0.0, 1.0]]
    assert stretch(values, (0.2, 0.2)).tolist() == [[0.0, 0.0]]
    image = vs.InputImage(Image.new("RGB", (20, 10), "black"), (0.0, 0.0, 20.0, 10.0))
    flat = np.full((1, 2), 0.5, np.float32)
    low, middle = (
        np.asarray(figure.render(Panel(image, flat, alpha=1.0, flat=True, limits=limits), (20, 10)))[5, 5]
        for limits in (None, (0.0, 1.0))
    )
    assert low.tolist() == [0, 0, 4] or low.sum() < 20
    assert middle.sum() > 150


def test_curves_are_drawn_through_all_points() -> None:
    image = vs.InputImage(Image.new("RGB", (60, 30), "gray"), (0.0, 0.0, 60.0, 30.0))
    curves = Curves(
        ["one", "two"], [[0.01, 0.04, 0.16], [0.02, 0.3]], [[0.1, 0.5, 0.2], [0.9, 0.3]], "t", "area", (0.0, 1.0), True
    )
    drawing = figure.draw(Scene([Row([Panel(image), curves], 2)], "title", caption=""))
    axes = drawing.axes[1]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0.01, 0.04, 0.16], [0.02, 0.3]]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.1, 0.5, 0.2], [0.9, 0.3]]
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert axes.get_ylim() == (0.0, 1.0)
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.get_xlabel() == "area"


def test_a_row_of_bars_is_as_high_as_its_bars() -> None:
    image = vs.InputImage(Image.new("RGB", (60, 60), "gray"), (0.0, 0.0, 60.0, 60.0))
    bars = Bars(["a long name", "b"], [0.5, -0.2], [(0.1, 0.9), (-0.9, 0.5)], "bars")
    drawing = figure.draw(Scene([Row([Panel(image)], 1), Row([bars], 1, 8.0)], "title", caption=""))
    inches, box = drawing.get_size_inches(), drawing.axes[1].get_position()
    assert box.height * inches[1] == pytest.approx(2 * figure.BAR)
    axes = drawing.axes[1]
    assert axes.get_xlim()[0] < -0.9
    assert axes.get_xlim()[1] > 0.9
    written = [text.get_text() for text in axes.texts]
    assert written == ["+0.500", "a long name", "−0.200", "b"]

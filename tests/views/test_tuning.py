"""Figures of data sets, runs and comparisons: the content of their scenes, and that they can be drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.comparisons import (
    attention,
    comparison_of,
    leaking,
    photos,
    synthetic_cell,
    synthetic_comparison,
)
from vitscope.tune.leakage import DataCheck
from vitscope.views import comparison_page, figure, tuning
from vitscope.views.figure import save_figure
from vitscope.views.scene import Curves, Dots, Matrix, Row, Scene

pytestmark = pytest.mark.usefixtures("quick_comparisons", "coarse_figures")


@pytest.fixture(scope="module", name="check")
def check_with_leaks(tmp_path_factory: pytest.TempPathFactory) -> DataCheck:
    return leaking(tmp_path_factory.mktemp("data"))


def panels(scene: Scene) -> list[Any]:
    return [panel for row in scene.rows for panel in row.panels]


def drawn(scene: Scene, folder: Path) -> Any:
    """Return the figure, saved as a PNG, after a check that all its axes lie on the page."""
    figures, draw = [], figure.draw
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figure, "draw", lambda *arguments: figures.append(draw(*arguments)) or figures[-1])
        path = figure.save_figure(scene, folder / "figure.png")
    for axes in figures[0].axes:
        box = axes.get_position()
        assert -1e-9 <= box.x0 < box.x1 <= 1 + 1e-9
        assert -1e-9 <= box.y0 < box.y1 <= 1 + 1e-9
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 5
    return figures[0]


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


# The content of scenes


@pytest.mark.slow
def test_accuracies_and_gains_have_their_intervals(tmp_path: Path) -> None:
    comparison = synthetic_comparison()
    accuracies, gains, differences = panels(tuning.accuracy_scene(comparison))
    summaries = [comparison.summaries()[i] for i in (0, 2, 1, 3)]  # models side by side
    assert list(accuracies.names) == ["vit, head", "swin, head", "vit, lora", "swin, lora"]
    assert list(accuracies.values) == [summary.accuracy for summary in summaries]
    assert list(accuracies.intervals) == [summary.interval for summary in summaries]
    assert (list(accuracies.groups), accuracies.signed) == ([0, 1, 0, 1], False)
    assert (list(gains.names), gains.signed) == (["vit, lora", "swin, lora"], True)
    assert list(zip(gains.values, gains.intervals, strict=True)) == [
        summary.gain for summary in summaries if summary.gain
    ]
    (interaction,) = comparison.interactions()
    assert (list(differences.names), list(differences.values)) == (["swin over vit, lora"], [interaction.value])
    assert list(differences.intervals) == [interaction.interval]
    drawing = drawn(tuning.accuracy_scene(comparison), tmp_path)
    assert texts(drawing.axes[0])[::2] == ["50.0 %", "60.0 %", "70.0 %", "65.0 %"]
    assert texts(drawing.axes[1])[::2] == ["+20.0", "+5.0"]
    assert texts(drawing.axes[2]) == ["−15.0", "swin over vit, lora"]


def test_dots_have_an_axis_with_labelled_ticks(tmp_path: Path) -> None:
    drawing = drawn(tuning.accuracy_scene(synthetic_comparison()), tmp_path)
    for axes, end, points in ((drawing.axes[0], " %", False), (drawing.axes[1], "", True)):
        ticks = {text.get_text(): tick for tick, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
        assert len(ticks) >= 3
        assert all(text.endswith(end) for text in ticks)
        for text, tick in ticks.items():
            assert float(text.removesuffix(end).replace("−", "-")) == pytest.approx(100 * tick, abs=0.51)
            assert text[0] in "+−0" or not points
        low, high = axes.get_xlim()
        assert sum(low <= tick <= high for tick in ticks.values()) >= 3


def test_a_single_method_has_only_accuracies(tmp_path: Path) -> None:
    scene = tuning.accuracy_scene(synthetic_comparison({("vit", "lora"): 0.7}))
    assert [type(panel) for panel in panels(scene)] == [Dots]
    assert scene.note == "mean of 2 seeds, 40 test images"
    drawn(scene, tmp_path)


def test_curves_show_epochs_and_layers(tmp_path: Path) -> None:
    comparison = synthetic_comparison()
    scene = tuning.curves_scene(comparison)
    first, second, changes, other_changes = panels(scene)
    assert [first.title, second.title] == ["vit: test accuracy by epoch", "swin: test accuracy by epoch"]
    assert list(first.names) == ["head", "lora"]
    assert [list(xs) for xs in first.xs] == [[1.0, 2.0], [1.0, 2.0]]
    assert [list(ys) for ys in first.ys] == [[0.25, 0.5], [0.35, 0.7]]
    assert (first.counted, first.percent) == (True, True)
    (summary,) = (entry for entry in comparison.summaries() if (entry.model, entry.tuning) == ("vit", "lora"))
    assert ([list(xs) for xs in changes.xs], [tuple(ys) for ys in changes.ys]) == ([[1, 2, 3]], [summary.distances])
    assert changes.title == "vit: change of attention by layer"
    assert list(changes.series) == [1], "lora has the same colour as among the accuracies"
    assert changes.limits == other_changes.limits, "both models share the axis limits"
    drawing = drawn(scene, tmp_path)
    line, line_of_lora = drawing.axes[2].lines[0], drawing.axes[0].lines[1]
    assert (line.get_color(), line.get_marker()) == (line_of_lora.get_color(), line_of_lora.get_marker())
    assert [text.get_text() for text in drawing.axes[0].get_legend().get_texts()] == ["head", "lora"]
    assert drawing.axes[2].get_legend() is None
    assert all(tick == round(tick) for tick in drawing.axes[2].get_xticks())


def test_curves_are_means_over_seeds_until_the_first_stops() -> None:
    cells = [synthetic_cell("vit", "lora", seed, share) for seed, share in enumerate((0.5, 0.8))]
    (complete,) = panels(tuning.curves_scene(comparison_of(cells)))
    assert [list(ys) for ys in complete.ys] == [[pytest.approx(0.325), pytest.approx(0.65)]]
    shorter = synthetic_cell("vit", "lora", 2, 0.2)
    shorter = replace(shorter, record={**shorter.record, "history": shorter.record["history"][:2]})
    (stopped,) = panels(tuning.curves_scene(comparison_of([*cells, shorter], recipe={"validation": 0.1})))
    assert [list(ys) for ys in stopped.ys] == [[pytest.approx(0.25)]]
    assert stopped.title == "vit: validation accuracy by epoch"


@pytest.mark.parametrize(("epochs", "ticks"), [(1, [1]), (6, [1, 2, 3, 4, 5, 6]), (40, [1, 6, 11, 16, 21, 26, 31, 36])])
def test_ticks_are_whole_epochs_and_the_axis_ends_at_one(epochs: int, ticks: list[int], tmp_path: Path) -> None:
    history = [{"epoch": float(i + 1), "eval_accuracy": 1.0 - 0.1 / (i + 1)} for i in range(epochs)]
    cell = synthetic_cell("vit", "lora", 0, 0.5)
    drawing = drawn(
        tuning.curves_scene(comparison_of([replace(cell, record={**cell.record, "history": history})])), tmp_path
    )
    assert drawing.axes[0].get_xticks().tolist() == ticks
    assert drawing.axes[0].get_ylim()[1] <= 1.01


def test_the_head_method_has_no_curve_of_attention_changes() -> None:
    assert len(panels(tuning.curves_scene(synthetic_comparison({("vit", "head"): 0.7})))) == 1


def test_confusion_matrices_show_the_sum_over_seeds(tmp_path: Path) -> None:
    comparison = synthetic_comparison()
    scene = tuning.confusion_scene(comparison)
    assert [panel.title for panel in panels(scene)] == ["vit, head", "vit, lora", "swin, head", "swin, lora"]
    for panel, summary in zip(panels(scene), comparison.summaries(), strict=True):
        assert np.array_equal(panel.values, summary.confusion)
        assert panel.values.sum() == 80
    drawing = drawn(scene, tmp_path)
    assert texts(drawing.axes[1]) == ["28", "12", "12", "28"]
    np.testing.assert_allclose(drawing.axes[1].images[0].get_array(), [[0.7, 0.3], [0.3, 0.7]])
    assert [text.get_text() for text in drawing.axes[1].get_xticklabels()] == ["a", "b"]
    assert (drawing.axes[1].get_xlabel(), drawing.axes[1].get_ylabel()) == ("predicted", "true")


def test_a_matrix_of_thirty_classes_has_no_numbers_and_some_labels(tmp_path: Path) -> None:
    labels = tuple(f"a rather long class name, number {number}" for number in range(30))
    comparison = synthetic_comparison({("vit", "lora"): 0.7}, 30, labels)
    drawing = drawn(tuning.confusion_scene(comparison), tmp_path)
    assert texts(drawing.axes[0]) == []
    assert len(drawing.axes[0].get_yticklabels()) == 15
    assert {text.get_text() for text in drawing.axes[0].get_yticklabels()} == {"a rather long cla…"}


def test_a_matrix_row_without_images_is_empty(tmp_path: Path) -> None:
    matrix = Matrix(np.array([[3, 1], [0, 0]]), ["a", "b"], "", "true", "predicted")
    drawing = drawn(Scene([tuning.Row([matrix], 1, 3.0)], "counts", caption=""), tmp_path)
    assert texts(drawing.axes[0]) == ["3", "1", "0", "0"]
    assert drawing.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_rollouts_before_and_after_are_next_to_their_photo(tmp_path: Path) -> None:
    comparison = synthetic_comparison()
    scene = tuning.attention_scene(comparison, "vit")
    assert scene is not None
    change = comparison.attention("vit", "lora")
    assert list(scene.column_names) == ["image", "before", "lora"]
    assert change.before is not None
    assert change.after is not None
    for i, row in enumerate(scene.rows):
        photo, before, after = row.panels
        assert photo.values is None
        assert np.array_equal(before.values, change.before[i])
        assert np.array_equal(after.values, change.after[i])
    drawn(scene, tmp_path)
    alone = tuning.attention_scene(synthetic_comparison({("vit", "head"): 0.7}), "vit")
    assert alone is not None
    assert list(alone.column_names) == ["image", "before", "head"]


def test_a_model_without_rollouts_has_no_attention_figure() -> None:
    change = attention(False, 0.5) | dict.fromkeys(
        ("correlation", "faithfulness_before", "faithfulness_after", "before", "after")
    )
    comparison = comparison_of([synthetic_cell("maxvit", "lora", 0, 0.5, change)], images={"maxvit": photos()})
    assert tuning.attention_scene(comparison, "maxvit") is None
    assert set(comparison_page._scenes(comparison)) == {"accuracy", "curves", "confusion"}


def test_photos_keep_their_proportions_on_a_white_square() -> None:
    scene = tuning.attention_scene(synthetic_comparison(), "vit")
    assert scene is not None
    for row, before in zip(scene.rows, photos(), strict=True):
        for panel in row.panels:
            square = panel.image
            side = max(before.photo.size)
            assert square.photo.size == (side, side)
            left, top = (side - before.photo.width) // 2, (side - before.photo.height) // 2
            assert square.box == tuple(np.add(before.box, (left, top, left, top)))
            place = (left, top, left + before.photo.width, top + before.photo.height)
            assert square.photo.crop(place).tobytes() == before.photo.tobytes()
            white = np.asarray(square.photo).copy()
            white[place[1] : place[3], place[0] : place[2]] = 255
            assert (white == 255).all()
            seen = [tuple(map(round, image.box)) for image in (square, before)]
            assert square.photo.crop(seen[0]).tobytes() == before.photo.crop(seen[1]).tobytes()


def test_the_figure_of_a_data_set_shows_classes_and_leaks(check: DataCheck, tmp_path: Path) -> None:
    assert (len(check.exact), len(check.near)) == (1, 1)
    scene = tuning.data_scene(check)
    means, duplicates = scene.rows[0].panels, scene.rows[1].panels
    assert [(panel.title, *panel.lines) for panel in means] == [
        ("blue", "4 for training", "2 for testing"),
        ("red", "3 for training", "2 for testing"),
    ]
    np.testing.assert_allclose(np.asarray(means[1].image.photo), check.means[1], atol=0.5)
    assert [panel.lines for panel in duplicates] == [
        ("red", "in train, identical"),
        ("red", "in test, identical"),
        ("blue", "in train, nearly identical"),
        ("blue", "in test, nearly identical"),
    ]
    assert duplicates[0].image.photo.tobytes() == duplicates[1].image.photo.tobytes()
    assert scene.note == "7 training images, 4 test images; 2 training images are also in the test set (see below)"
    drawn(scene, tmp_path)


def test_the_figure_of_a_run_shows_loss_accuracy_and_confusion(tmp_path: Path) -> None:
    record = dict(synthetic_cell("/models/vit", "lora", 0, 0.7).record)
    record |= {"labels": ["a", "b"], "recipe": {"validation": 0.0}}
    tuned = vs.Tuned(vs.load("vit-nano"), tmp_path, record, np.asarray(record["predictions"]))
    scene = tuning.run_scene(tuned)
    losses, accuracies, matrix = panels(scene)
    assert isinstance(losses, Curves)
    assert [list(ys) for ys in losses.ys] == [[2.0, 1.0], [1.5, 1.2]]
    assert [list(ys) for ys in accuracies.ys] == [[0.35, 0.7]]
    assert matrix.values.tolist() == [[14, 6], [6, 14]]
    assert (scene.title, scene.note[:14]) == ("vit, tuned on made up (lora)", "test accuracy ")
    drawn(scene, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x" * 60, "", "<b>"])
def test_names_of_any_length_fit(name: str, tmp_path: Path) -> None:
    comparison = synthetic_comparison({(name, "head"): 0.0, (name, "lora"): 1.0}, labels=(name, "b"))
    for scene in (
        tuning.accuracy_scene(comparison),
        tuning.confusion_scene(comparison),
        tuning.curves_scene(comparison),
    ):
        drawn(scene, tmp_path)


def test_models_in_folders_are_shown_by_the_last_level_of_the_path() -> None:
    assert tuning.short_name("/tuned/on/birds/") == "birds"
    assert tuning.short_name("./birds") == "birds"
    assert tuning.short_name("timm:vit_small") == "timm:vit_small"
    assert tuning.short_name("google/vit-base") == "google/vit-base"


def test_dollar_signs_in_names_are_not_mathematics(tmp_path: Path) -> None:
    counts = np.eye(2, dtype=int)
    dots = Dots(["$x^$", "$5 to $10"], [0.1, 0.2], [(0.0, 0.3), (0.1, 0.4)], [0, 1])
    scene = Scene([Row([Matrix(counts, ["$x^$", "b"], "$t"), dots], 2, 4.0)], "$T^$", caption="")
    assert save_figure(scene, tmp_path / "m.png").stat().st_size

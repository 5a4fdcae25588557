"""Figures of data sets, runs and comparisons: what their scenes hold, and that they draw."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.comparisons import attention, leaking, made_up, of_cells, photos, said
from vitscope.tune.leakage import DataCheck
from vitscope.views import comparison_page as page
from vitscope.views import figure
from vitscope.views import tuning as showing
from vitscope.views.figure import save_figure
from vitscope.views.scene import Curves, Dots, Matrix, Row, Scene

pytestmark = pytest.mark.usefixtures("quick_comparisons", "coarse_figures")


@pytest.fixture(scope="module", name="inspected")
def with_leaks(tmp_path_factory: pytest.TempPathFactory) -> DataCheck:
    return leaking(tmp_path_factory.mktemp("data"))


def panels(scene: Scene) -> list[Any]:
    return [panel for row in scene.rows for panel in row.panels]


def drawn(scene: Scene, folder: Path) -> Any:
    """The figure, saved as a PNG, all of whose parts lie on the page."""
    made, draw = [], figure.draw
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figure, "draw", lambda scene: made.append(draw(scene)) or made[-1])
        path = figure.save_figure(scene, folder / "figure.png")
    for axes in made[0].axes:
        box = axes.get_position()
        assert -1e-9 <= box.x0 < box.x1 <= 1 + 1e-9
        assert -1e-9 <= box.y0 < box.y1 <= 1 + 1e-9
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 5
    return made[0]


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


# What scenes hold


def test_accuracies_and_gains_stand_with_their_intervals(tmp_path: Path) -> None:
    found = made_up()
    accuracies, gains, more = panels(showing.accuracy_scene(found))
    summaries = [found.summaries()[at] for at in (0, 2, 1, 3)]  # models side by side
    assert list(accuracies.names) == ["vit, head", "swin, head", "vit, lora", "swin, lora"]
    assert list(accuracies.values) == [one.accuracy for one in summaries]
    assert list(accuracies.intervals) == [one.interval for one in summaries]
    assert (list(accuracies.groups), accuracies.signed) == ([0, 1, 0, 1], False)
    assert (list(gains.names), gains.signed) == (["vit, lora", "swin, lora"], True)
    assert list(zip(gains.values, gains.intervals, strict=True)) == [one.gain for one in summaries if one.gain]
    (between,) = found.interactions()
    assert (list(more.names), list(more.values)) == (["swin over vit, lora"], [between.value])
    assert list(more.intervals) == [between.interval]
    made = drawn(showing.accuracy_scene(found), tmp_path)
    assert words(made.axes[0])[::2] == ["50.0 %", "60.0 %", "70.0 %", "65.0 %"]
    assert words(made.axes[1])[::2] == ["+20.0", "+5.0"]
    assert words(made.axes[2]) == ["−15.0", "swin over vit, lora"]


def test_dots_stand_over_an_axis_that_says_where_they_are(tmp_path: Path) -> None:
    made = drawn(showing.accuracy_scene(made_up()), tmp_path)
    for axes, end, points in ((made.axes[0], " %", False), (made.axes[1], "", True)):
        ticks = {text.get_text(): at for at, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
        assert len(ticks) >= 3
        assert all(text.endswith(end) for text in ticks)
        for text, at in ticks.items():
            assert float(text.removesuffix(end).replace("−", "-")) == pytest.approx(100 * at, abs=0.51)
            assert text[0] in "+−0" or not points
        low, high = axes.get_xlim()
        assert sum(low <= at <= high for at in ticks.values()) >= 3


def test_one_tuning_has_accuracies_alone(tmp_path: Path) -> None:
    scene = showing.accuracy_scene(made_up({("vit", "lora"): 0.7}))
    assert [type(panel) for panel in panels(scene)] == [Dots]
    assert scene.note == "mean of 2 seeds, 40 test images"
    drawn(scene, tmp_path)


def test_curves_go_over_epochs_and_layers(tmp_path: Path) -> None:
    found = made_up()
    scene = showing.curves_scene(found)
    first, second, moved, other = panels(scene)
    assert [first.title, second.title] == ["vit: test accuracy by epoch", "swin: test accuracy by epoch"]
    assert list(first.names) == ["head", "lora"]
    assert [list(xs) for xs in first.xs] == [[1.0, 2.0], [1.0, 2.0]]
    assert [list(ys) for ys in first.ys] == [[0.25, 0.5], [0.35, 0.7]]
    assert (first.counted, first.percent) == (True, True)
    (one,) = (one for one in found.summaries() if (one.model, one.tuning) == ("vit", "lora"))
    assert ([list(xs) for xs in moved.xs], [tuple(ys) for ys in moved.ys]) == ([[0, 1, 2]], [one.distances])
    assert moved.title == "vit: how far attention moved, by layer"
    assert list(moved.series) == [1], "the colour that lora has among the accuracies"
    assert moved.limits == other.limits, "distances of two models can be compared by eye"
    made = drawn(scene, tmp_path)
    line, of_lora = made.axes[2].lines[0], made.axes[0].lines[1]
    assert (line.get_color(), line.get_marker()) == (of_lora.get_color(), of_lora.get_marker())
    assert [text.get_text() for text in made.axes[0].get_legend().get_texts()] == ["head", "lora"]
    assert made.axes[2].get_legend() is None
    assert all(tick == round(tick) for tick in made.axes[2].get_xticks())


def test_curves_are_the_mean_of_all_seeds_up_to_where_the_first_stopped() -> None:
    cells = [said("vit", "lora", seed, share) for seed, share in enumerate((0.5, 0.8))]
    (whole,) = panels(showing.curves_scene(of_cells(cells)))
    assert [list(ys) for ys in whole.ys] == [[pytest.approx(0.325), pytest.approx(0.65)]]
    shorter = said("vit", "lora", 2, 0.2)
    shorter = replace(shorter, about={**shorter.about, "history": shorter.about["history"][:2]})
    (stopped,) = panels(showing.curves_scene(of_cells([*cells, shorter], recipe={"validation": 0.1})))
    assert [list(ys) for ys in stopped.ys] == [[pytest.approx(0.25)]]
    assert stopped.title == "vit: validation accuracy by epoch"


@pytest.mark.parametrize(("epochs", "ticks"), [(1, [1]), (6, [1, 2, 3, 4, 5, 6]), (40, [1, 6, 11, 16, 21, 26, 31, 36])])
def test_epochs_are_whole_numbers_and_no_accuracy_is_above_one(epochs: int, ticks: list[int], tmp_path: Path) -> None:
    history = [{"epoch": float(at + 1), "eval_accuracy": 1.0 - 0.1 / (at + 1)} for at in range(epochs)]
    cell = said("vit", "lora", 0, 0.5)
    made = drawn(showing.curves_scene(of_cells([replace(cell, about={**cell.about, "history": history})])), tmp_path)
    assert made.axes[0].get_xticks().tolist() == ticks
    assert made.axes[0].get_ylim()[1] <= 1.01


def test_the_head_alone_moved_nothing_and_has_no_curve() -> None:
    assert len(panels(showing.curves_scene(made_up({("vit", "head"): 0.7})))) == 1


def test_confusion_matrices_show_the_counts_of_all_seeds(tmp_path: Path) -> None:
    found = made_up()
    scene = showing.confusion_scene(found)
    assert [panel.title for panel in panels(scene)] == ["vit, head", "vit, lora", "swin, head", "swin, lora"]
    for panel, one in zip(panels(scene), found.summaries(), strict=True):
        assert np.array_equal(panel.values, one.confusion)
        assert panel.values.sum() == 80
    made = drawn(scene, tmp_path)
    assert words(made.axes[1]) == ["28", "12", "12", "28"]
    np.testing.assert_allclose(made.axes[1].images[0].get_array(), [[0.7, 0.3], [0.3, 0.7]])
    assert [text.get_text() for text in made.axes[1].get_xticklabels()] == ["a", "b"]
    assert (made.axes[1].get_xlabel(), made.axes[1].get_ylabel()) == ("said", "true")


def test_thirty_classes_have_shades_and_some_names(tmp_path: Path) -> None:
    labels = tuple(f"a rather long class name, number {number}" for number in range(30))
    found = made_up({("vit", "lora"): 0.7}, 30, labels)
    made = drawn(showing.confusion_scene(found), tmp_path)
    assert words(made.axes[0]) == []
    assert len(made.axes[0].get_yticklabels()) == 15
    assert {text.get_text() for text in made.axes[0].get_yticklabels()} == {"a rather long cla…"}


def test_a_row_without_images_is_empty_and_not_a_division_by_zero(tmp_path: Path) -> None:
    matrix = Matrix(np.array([[3, 1], [0, 0]]), ["a", "b"], "", "true", "said")
    made = drawn(Scene([showing.Row([matrix], 1, 3.0)], "counts", caption=""), tmp_path)
    assert words(made.axes[0]) == ["3", "1", "0", "0"]
    assert made.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_rollouts_before_and_after_stand_beside_their_photo(tmp_path: Path) -> None:
    found = made_up()
    scene = showing.attention_scene(found, "vit")
    assert scene is not None
    change = found.attention("vit", "lora")
    assert list(scene.column_names) == ["image", "before", "lora"]
    assert change.before is not None
    assert change.after is not None
    for at, row in enumerate(scene.rows):
        photo, before, after = row.panels
        assert photo.values is None
        assert np.array_equal(before.values, change.before[at])
        assert np.array_equal(after.values, change.after[at])
    drawn(scene, tmp_path)
    alone = showing.attention_scene(made_up({("vit", "head"): 0.7}), "vit")
    assert alone is not None
    assert list(alone.column_names) == ["image", "before", "head"]


def test_a_model_without_rollouts_has_no_such_figure() -> None:
    about = attention(False, 0.5) | dict.fromkeys(
        ("correlation", "faithfulness_before", "faithfulness_after", "before", "after")
    )
    found = of_cells([said("maxvit", "lora", 0, 0.5, about)], images={"maxvit": photos()})
    assert showing.attention_scene(found, "maxvit") is None
    assert set(page._scenes(found)) == {"accuracy", "curves", "confusion"}


def test_photos_keep_their_proportions_on_a_white_square() -> None:
    scene = showing.attention_scene(made_up(), "vit")
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


def test_a_data_set_shows_its_classes_and_its_leaks(inspected: DataCheck, tmp_path: Path) -> None:
    assert (len(inspected.exact), len(inspected.near)) == (1, 1)
    scene = showing.data_scene(inspected)
    means, twins = scene.rows[0].panels, scene.rows[1].panels
    assert [(panel.title, *panel.lines) for panel in means] == [
        ("blue", "4 to train", "2 to test"),
        ("red", "3 to train", "2 to test"),
    ]
    np.testing.assert_allclose(np.asarray(means[1].image.photo), inspected.means[1], atol=0.5)
    assert [panel.lines for panel in twins] == [
        ("red", "in train, the same"),
        ("red", "in test, the same"),
        ("blue", "in train, nearly"),
        ("blue", "in test, nearly"),
    ]
    assert twins[0].image.photo.tobytes() == twins[1].image.photo.tobytes()
    assert scene.note == "7 images to train, 4 to test; 2 of those to train in the test set too, see below"
    drawn(scene, tmp_path)


def test_a_run_shows_its_loss_its_accuracy_and_its_mistakes(tmp_path: Path) -> None:
    about = dict(said("/models/vit", "lora", 0, 0.7).about) | {"labels": ["a", "b"], "recipe": {"validation": 0.0}}
    tuned = vs.Tuned(vs.load("vit-nano"), tmp_path, about, np.asarray(about["said"]))
    scene = showing.run_scene(tuned)
    losses, accuracies, matrix = panels(scene)
    assert isinstance(losses, Curves)
    assert [list(ys) for ys in losses.ys] == [[2.0, 1.0], [1.5, 1.2]]
    assert [list(ys) for ys in accuracies.ys] == [[0.35, 0.7]]
    assert matrix.values.tolist() == [[14, 6], [6, 14]]
    assert (scene.title, scene.note[:14]) == ("vit, lora, on made up", "test accuracy ")
    drawn(scene, tmp_path)


@pytest.mark.parametrize("name", ["x" * 60, "", "<b>"])
def test_names_of_any_length_have_room(name: str, tmp_path: Path) -> None:
    found = made_up({(name, "head"): 0.0, (name, "lora"): 1.0}, labels=(name, "b"))
    for scene in (showing.accuracy_scene(found), showing.confusion_scene(found), showing.curves_scene(found)):
        drawn(scene, tmp_path)


def test_models_in_folders_go_by_their_last_name() -> None:
    assert showing.short_name("/tuned/on/birds/") == "birds"
    assert showing.short_name("./birds") == "birds"
    assert showing.short_name("timm:vit_small") == "timm:vit_small"
    assert showing.short_name("google/vit-base") == "google/vit-base"


def test_names_with_dollar_signs_are_written_as_they_are(tmp_path: Path) -> None:
    counts = np.eye(2, dtype=int)
    dots = Dots(["$x^$", "$5 to $10"], [0.1, 0.2], [(0.0, 0.3), (0.1, 0.4)], [0, 1])
    scene = Scene([Row([Matrix(counts, ["$x^$", "b"], "$t"), dots], 2, 4.0)], "$T^$", caption="")
    assert save_figure(scene, tmp_path / "m.png").stat().st_size

"""compare(): the order of the cells, and their summaries."""

import dataclasses
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.coloured import coloured
from tests.helpers.comparisons import (
    AREAS,
    BEFORE,
    QUICK,
    TUNING_METHODS,
    compared,
    comparison_of,
    data,
    synthetic_cell,
    vit,
    without_cost,
)
from vitscope.tune import metrics
from vitscope.tune.comparison import _example_images
from vitscope.tune.comparison_result import Comparison

pytestmark = pytest.mark.usefixtures("quick_comparisons")


@pytest.fixture(scope="module", name="comparison")
def finished_comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("comparisons") / "finished")


# Cells


@pytest.mark.slow
def test_cells_come_in_order_of_models_tunings_and_seeds(comparison: Comparison) -> None:
    expected = list(product(("vit-a", "swin-b"), TUNING_METHODS, (0, 1)))
    assert [(cell.model, cell.tuning, cell.seed) for cell in comparison.cells] == expected
    assert (comparison.models, comparison.tunings) == (("vit-a", "swin-b"), TUNING_METHODS)
    assert [
        (cell.record["model"], cell.record["tuning"], cell.record["recipe"]["seed"]) for cell in comparison.cells
    ] == expected
    folders = sorted(path.name for path in (comparison.folder / "cells").iterdir())
    assert folders == sorted(f"{model}-{tuning}-{seed}" for model, tuning, seed in expected)
    assert (comparison.data, comparison.labels, comparison.data_check) == ("coloured", data().labels, None)


@pytest.mark.slow
def test_a_cell_holds_the_results_of_finetune_and_attention_change(comparison: Comparison, tmp_path: Path) -> None:
    tuned = vs.finetune(vit(), data(), out=tmp_path / "run", tuning="lora", **QUICK, seed=1)
    (cell,) = (cell for cell in comparison.of("vit-a", "lora") if cell.seed == 1)
    assert without_cost({**tuned.record, "attention": None}) == without_cost({**cell.record, "attention": None})
    indices = [0, 1, 2, 3, 4, 5]  # classes in turn, as the six test images are
    change = vs.attention_change(vit(), tuned.model, [data().test.read(index) for index in indices])
    assert cell.record["attention"] == json.loads(json.dumps(change.as_json()))


def test_correct_predictions_are_counted_image_by_image(comparison: Comparison) -> None:
    labels = data().test.classes.tolist()
    for cell in comparison.cells:
        assert cell.correct.tolist() == [a == b for a, b in zip(cell.record["predictions"], labels, strict=True)]
        assert cell.correct.mean() == cell.record["accuracy"]
    correct = comparison.correct("swin-b", "lora")
    assert correct.tolist() == [cell.correct.tolist() for cell in comparison.cells[6:]]


def test_the_example_images_take_the_classes_in_turn(comparison: Comparison) -> None:
    assert list(comparison.images) == ["vit-a", "swin-b"]
    for views in comparison.images.values():
        photos = [np.asarray(image.photo) for image in views]
        expected = [np.asarray(data().test.read(index)) for index in range(6)]
        assert [photo.tolist() for photo in photos] == [photo.tolist() for photo in expected]
    uneven = coloured(12, 12)
    order = np.array([0, 3, 6, 9, 1, 4, 7, 2, 5, 8, 10, 11])  # four of the first class come first
    uneven = dataclasses.replace(uneven, test=uneven.test.subset(order))
    examples = _example_images(uneven)
    assert [int(np.asarray(image).mean((0, 1)).argmax()) for image in examples] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert np.array_equal(np.asarray(examples[3]), np.asarray(uneven.test.read(1)))


def test_tuning_the_head_does_not_change_the_attention(comparison: Comparison) -> None:
    for model in comparison.models:
        for cell in comparison.of(model, "head"):
            assert set(cell.record["attention"]["distances"]) == {0.0}
        assert any(sum(cell.record["attention"]["distances"]) > 0 for cell in comparison.of(model, "lora"))
        change = comparison.attention(model, "lora")
        assert change.distances == tuple(comparison.of(model, "lora")[0].record["attention"]["distances"])
        assert change.before is not None
        assert len(change.before) == 6


# Summaries


def test_summaries_match_a_plain_computation(comparison: Comparison) -> None:
    assert [(summary.model, summary.tuning) for summary in comparison.summaries()] == list(
        product(comparison.models, comparison.tunings)
    )
    for summary in comparison.summaries():
        cells = [cell.record for cell in comparison.of(summary.model, summary.tuning)]
        assert len(cells) == 2
        assert summary.accuracy == pytest.approx(sum(cell["accuracy"] for cell in cells) / 2)
        assert summary.interval == metrics.accuracy_interval(comparison.correct(summary.model, summary.tuning))
        assert summary.macro_f1 == pytest.approx(sum(cell["macro_f1"] for cell in cells) / 2)
        confusion = [[0] * 3 for _ in range(3)]
        for cell in cells:
            for label, prediction in zip(cell["true_labels"], cell["predictions"], strict=True):
                confusion[label][prediction] += 1
        assert summary.confusion.tolist() == confusion
        assert summary.seconds == pytest.approx(sum(cell["seconds"] for cell in cells) / 2)
        assert summary.peak_mib == max(cell["peak_mib"] for cell in cells)
        assert (summary.num_trained, summary.num_head) == (cells[0]["num_trained"], cells[0]["num_head"])
        changes = [cell["attention"] for cell in cells]
        expected = [sum(pair) / 2 for pair in zip(*(change["distances"] for change in changes), strict=True)]
        assert summary.distances == pytest.approx(expected)
        assert summary.correlation == pytest.approx(sum(change["correlation"] for change in changes) / 2)
        for name in ("faithfulness_before", "faithfulness_after"):
            assert getattr(summary, name).keys() == AREAS.keys()
            for area, value in getattr(summary, name).items():
                assert value == pytest.approx(sum(change[name][area] for change in changes) / 2)
        if summary.tuning == "head":
            assert summary.gain is None
            continue
        base = comparison.correct(summary.model, "head")
        assert summary.gain is not None
        assert summary.gain[0] == pytest.approx(summary.accuracy - base.mean())
        assert summary.gain == metrics.gain(comparison.correct(summary.model, summary.tuning), base)


SHARES = {("x", "head"): 0.5, ("x", "lora"): 0.7, ("y", "head"): 0.6, ("y", "lora"): 0.65, ("z", "head"): 0.2}
SHARES[("z", "lora")] = 0.9


def test_interactions_are_differences_of_gains() -> None:
    comparison = comparison_of([synthetic_cell(*key, seed, share) for key, share in SHARES.items() for seed in (0, 1)])
    gains = {summary.model: summary.gain[0] for summary in comparison.summaries() if summary.gain}
    assert gains == pytest.approx({"x": 0.2, "y": 0.05, "z": 0.7})
    interactions = comparison.interactions()
    assert [(entry.tuning, entry.first, entry.second) for entry in interactions] == [
        ("lora", "z", "y"),
        ("lora", "z", "x"),
        ("lora", "y", "x"),
    ]
    for entry in interactions:
        assert entry.value == pytest.approx(gains[entry.first] - gains[entry.second])
        assert entry.interval[0] <= entry.value <= entry.interval[1]


def test_there_is_no_gain_without_the_head_method() -> None:
    comparison = comparison_of([synthetic_cell(model, tuning, 0, 0.5) for model in "xy" for tuning in ("lora", "full")])
    assert [summary.gain for summary in comparison.summaries()] == [None] * 4
    assert comparison.interactions() == []
    assert comparison_of([synthetic_cell("x", tuning, 0, 0.5) for tuning in TUNING_METHODS]).interactions() == []


def test_cells_without_rollouts_do_not_count_in_the_means() -> None:
    areas = {"deletion": 0.2, "insertion": 0.6}
    complete = {"distances": [0.1, 0.3], "correlation": 0.5, "faithfulness_before": BEFORE, "faithfulness_after": areas}
    flat = {"distances": [0.3, 0.5], **dict.fromkeys(("correlation", "faithfulness_before", "faithfulness_after"))}
    (summary,) = comparison_of(
        [synthetic_cell("x", "lora", seed, 0.5, attention) for seed, attention in enumerate((complete, flat))]
    ).summaries()
    assert summary.distances == pytest.approx((0.2, 0.4))
    assert (summary.correlation, summary.faithfulness_before, summary.faithfulness_after) == (0.5, BEFORE, areas)
    assert (summary.seconds, summary.peak_mib) == (5.0, 6.0)
    (none,) = comparison_of([synthetic_cell("x", "lora", 0, 0.5, flat)]).summaries()
    assert (none.correlation, none.faithfulness_before, none.faithfulness_after) == (None,) * 3
    (nothing,) = comparison_of([synthetic_cell("x", "lora", 0, 0.5)]).summaries()
    assert nothing.distances is None


def test_the_file_of_a_comparison_is_its_json(comparison: Comparison) -> None:
    text = (comparison.folder / "comparison.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(comparison.as_json()))
    record = json.loads(text)
    assert [entry["confusion"] for entry in record["summaries"]] == [
        summary.confusion.tolist() for summary in comparison.summaries()
    ]
    assert record["summaries"][0]["gain"] is None
    gain = comparison.summaries()[1].gain
    assert gain is not None
    assert record["summaries"][1]["gain"] == {"value": gain[0], "interval": list(gain[1])}
    assert record["interactions"][0]["value"] == comparison.interactions()[0].value
    assert (record["labels"], record["recipe"]["epochs"]) == (["red", "green", "blue"], 1)

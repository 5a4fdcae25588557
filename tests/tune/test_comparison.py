"""compare(): cells in order, and what they say together."""

import dataclasses
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.coloured import coloured
from tests.helpers.comparisons import AREAS, BEFORE, QUICK, TUNING_METHODS, compared, data, lasting, of_cells, said, vit
from vitscope.tune import comparison as comparing
from vitscope.tune import metrics as measures
from vitscope.tune.comparison import Comparison

pytestmark = pytest.mark.usefixtures("quick_comparisons")


@pytest.fixture(scope="module", name="whole")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("comparisons") / "whole")


# Cells


def test_cells_come_in_order_of_models_tunings_and_seeds(whole: Comparison) -> None:
    expected = list(product(("vit-a", "swin-b"), TUNING_METHODS, (0, 1)))
    assert [(cell.model, cell.tuning, cell.seed) for cell in whole.cells] == expected
    assert (whole.models, whole.tunings) == (("vit-a", "swin-b"), TUNING_METHODS)
    assert [
        (cell.about["model"], cell.about["tuning"], cell.about["recipe"]["seed"]) for cell in whole.cells
    ] == expected
    folders = sorted(path.name for path in (whole.folder / "cells").iterdir())
    assert folders == sorted(f"{model}-{tuning}-{seed}" for model, tuning, seed in expected)
    assert (whole.data, whole.labels, whole.inspection) == ("coloured", data().labels, None)


def test_a_cell_is_what_finetune_and_attention_change_say(whole: Comparison, tmp_path: Path) -> None:
    tuned = vs.finetune(vit(), data(), out=tmp_path / "run", tuning="lora", **QUICK, seed=1)
    (cell,) = (one for one in whole.of("vit-a", "lora") if one.seed == 1)
    assert lasting({**tuned.about, "attention": None}) == lasting({**cell.about, "attention": None})
    places = [0, 1, 2, 3, 4, 5]  # classes in turn, as the six test images are
    change = vs.attention_change(vit(), tuned.model, [data().test.read(at) for at in places])
    assert cell.about["attention"] == json.loads(json.dumps(change.as_json()))


def test_what_was_right_is_counted_image_by_image(whole: Comparison) -> None:
    truth = data().test.classes.tolist()
    for cell in whole.cells:
        assert cell.right.tolist() == [a == b for a, b in zip(cell.about["said"], truth, strict=True)]
        assert cell.right.mean() == cell.about["accuracy"]
    right = whole.right("swin-b", "lora")
    assert right.tolist() == [cell.right.tolist() for cell in whole.cells[6:]]


def test_the_example_images_go_through_the_classes_in_turn(whole: Comparison) -> None:
    assert list(whole.images) == ["vit-a", "swin-b"]
    for seen in whole.images.values():
        shown = [np.asarray(image.photo) for image in seen]
        assert [one.tolist() for one in shown] == [np.asarray(data().test.read(at)).tolist() for at in range(6)]
    uneven = coloured(12, 12)
    order = np.array([0, 3, 6, 9, 1, 4, 7, 2, 5, 8, 10, 11])  # four of the first class come first
    uneven = dataclasses.replace(uneven, test=uneven.test.subset(order))
    chosen = comparing._examples(uneven)
    assert [int(np.asarray(one).mean((0, 1)).argmax()) for one in chosen] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert np.array_equal(np.asarray(chosen[3]), np.asarray(uneven.test.read(1)))


def test_tuning_the_head_moves_no_attention(whole: Comparison) -> None:
    for model in whole.models:
        for cell in whole.of(model, "head"):
            assert set(cell.about["attention"]["distances"]) == {0.0}
        assert any(sum(cell.about["attention"]["distances"]) > 0 for cell in whole.of(model, "lora"))
        change = whole.attention(model, "lora")
        assert change.distances == tuple(whole.of(model, "lora")[0].about["attention"]["distances"])
        assert change.before is not None
        assert len(change.before) == 6


# What cells say together


def test_summaries_are_recomputed_by_hand(whole: Comparison) -> None:
    assert [(one.model, one.tuning) for one in whole.summaries()] == list(product(whole.models, whole.tunings))
    for one in whole.summaries():
        cells = [cell.about for cell in whole.of(one.model, one.tuning)]
        assert len(cells) == 2
        assert one.accuracy == pytest.approx(sum(cell["accuracy"] for cell in cells) / 2)
        assert one.interval == measures.accuracy_interval(whole.right(one.model, one.tuning))
        assert one.macro_f1 == pytest.approx(sum(cell["macro_f1"] for cell in cells) / 2)
        confusion = [[0] * 3 for _ in range(3)]
        for cell in cells:
            for truth, answer in zip(cell["truth"], cell["said"], strict=True):
                confusion[truth][answer] += 1
        assert one.confusion.tolist() == confusion
        assert one.seconds == pytest.approx(sum(cell["seconds"] for cell in cells) / 2)
        assert one.peak_mib == max(cell["peak_mib"] for cell in cells)
        assert (one.trained, one.head) == (cells[0]["trained"], cells[0]["head"])
        changes = [cell["attention"] for cell in cells]
        expected = [sum(pair) / 2 for pair in zip(*(change["distances"] for change in changes), strict=True)]
        assert one.distances == pytest.approx(expected)
        assert one.correlation == pytest.approx(sum(change["correlation"] for change in changes) / 2)
        for when in ("faithfulness_before", "faithfulness_after"):
            assert getattr(one, when).keys() == AREAS.keys()
            for name, value in getattr(one, when).items():
                assert value == pytest.approx(sum(change[when][name] for change in changes) / 2)
        if one.tuning == "head":
            assert one.gain is None
            continue
        base = whole.right(one.model, "head")
        assert one.gain is not None
        assert one.gain[0] == pytest.approx(one.accuracy - base.mean())
        assert one.gain == measures.gain(whole.right(one.model, one.tuning), base)


SHARES = {("x", "head"): 0.5, ("x", "lora"): 0.7, ("y", "head"): 0.6, ("y", "lora"): 0.65, ("z", "head"): 0.2}
SHARES[("z", "lora")] = 0.9


def test_interactions_are_differences_of_gains() -> None:
    found = of_cells([said(*key, seed, share) for key, share in SHARES.items() for seed in (0, 1)])
    gains = {one.model: one.gain[0] for one in found.summaries() if one.gain}
    assert gains == pytest.approx({"x": 0.2, "y": 0.05, "z": 0.7})
    between = found.interactions()
    assert [(one.tuning, one.first, one.second) for one in between] == [
        ("lora", "z", "y"),
        ("lora", "z", "x"),
        ("lora", "y", "x"),
    ]
    for one in between:
        assert one.value == pytest.approx(gains[one.first] - gains[one.second])
        assert one.interval[0] <= one.value <= one.interval[1]


def test_without_the_head_alone_there_is_no_gain() -> None:
    found = of_cells([said(model, tuning, 0, 0.5) for model in "xy" for tuning in ("lora", "full")])
    assert [one.gain for one in found.summaries()] == [None] * 4
    assert found.interactions() == []
    assert of_cells([said("x", tuning, 0, 0.5) for tuning in TUNING_METHODS]).interactions() == []


def test_cells_without_rollouts_leave_the_means_of_the_others() -> None:
    areas = {"deletion": 0.2, "insertion": 0.6}
    there = {"distances": [0.1, 0.3], "correlation": 0.5, "faithfulness_before": BEFORE, "faithfulness_after": areas}
    flat = {"distances": [0.3, 0.5], **dict.fromkeys(("correlation", "faithfulness_before", "faithfulness_after"))}
    (one,) = of_cells([said("x", "lora", seed, 0.5, about) for seed, about in enumerate((there, flat))]).summaries()
    assert one.distances == pytest.approx((0.2, 0.4))
    assert (one.correlation, one.faithfulness_before, one.faithfulness_after) == (0.5, BEFORE, areas)
    assert (one.seconds, one.peak_mib) == (5.0, 6.0)
    (none,) = of_cells([said("x", "lora", 0, 0.5, flat)]).summaries()
    assert (none.correlation, none.faithfulness_before, none.faithfulness_after) == (None,) * 3
    (nothing,) = of_cells([said("x", "lora", 0, 0.5)]).summaries()
    assert nothing.distances is None


def test_what_is_written_is_json(whole: Comparison) -> None:
    text = (whole.folder / "comparison.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(whole.as_json()))
    about = json.loads(text)
    assert [one["confusion"] for one in about["summaries"]] == [one.confusion.tolist() for one in whole.summaries()]
    assert about["summaries"][0]["gain"] is None
    gain = whole.summaries()[1].gain
    assert gain is not None
    assert about["summaries"][1]["gain"] == {"value": gain[0], "interval": list(gain[1])}
    assert about["interactions"][0]["value"] == whole.interactions()[0].value
    assert (about["labels"], about["recipe"]["epochs"]) == (["red", "green", "blue"], 1)

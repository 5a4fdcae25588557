"""compare(): cells in order, what they say together, and a comparison that was broken off."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitscope as vs
from tests.coloured import coloured, coloured_folder, light_garbage, small_swin, small_vit
from vitscope.errors import CallError, OutputExistsError
from vitscope.tune import comparing, measures
from vitscope.tune.comparing import Cell, Comparison

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 6, "augment": (), "learning_rate": 1e-2}
TUNINGS = ("head", "lora")


@pytest.fixture(autouse=True, scope="module")
def light() -> Iterator[None]:
    with light_garbage():
        yield


def vit(name: str = "vit-a") -> vs.VisionModel:
    return dataclasses.replace(small_vit(), name=name)


def swin(name: str = "swin-b") -> vs.VisionModel:
    return dataclasses.replace(small_swin(), name=name)


def data() -> vs.Data:
    return coloured(12, 6)


def compared(out: Path, models: Sequence[vs.VisionModel] | None = None, **options: Any) -> Comparison:
    models = [vit(), swin()] if models is None else models
    return vs.compare(data(), models, out=out, **({"tunings": TUNINGS, "seeds": 2} | QUICK | options))


@pytest.fixture(scope="module", name="whole")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("comparisons") / "whole")


def lasting(about: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of the same cell have in common: all but their time and memory."""
    return {name: value for name, value in about.items() if name not in ("seconds", "peak_mib", "history")}


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained again")

    monkeypatch.setattr(comparing, "finetune", refuse)


# Cells


def test_cells_come_in_order_of_models_tunings_and_seeds(whole: Comparison) -> None:
    expected = list(product(("vit-a", "swin-b"), TUNINGS, (0, 1)))
    assert [(cell.model, cell.tuning, cell.seed) for cell in whole.cells] == expected
    assert (whole.models, whole.tunings) == (("vit-a", "swin-b"), TUNINGS)
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
    places = [0, 1, 2, 3, 4, 5]  # classes in turn, as the six test pictures are
    change = vs.attention_change(vit(), tuned.model, [data().test.read(at) for at in places])
    assert cell.about["attention"] == json.loads(json.dumps(change.as_json()))


def test_what_was_right_is_counted_picture_by_picture(whole: Comparison) -> None:
    truth = data().test.classes.tolist()
    for cell in whole.cells:
        assert cell.right.tolist() == [a == b for a, b in zip(cell.about["said"], truth, strict=True)]
        assert cell.right.mean() == cell.about["accuracy"]
    right = whole.right("swin-b", "lora")
    assert right.tolist() == [cell.right.tolist() for cell in whole.cells[6:]]


def test_the_example_pictures_go_through_the_classes_in_turn(whole: Comparison) -> None:
    assert list(whole.pictures) == ["vit-a", "swin-b"]
    for seen in whole.pictures.values():
        shown = [np.asarray(picture.photo) for picture in seen]
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
            for truth, said in zip(cell["truth"], cell["said"], strict=True):
                confusion[truth][said] += 1
        assert one.confusion.tolist() == confusion
        assert one.seconds == pytest.approx(sum(cell["seconds"] for cell in cells) / 2)
        assert one.peak_mib == max(cell["peak_mib"] for cell in cells)
        assert (one.trained, one.head) == (cells[0]["trained"], cells[0]["head"])
        changes = [cell["attention"] for cell in cells]
        expected = [sum(pair) / 2 for pair in zip(*(change["distances"] for change in changes), strict=True)]
        assert one.distances == pytest.approx(expected)
        assert one.correlation == pytest.approx(sum(change["correlation"] for change in changes) / 2)
        assert one.faithfulness is not None
        for name, value in one.faithfulness.items():
            assert value == pytest.approx(sum(change["faithfulness"][name] for change in changes) / 2)
        if one.tuning == "head":
            assert one.gain is None
            continue
        base = whole.right(one.model, "head")
        assert one.gain is not None
        assert one.gain[0] == pytest.approx(one.accuracy - base.mean())
        assert one.gain == measures.gain(whole.right(one.model, one.tuning), base)


def said(model: str, tuning: str, seed: int, share: float, faithful: Any = None) -> Cell:
    """A cell that names the first ``share`` of twenty pictures rightly."""
    truth = np.zeros(20, dtype=int)
    answers = (np.arange(20) >= share * 20).astype(int)
    about = {
        "said": answers.tolist(), "truth": truth.tolist(), "confusion": measures.confusion(truth, answers, 2).tolist(),
        "macro_f1": share, "seconds": 10.0 * seed, "peak_mib": 5.0 + seed, "trained": 7, "head": 2,
        "attention": faithful,
    }  # fmt: skip
    return Cell(model, tuning, seed, about)


def of_cells(cells: list[Cell]) -> Comparison:
    return Comparison("made up", ("a", "b"), tuple(cells), {}, None, Path("nowhere"), {})


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
    assert of_cells([said("x", tuning, 0, 0.5) for tuning in TUNINGS]).interactions() == []


def test_cells_without_rollouts_leave_the_means_of_the_others() -> None:
    areas = {"deletion": 0.2, "insertion": 0.6}
    there = {"distances": [0.1, 0.3], "correlation": 0.5, "faithfulness": areas}
    flat = {"distances": [0.3, 0.5], "correlation": None, "faithfulness": None}
    (one,) = of_cells([said("x", "lora", seed, 0.5, about) for seed, about in enumerate((there, flat))]).summaries()
    assert one.distances == pytest.approx((0.2, 0.4))
    assert (one.correlation, one.faithfulness) == (0.5, areas)
    assert (one.seconds, one.peak_mib) == (5.0, 6.0)
    (none,) = of_cells([said("x", "lora", 0, 0.5, flat)]).summaries()
    assert (none.correlation, none.faithfulness) == (None, None)
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


# Again, and after an interruption


def test_called_again_nothing_is_trained(whole: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    again = compared(whole.folder)
    assert again.as_json() == whole.as_json()
    assert [cell.about for cell in again.cells] == [cell.about for cell in whole.cells]


def test_a_part_of_it_is_there_already(whole: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    (cell,) = compared(whole.folder, [swin()], tunings=("lora",), seeds=[1]).cells
    assert cell.about == whole.cells[-1].about
    compared(whole.folder)  # its comparison.json is whole again


def test_broken_off_it_goes_on_and_ends_the_same(whole: Comparison, tmp_path: Path) -> None:
    names: list[str] = []

    def interrupted(cell: str, _: Mapping[str, float]) -> None:
        names.append(cell)
        if cell == "vit-a, lora, seed 0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, [vit()], seeds=1, progress=interrupted)
    assert list(dict.fromkeys(names)) == ["vit-a, head, seed 0", "vit-a, lora, seed 0"]
    assert (tmp_path / "cells/vit-a-head-0/cell.json").is_file()
    assert not (tmp_path / "comparison.json").exists()
    names.clear()
    found = compared(tmp_path, [vit()], seeds=1, progress=lambda cell, _: names.append(cell))
    assert set(names) == {"vit-a, lora, seed 0"}
    for cell in found.cells:
        assert lasting(cell.about) == lasting(whole.of("vit-a", cell.tuning)[0].about)


def test_progress_is_told_of_each_cell_and_step(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    vs.compare(
        data(), [vit()], out=tmp_path, tunings=("head", "head"), seeds=[5], **QUICK,
        progress=lambda cell, found: told.append((cell, int(found["step"]))),
    )  # fmt: skip
    assert {cell for cell, _ in told} == {"vit-a, head, seed 5"}
    assert list(dict.fromkeys(told)) == [("vit-a, head, seed 5", 1), ("vit-a, head, seed 5", 2)]


def test_models_are_kept_only_when_asked_for(whole: Comparison, tmp_path: Path) -> None:
    assert not list(whole.folder.rglob("*.safetensors"))
    compared(tmp_path, [vit()], tunings=("head",), seeds=1, keep_models=True)
    kept = vs.load(tmp_path / "cells/vit-a-head-0")
    pictures = [data().test.read(at) for at in range(6)]
    assert [found[0].index for found in kept.predict(pictures)] == whole.cells[0].about["said"]


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 2}, "cell with another recipe"),
        ({"learning_rate": 5e-3}, "cell with another recipe"),
        ({"models": "other weights"}, "cell with another weights"),
        ({"data": coloured(12, 9)}, "cell with another pictures"),
    ],
    ids=["epochs", "rate", "model", "data"],
)
def test_another_comparison_in_the_same_folder_is_refused(
    whole: Comparison, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    untrained(monkeypatch)
    before = (whole.folder / "comparison.json").read_bytes()
    models = [dataclasses.replace(small_vit(seed=1), name="vit-a")] if "models" in options else [vit()]
    given = options.pop("data", data())
    options = {name: value for name, value in options.items() if name != "models"}
    with pytest.raises(OutputExistsError, match=words):
        vs.compare(given, models, out=whole.folder, tunings=("head",), seeds=1, **(QUICK | options))
    assert (whole.folder / "comparison.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_comparison_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    untrained(monkeypatch)
    out = tmp_path / "taken"
    if kind == "folder":
        out.mkdir()
    (out / "thesis.txt" if kind == "folder" else out).write_text("precious")
    with pytest.raises(OutputExistsError, match="holds something else than a comparison: choose another folder"):
        compared(out)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["precious"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": [vit(), swin("vit-a")]}, "two models have the same name, vit-a: compare different ones"),
        ({"tunings": ("head", "adaptor-mlp")}, r"unknown tuning 'adaptor-mlp': did you mean adapter-mlp\?"),
        ({"tunings": ("head", "xyz")}, "unknown tuning 'xyz': choose head, full, "),
        ({"models": []}, "a comparison needs a model, a tuning and a seed at least"),
        ({"tunings": ()}, "a comparison needs a model, a tuning and a seed at least"),
        ({"seeds": ()}, "a comparison needs a model, a tuning and a seed at least"),
        ({"seeds": 0}, "seeds is 0, at least 1"),
        ({"recipe": "olden"}, "unknown recipe 'olden': choose report, modern"),
        ({"epoch": 3}, "no setting 'epoch'"),
    ],
    ids=["names", "near", "far", "no models", "no tunings", "no seeds", "0 seeds", "recipe", "setting"],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    untrained(monkeypatch)
    models = options.pop("models", None)
    with pytest.raises(CallError, match=words):
        compared(tmp_path / "new", models, **options)
    assert not (tmp_path / "new").exists()


# From folders, inspected


def test_a_folder_is_inspected_first(tmp_path: Path) -> None:
    source = coloured_folder(tmp_path / "pictures", {"red": 5, "blue": 5})
    options: dict[str, Any] = {"tunings": ("head",), "seeds": 1, **QUICK}
    found = vs.compare(source, [vit()], out=tmp_path / "out", **options)
    assert found.inspection is not None
    assert (found.data, found.labels) == ("pictures", ("blue", "red"))
    assert found.as_json()["inspection"]["classes"] == {"blue": {"train": 4, "test": 1}, "red": {"train": 4, "test": 1}}
    inspected = vs.inspect(vs.load_data(source))
    again = vs.compare(inspected, [vit()], out=tmp_path / "out", **options)
    assert again.inspection is inspected
    assert again.as_json() == found.as_json()


def test_what_is_skipped_and_dropped_is_not_trained_on(tmp_path: Path) -> None:
    source = coloured_folder(tmp_path / "train", {"red": 4, "blue": 4})
    coloured_folder(tmp_path / "test", {"red": 2, "blue": 2}, seed=1)
    (tmp_path / "train/red/0.png").write_bytes((tmp_path / "test/red/1.png").read_bytes())
    (tmp_path / "train/blue/3.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"tunings": ("head",), "seeds": 1, "out": tmp_path / "out", **QUICK}
    with pytest.raises(vs.WorkError, match=r"1 picture of .* cannot be read: .*3\.png"):
        vs.compare(source.parent, [vit()], **options)
    with pytest.warns(vs.VitscopeWarning, match="skipped"):
        found = vs.compare(source.parent, [vit()], unreadable="skip", drop_duplicates=True, **options)
    assert found.cells[0].about["pictures"] == {"train": 6, "test": 4}

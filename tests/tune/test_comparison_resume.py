"""compare() again: what is there is not run twice, what was broken off goes on, what cannot be meant is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import vitscope as vs
from tests.helpers.coloured import coloured, coloured_folder
from tests.helpers.comparisons import QUICK, compared, data, lasting, swin, vit
from vitscope.errors import CallError, OutputExistsError
from vitscope.tune import comparison as comparing
from vitscope.tune.comparison import Comparison

pytestmark = pytest.mark.usefixtures("quick_comparisons")


@pytest.fixture(scope="module", name="whole")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("comparisons") / "whole", [vit()], seeds=1)


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained again")

    monkeypatch.setattr(comparing, "finetune", refuse)


def test_called_again_nothing_is_trained(whole: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    again = compared(whole.folder, [vit()], seeds=1)
    assert again.as_json() == whole.as_json()
    assert [cell.about for cell in again.cells] == [cell.about for cell in whole.cells]


def test_a_part_of_it_is_there_already(whole: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    (cell,) = compared(whole.folder, [vit()], tunings=("lora",), seeds=[0]).cells
    assert cell.about == whole.cells[1].about
    compared(whole.folder, [vit()], seeds=1)  # its comparison.json is whole again


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


def test_a_model_without_windows_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(monkeypatch)
    with pytest.raises(CallError):
        compared(tmp_path / "new", [swin(), vit()], tunings=("head", "window-cls"))
    assert not (tmp_path / "new").exists()


def test_models_are_kept_only_when_asked_for(whole: Comparison, tmp_path: Path) -> None:
    assert not list(whole.folder.rglob("*.safetensors"))
    compared(tmp_path, [vit()], tunings=("head",), seeds=1, keep_models=True)
    kept = vs.load(tmp_path / "cells/vit-a-head-0")
    images = [data().test.read(at) for at in range(6)]
    assert [found[0].index for found in kept.predict(images)] == whole.cells[0].about["said"]


# Refused


@pytest.mark.parametrize("odd", ["epochs", "rate", "weights", "images"])
def test_another_comparison_in_the_same_folder_is_refused(
    whole: Comparison, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    untrained(monkeypatch)
    before = (whole.folder / "comparison.json").read_bytes()
    given = coloured(12, 9) if odd == "images" else data()
    model = vit(seed=1 if odd == "weights" else 0)
    changes = {"epochs": {"epochs": 2}, "rate": {"learning_rate": 5e-3}}.get(odd, {})
    word = {"epochs": r"recipe \(epochs 1, not 2\)", "rate": "recipe", "weights": "set of weights"}.get(odd, odd)
    with pytest.raises(
        OutputExistsError, match=f"vit-a-head-0 holds a cell with another {word}.*: choose another --out"
    ):
        vs.compare(given, [model], out=whole.folder, tunings=("head",), seeds=1, **(QUICK | changes))
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
        ({"models": ("vit-a", "vit-a")}, "two models have the same name, vit-a: compare different ones"),
        ({"tunings": ("head", "adaptor-mlp")}, r"unknown tuning 'adaptor-mlp': did you mean adapter-mlp\?"),
        ({"tunings": ("head", "xyz")}, "unknown tuning 'xyz': choose head, full, "),
        ({"models": ()}, "a comparison needs a model, a tuning and a seed at least"),
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
    models = [vit(name) for name in options.get("models", ("vit-a", "vit-b"))]
    options = {name: value for name, value in options.items() if name != "models"}
    with pytest.raises(CallError, match=words):
        compared(tmp_path / "new", models, **options)
    assert not (tmp_path / "new").exists()


# From folders, inspected


def test_a_folder_is_inspected_first(tmp_path: Path) -> None:
    source = coloured_folder(tmp_path / "images", {"red": 5, "blue": 5})
    options: dict[str, Any] = {"tunings": ("head",), "seeds": 1, **QUICK}
    found = vs.compare(source, [vit()], out=tmp_path / "out", **options)
    assert found.inspection is not None
    assert (found.data, found.labels) == ("images", ("blue", "red"))
    assert found.as_json()["inspection"]["classes"] == {"blue": {"train": 4, "test": 1}, "red": {"train": 4, "test": 1}}
    inspected = vs.inspect(vs.load_data(source))
    again = vs.compare(inspected, [vit()], out=tmp_path / "out", **options)
    assert again.inspection is inspected
    assert again.as_json() == found.as_json()


def test_what_is_skipped_and_dropped_is_not_trained_on(tmp_path: Path) -> None:
    source = coloured_folder(tmp_path / "train", {"red": 4, "blue": 4})
    coloured_folder(tmp_path / "test", {"red": 2, "blue": 2}, seed=1)
    (tmp_path / "train/red/0.png").write_bytes((tmp_path / "test/red/1.png").read_bytes())
    (tmp_path / "train/blue/3.png").write_bytes(b"no image")
    options: dict[str, Any] = {"tunings": ("head",), "seeds": 1, "out": tmp_path / "out", **QUICK}
    with pytest.raises(vs.WorkError, match=r"1 image of .* cannot be read: .*3\.png"):
        vs.compare(source.parent, [vit()], **options)
    with pytest.warns(vs.VitscopeWarning, match="skipped"):
        found = vs.compare(source.parent, [vit()], unreadable="skip", drop_duplicates=True, **options)
    assert found.cells[0].about["images"] == {"train": 6, "test": 4}


def test_two_folders_of_one_name_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(monkeypatch)
    folders = [tmp_path / run / "tuned" for run in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(CallError, match=r"two models have the same name, tuned: .* rename a model's folder"):
        compared(tmp_path / "new", [vit(str(folder)) for folder in folders])
    assert not (tmp_path / "new").exists()


def test_two_tuned_runs_of_one_name_are_named_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained(monkeypatch)
    with pytest.raises(CallError, match=r"two models have the same name, vit \(head\): compare different ones$"):
        compared(tmp_path / "new", [vit("vit (head)"), vit("vit (head)")])


def test_hub_models_whose_names_end_alike_have_folders_of_their_own() -> None:
    assert comparing.plain_name("google/vit") != comparing.plain_name("facebook/vit")


@pytest.mark.usefixtures("unchecked")
def test_a_seed_that_is_named_twice_is_run_once() -> None:
    assert list(comparing._order(["model"], ["head", "head"], [1, 1, 0])) == [
        ("model", "head", 1),
        ("model", "head", 0),
    ]

"""compare() called again: finished cells are not run twice, interrupted ones resume, other comparisons are refused."""

from pathlib import Path
from typing import Any

import pytest

import vitscope as vs
from tests.helpers.coloured import coloured, coloured_folder
from tests.helpers.comparisons import QUICK, compared, data, swin, vit, without_cost
from vitscope.errors import CallError, OutputExistsError, UnsupportedModelError
from vitscope.tune import comparison as comparison_module
from vitscope.tune.comparison_result import Comparison
from vitscope.tune.data_options import DataOptions

pytestmark = pytest.mark.usefixtures("quick_comparisons")


@pytest.fixture(scope="module", name="comparison")
def finished_comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(tmp_path_factory.mktemp("comparisons") / "finished", [vit()], seeds=1)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained again")

    monkeypatch.setattr(comparison_module, "finetune", refuse)


@pytest.mark.slow
def test_a_second_call_trains_nothing(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    again = compared(comparison.folder, [vit()], seeds=1)
    assert again.as_json() == comparison.as_json()
    assert [cell.record for cell in again.cells] == [cell.record for cell in comparison.cells]


def test_a_finished_cell_is_read_again(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    (cell,) = compared(comparison.folder, [vit()], tunings=("lora",), seeds=[0]).cells
    assert cell.record == comparison.cells[1].record
    compared(comparison.folder, [vit()], seeds=1)  # its comparison.json is complete again


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_and_ends_the_same(comparison: Comparison, tmp_path: Path) -> None:
    names: list[str] = []

    def interrupt(step: vs.Progress) -> None:
        names.append(step.description)
        if step.description == "vit-a, lora, seed 0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, [vit()], seeds=1, progress=interrupt)
    assert list(dict.fromkeys(names)) == ["vit-a, head, seed 0", "vit-a, lora, seed 0"]
    assert (tmp_path / "cells/vit-a-head-0/cell.json").is_file()
    assert not (tmp_path / "comparison.json").exists()
    names.clear()
    resumed = compared(tmp_path, [vit()], seeds=1, progress=lambda step: names.append(step.description))
    assert set(names) == {"vit-a, lora, seed 0"}
    for cell in resumed.cells:
        assert without_cost(cell.record) == without_cost(comparison.of("vit-a", cell.tuning)[0].record)


@pytest.mark.slow
def test_progress_is_reported_for_each_cell_and_step(tmp_path: Path) -> None:
    steps: list[vs.Progress] = []
    vs.compare(
        data(), [vit()], out=tmp_path, tunings=("head", "head"), seeds=[5], **QUICK,
        progress=steps.append,
    )  # fmt: skip
    assert {step.description for step in steps} == {"vit-a, head, seed 5"}
    assert [(step.completed, step.total) for step in steps] == [(1, 2), (2, 2), (2, 2)]
    assert [set(step.metrics) for step in steps] == [{"loss"}, {"loss"}, {"loss", "accuracy"}]


def test_a_model_without_windows_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="has no windows"):
        compared(tmp_path / "new", [swin(), vit()], tunings=("head", "window-cls"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_models_are_kept_only_if_requested(comparison: Comparison, tmp_path: Path) -> None:
    assert not list(comparison.folder.rglob("*.safetensors"))
    compared(tmp_path, [vit()], tunings=("head",), seeds=1, keep_models=True)
    model = vs.load(tmp_path / "cells/vit-a-head-0")
    images = [data().test.read(index) for index in range(6)]
    assert [best.index for (best, *_) in model.predict(images)] == comparison.cells[0].record["predictions"]


# Refusals


@pytest.mark.parametrize("difference", ["epochs", "rate", "weights", "images"])
def test_another_comparison_in_the_same_folder_is_refused(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, difference: str
) -> None:
    forbid_training(monkeypatch)
    before = (comparison.folder / "comparison.json").read_bytes()
    images = coloured(12, 9) if difference == "images" else data()
    model = vit(seed=1 if difference == "weights" else 0)
    changes = {"epochs": {"epochs": 2}, "rate": {"learning_rate": 5e-3}}.get(difference, {})
    words = {"epochs": r"recipe \(epochs 1, not 2\)", "rate": "recipe", "weights": "set of weights"}.get(
        difference, difference
    )
    with pytest.raises(
        OutputExistsError, match=f"vit-a-head-0 holds a cell with another {words}.*: choose another --out"
    ):
        vs.compare(images, [model], out=comparison.folder, tunings=("head",), seeds=1, **(QUICK | changes))
    assert (comparison.folder / "comparison.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_or_file_that_is_not_a_comparison_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    forbid_training(monkeypatch)
    out = tmp_path / "taken"
    if kind == "folder":
        out.mkdir()
    (out / "thesis.txt" if kind == "folder" else out).write_text("precious")
    with pytest.raises(OutputExistsError, match="holds something other than a comparison: choose another folder"):
        compared(out)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["precious"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": ("vit-a", "vit-a")}, "two models have the same name, vit-a: compare different ones"),
        ({"tunings": ("head", "adaptor-mlp")}, r"unknown tuning 'adaptor-mlp': did you mean adapter-mlp\?"),
        ({"tunings": ("head", "xyz")}, "unknown tuning 'xyz': choose head, full, "),
        ({"models": ()}, "a comparison needs at least one model, one tuning and one seed"),
        ({"tunings": ()}, "a comparison needs at least one model, one tuning and one seed"),
        ({"seeds": ()}, "a comparison needs at least one model, one tuning and one seed"),
        ({"seeds": 0}, "seeds is 0, at least 1"),
        ({"recipe": "olden"}, "unknown recipe 'olden': choose report, modern"),
        ({"epoch": 3}, "no setting 'epoch'"),
    ],
    ids=["names", "near", "far", "no models", "no tunings", "no seeds", "0 seeds", "recipe", "setting"],
)
def test_a_wrong_argument_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    forbid_training(monkeypatch)
    models = [vit(name) for name in options.get("models", ("vit-a", "vit-b"))]
    options = {name: value for name, value in options.items() if name != "models"}
    with pytest.raises(CallError, match=words):
        compared(tmp_path / "new", models, **options)
    assert not (tmp_path / "new").exists()


# Data sets in folders


@pytest.mark.slow
def test_a_folder_is_checked_first(tmp_path: Path) -> None:
    source = coloured_folder(tmp_path / "images", {"red": 5, "blue": 5})
    options: dict[str, Any] = {"tunings": ("head",), "seeds": 1, **QUICK}
    result = vs.compare(source, [vit()], out=tmp_path / "out", **options)
    assert result.data_check is not None
    assert (result.data, result.labels) == ("images", ("blue", "red"))
    assert result.as_json()["data_check"]["classes"] == {
        "blue": {"train": 4, "test": 1},
        "red": {"train": 4, "test": 1},
    }
    check = vs.check_data(vs.load_data(source))
    again = vs.compare(check, [vit()], out=tmp_path / "out", **options)
    assert again.data_check is check
    assert again.as_json() == result.as_json()


@pytest.mark.slow
def test_skipped_and_dropped_images_are_not_trained_on(tmp_path: Path) -> None:
    source = coloured_folder(tmp_path / "train", {"red": 4, "blue": 4})
    coloured_folder(tmp_path / "test", {"red": 2, "blue": 2}, seed=1)
    (tmp_path / "train/red/0.png").write_bytes((tmp_path / "test/red/1.png").read_bytes())
    (tmp_path / "train/blue/3.png").write_bytes(b"no image")
    options: dict[str, Any] = {"tunings": ("head",), "seeds": 1, "out": tmp_path / "out", **QUICK}
    with pytest.raises(vs.WorkError, match=r"1 image of .* cannot be read: .*3\.png"):
        vs.compare(source.parent, [vit()], **options)
    with pytest.warns(vs.VitscopeWarning, match="skipped"):
        result = vs.compare(
            source.parent, [vit()], data_options=DataOptions(unreadable="skip", drop_duplicates=True), **options
        )
    assert result.cells[0].record["images"] == {"train": 6, "test": 4}


def test_two_folders_with_the_same_name_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    folders = [tmp_path / run / "tuned" for run in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(CallError, match=r"two models have the same name, tuned: .* rename a model's folder"):
        compared(tmp_path / "new", [vit(str(folder)) for folder in folders])
    assert not (tmp_path / "new").exists()


def test_two_tuned_runs_with_the_same_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    with pytest.raises(CallError, match=r"two models have the same name, vit \(head\): compare different ones$"):
        compared(tmp_path / "new", [vit("vit (head)"), vit("vit (head)")])


def test_hub_models_of_different_owners_have_different_folders() -> None:
    assert comparison_module.folder_name("google/vit") != comparison_module.folder_name("facebook/vit")


@pytest.mark.usefixtures("unchecked")
def test_a_repeated_seed_or_method_is_run_once() -> None:
    assert list(comparison_module._combinations(["model"], ["head", "head"], [1, 1, 0])) == [
        ("model", "head", 1),
        ("model", "head", 0),
    ]

"""A wrong argument of the functions that train is refused in one line and writes nothing; progress in all its forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.coloured import coloured, coloured_folder, small_swin, small_vit
from tests.helpers.every_model import same, weights
from tests.helpers.tiny import photo
from vitscope.errors import CallError, VitscopeError
from vitscope.tune.data_options import DataOptions
from vitscope.tune.leakage import check_data
from vitscope.tune.recipe import Recipe, read_recipe

pytestmark = pytest.mark.usefixtures("little_garbage")
OPTIONS: dict[str, Any] = {"epochs": 1, "batch_size": 8, "augment": ()}


def tune(out: Path, **options: Any) -> vs.Tuned:
    return vs.finetune(small_vit(), coloured(), out=out, **(OPTIONS | options))


def compare(out: Path, **options: Any) -> Any:
    arguments = {"models": [small_vit()], "tunings": ["head"], "seeds": 1, **OPTIONS, **options}
    return vs.compare(coloured(), arguments.pop("models"), **({"out": out} | arguments))


CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "augment 5": (lambda _: Recipe(augment=5), "augment is 5"),  # type: ignore[arg-type]
    "augment text": (lambda _: Recipe(augment="crop"), "augment is 'crop'"),  # type: ignore[arg-type]
    "augment nested": (lambda _: Recipe(augment=(["crop"],)), "augment is"),  # type: ignore[arg-type]
    "schedule list": (lambda _: Recipe(schedule=["cosine"]), "unknown schedule"),  # type: ignore[arg-type]
    "recipe 5": (lambda _: read_recipe(5), "recipe is 5"),  # type: ignore[arg-type]
    "recipe None": (lambda out: tune(out, recipe=None), "recipe is None"),
    "data None": (lambda _: vs.load_data(None), "data is None"),  # type: ignore[arg-type]
    "data 5": (lambda _: vs.load_data(5), "data is 5"),  # type: ignore[arg-type]
    "data []": (lambda _: vs.load_data([]), r"data is \[\]"),  # type: ignore[arg-type]
    "data empty": (lambda _: vs.load_data(""), "data is ''"),
    "data NUL": (lambda _: vs.load_data("a\0b"), "data is 'a"),
    "data long": (lambda _: vs.load_data("n" * 5000), "File name too long"),
    "per_class text": (lambda _: DataOptions(per_class="x"), "per_class is 'x'"),  # type: ignore[arg-type]
    "per_class 1.5": (lambda _: DataOptions(per_class=1.5), "per_class is 1.5"),  # type: ignore[arg-type]
    "per_class True": (lambda _: DataOptions(per_class=True), "per_class is True"),
    "check_data 5": (lambda _: check_data(5), "data is 5: pass what vitscope.load_data returns"),  # type: ignore[arg-type]
    "check_data progress": (lambda _: check_data(coloured(), progress=5), "progress is 5"),  # type: ignore[arg-type]
    "out None": (lambda _: tune(None), "out is None"),  # type: ignore[arg-type]
    "out 5": (lambda _: tune(5), "out is 5"),  # type: ignore[arg-type]
    "out bytes": (lambda _: tune(b"run"), "out is b'run'"),  # type: ignore[arg-type]
    "out NUL": (lambda _: tune("a\0b"), "out is 'a"),  # type: ignore[arg-type]
    "out empty": (lambda _: tune(""), "out is ''"),  # type: ignore[arg-type]
    "device x": (lambda out: tune(out, device="x"), "device 'x' is not available for training here"),
    "device meta": (lambda out: tune(out, device="meta"), "device 'meta' is not available for training"),
    "device 5": (lambda out: tune(out, device=1.5), "device '1.5' is not available for training"),
    "device nan": (lambda out: tune(out, device="cuda:99"), "device 'cuda:99' is not available for training"),
    "progress 5": (lambda out: tune(out, progress=5), "progress is 5: pass True, False, or a function"),
    "unreadable": (lambda out: tune(out, data_options=DataOptions(unreadable="x")), "unreadable is 'x'"),
    "compare data": (lambda out: vs.compare([], ["vit-nano"], out=out), r"data is \[\]"),  # type: ignore[arg-type]
    "compare models": (lambda out: compare(out, models="vit-nano"), "models is 'vit-nano': pass a list"),
    "compare no models": (lambda out: compare(out, models=[]), "needs at least one model"),
    "compare tunings": (lambda out: compare(out, tunings="head"), "tunings is 'head': pass a list"),
    "compare tunings None": (lambda out: compare(out, tunings=None), "tunings is None"),
    "compare seeds": (lambda out: compare(out, seeds="x"), "seeds is 'x'"),
    "compare seed": (lambda out: compare(out, seeds=["x"]), "seed is 'x'"),
    "compare seeds 1.5": (lambda out: compare(out, seeds=1.5), "seeds is 1.5"),
    "compare out": (lambda _: compare(None), "out is None"),  # type: ignore[arg-type]
    "compare device": (lambda out: compare(out, device="x"), "device 'x'"),
    "compare progress": (lambda out: compare(out, progress="x"), "progress is 'x'"),
    "agreement None": (lambda _: vs.agreement(None), "agreement compares"),  # type: ignore[arg-type]
    "agreement 5": (lambda _: vs.agreement(5), "agreement compares"),  # type: ignore[arg-type]
    "faithfulness 5": (lambda _: vs.faithfulness(small_vit(), photo(32, 32), 5), "result is 5"),  # type: ignore[arg-type]
}


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CALLS)
def test_a_mistake_is_refused_in_one_line_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = CALLS[name]
    with pytest.raises(CallError, match=message) as error:
        call(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


TOML = {
    "table": ("[a]\nb = 1", "has a table 'a'"),
    "nested": ("epochs = {a = {b = 1}}", "has a table 'epochs'"),
    "base table": ("base = {a = 1}", "has the base {'a': 1}"),
    "base list": ('base = ["modern"]', r"has the base \['modern'\]"),
    "deep": (f"augment = {'[' * 5000}{']' * 5000}", "nested too deeply"),
    "text": ('augment = "crop"', "augment is 'crop'"),
    "lists": ('augment = [["crop"]]', "augment is"),
    "latin": (b"# caf\xe9", "is not a recipe"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", TOML)
def test_a_file_that_is_not_a_recipe_is_refused(name: str, tmp_path: Path) -> None:
    text, message = TOML[name]
    path = tmp_path / "own.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CallError, match=message) as error:
        read_recipe(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", [small_vit, small_swin])
def test_an_image_size_that_is_too_small_is_refused(model: Callable[[], vs.VisionModel], tmp_path: Path) -> None:
    with pytest.raises(VitscopeError) as error:
        vs.finetune(vs.load(model().module, image_size=3), coloured(), out=tmp_path / "run", **OPTIONS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tuning", ["lora", "full", "head"])
def test_training_learns_even_if_the_caller_disabled_gradients(mode: Any, tuning: str, tmp_path: Path) -> None:
    expected = tune(tmp_path / "expected", tuning=tuning)
    with mode():
        again = tune(tmp_path / "again", tuning=tuning)
        assert not torch.is_grad_enabled()
    assert same(weights(again.model), weights(expected.model))


@pytest.mark.slow
def test_progress_is_true_false_or_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[vs.Progress] = []
    tune(tmp_path / "a", progress=True)
    tune(tmp_path / "b", progress=False)
    tune(tmp_path / "c", progress=None)
    tune(tmp_path / "d", progress=steps.append)
    assert [step.completed for step in steps] == [1, 2, 3, 3]
    images: list[vs.Progress] = []
    for progress in (True, False, None, images.append):
        vs.check_data(coloured(), progress=progress)
    assert images == [vs.Progress("reading images", number, 36) for number in range(1, 37)]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_comparisons")
def test_a_comparison_reports_its_progress(tmp_path: Path) -> None:
    steps: list[vs.Progress] = []
    compare(tmp_path / "a", progress=True)
    compare(tmp_path / "b", progress=False)
    done = compare(tmp_path / "c", progress=steps.append)
    assert "head, seed 0" in steps[0].description
    assert 10 < len(repr(done)) < 400
    assert len(repr(done).splitlines()) <= 5


def test_the_repr_of_a_run_is_one_line_and_its_files_are_readable(tmp_path: Path) -> None:
    tuned = tune(tmp_path / "run")
    assert repr(tuned).count("\n") == 0
    assert "accuracy" in repr(tuned)
    assert len(repr(tuned)) < 400
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode for path in files} == {mode}


@pytest.mark.usefixtures("unchecked")
def test_numpy_numbers_are_accepted(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "birds", {"red": 3, "blue": 3})
    assert len(vs.load_data(folder, DataOptions(per_class=np.int64(1))).train) == 2  # type: ignore[arg-type]

"""finetune(): it learns, changes nothing else, and its folder is the model."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.coloured import coloured, coloured_folder, small_swin, small_vit
from tests.helpers.every_model import WAYS, same, weights
from vitscope.errors import CallError, OutputExistsError, WorkError
from vitscope.models.heads import reset_classifier
from vitscope.tune import finetune as finetune_module
from vitscope.tune import trainer
from vitscope.tune.data import load_data
from vitscope.tune.data_options import DataOptions
from vitscope.tune.metrics import macro_f1, wilson_interval
from vitscope.tune.run_folder import read_run

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pickles")

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8}
LEARNS: dict[str, Any] = {"epochs": 4, "batch_size": 4, "learning_rate": 3e-3, "augment": ()}


def state(model: vs.VisionModel) -> dict[str, Any]:
    """Return everything besides the weights that a run could change: random numbers, flags, hooks, gradients."""
    numpy_state: Any = np.random.get_state()
    flags = [(name, child.training) for name, child in model.module.named_modules()]
    flags += [(name, parameter.requires_grad) for name, parameter in model.module.named_parameters()]
    hooks = sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in model.module.modules())
    grads = [parameter.grad for parameter in model.module.parameters()]
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[1].tolist(), *numpy_state[2:]),
        "python": random.getstate(),
        "flags": flags,
        "hooks": hooks,
        "gradients": grads,
        "settings": (torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
    }


def differing(before: Any, after: Any) -> list[str]:
    return [name for name in before if before[name] != after[name]]


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
@pytest.mark.parametrize("tuning", ["full", "lora", "adapter-parallel"])
def test_it_learns_and_its_folder_is_the_model(build: Any, tuning: str, tmp_path: Path) -> None:
    data, model = coloured(), build()
    tuned = vs.finetune(model, data, out=tmp_path / "run", tuning=tuning, **LEARNS)
    assert tuned.accuracy >= 0.75
    again = vs.load(tmp_path / "run")
    assert again.labels == data.labels
    images = [data.test.read(index) for index in range(len(data.test))]
    first, second = ([best.index for (best, *_) in model.predict(images)] for model in (again, tuned.model))
    assert first == tuned.predictions.tolist() == second
    assert same(weights(again), weights(tuned.model))
    record, labels = tuned.record, data.test.classes
    assert record["true_labels"] == labels.tolist()
    assert record["accuracy"] == np.mean(labels == tuned.predictions)
    assert record["interval"] == list(wilson_interval(int((labels == tuned.predictions).sum()), 12))
    assert record["macro_f1"] == macro_f1(tuned.confusion)
    assert tuned.confusion.sum(1).tolist() == [4, 4, 4]
    assert (record["epochs"], record["tuning"], record["labels"]) == (4, tuning, list(data.labels))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    assert not any(parameter.grad is not None for parameter in tuned.model.module.parameters())


@pytest.mark.usefixtures("unchecked")  # beartype draws from Python's random numbers
def test_the_model_that_is_passed_and_all_random_numbers_do_not_change(tmp_path: Path) -> None:
    model = small_vit(dropout=0.1)
    model.module.train()
    next(model.module.parameters()).requires_grad_(False)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before, weights_before = state(model), weights(model)

    def interrupt(step: vs.Progress) -> None:
        if step.completed == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.finetune(model, coloured(), out=tmp_path / "run", tuning="lora", progress=interrupt, **QUICK)
    assert differing(before, state(model)) == []
    vs.finetune(model, coloured(), out=tmp_path / "run", tuning="lora", **QUICK)
    assert differing(before, state(model)) == []
    assert same(weights(model), weights_before)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    results = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        run = vs.finetune(small_vit(dropout=0.1), coloured(), out=tmp_path / str(i), tuning="full", seed=seed, **QUICK)
        results.append(weights(run.model))
    assert same(results[0], results[1])
    assert not any(torch.equal(results[0][name], results[2][name]) for name in ("classifier.weight", "classifier.bias"))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [name for name in WAYS if name != "full"])
def test_frozen_weights_do_not_change_by_one_bit(tuning: str, tmp_path: Path) -> None:
    model = small_vit()
    before = weights(model)
    after = weights(vs.finetune(model, coloured(), out=tmp_path / "run", tuning=tuning, **QUICK).model)
    learned = {
        "bitfit": lambda name: name.endswith(".bias"),
        "layernorm": lambda name: "layernorm" in name,
        "lora": lambda name: name.endswith(("q_proj.weight", "v_proj.weight")),
    }.get(tuning, lambda _: False)
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed - {"classifier.weight", "classifier.bias"} == {
        name for name in before if learned(name) and not name.startswith("classifier.")
    }
    assert all(".adapter_" in name for name in after.keys() - before.keys())


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
def test_a_head_on_cached_features_equals_a_head_on_images(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = vs.finetune(build(), coloured(), out=tmp_path / "cached", recipe="report", epochs=3)
    batch_sizes: list[int] = []
    monkeypatch.setattr(finetune_module, "get_classifiers", lambda _: ["first", "second"])
    get = finetune_module.ImageDataset.__getitems__
    monkeypatch.setattr(
        finetune_module.ImageDataset,
        "__getitems__",
        lambda dataset, indices: (batch_sizes.append(len(indices)), get(dataset, indices))[1],
    )
    uncached = vs.finetune(build(), coloured(), out=tmp_path / "uncached", recipe="report", epochs=3)
    assert sum(batch_sizes) == 3 * (24 + 12) + 12
    for name, tensor in weights(cached.model).items():
        torch.testing.assert_close(weights(uncached.model)[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_finished_run_is_returned_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **QUICK)

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(finetune_module._Run, "train", refuse)
    for options in ({}, {"overwrite": True}, {"save_steps": 3}):
        again = vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **QUICK, **options)
        assert same(weights(again.model), weights(first.model))
        assert dict(again.record) == dict(first.record)
    assert dict(read_run(tmp_path / "run").record) == dict(first.record)


DIFFERENCES: dict[str, Any] = {
    "recipe": {"epochs": 2},
    "tuning": {"tuning": "bitfit"},
    "weights": {"model": small_vit(seed=1)},
    "data": {"data": replace(coloured(), name="other")},
    "images": {"data": coloured(27)},
    "library": {"model": small_swin()},
}


@pytest.mark.slow
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_run_with_other_settings_is_refused_unless_it_may_replace_the_old_one(
    difference: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"model": small_vit(), "data": coloured(), "out": tmp_path / "run", **QUICK}
    first = vs.finetune(**arguments)
    changed = arguments | DIFFERENCES[difference]
    with pytest.raises(OutputExistsError, match=r"holds a run with another .*: choose another --out") as error:
        vs.finetune(**changed)
    assert "\n" not in str(error.value)
    assert same(weights(vs.load(tmp_path / "run")), weights(first.model))
    assert (difference == "recipe") == ("recipe (epochs 1, not 2)" in str(error.value))
    replaced = vs.finetune(**changed, overwrite=True)
    assert replaced.folder == tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not same(weights(vs.load(tmp_path / "run")), weights(first.model)) or difference == "data"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == replaced.record["model"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "moving into place"])
def test_the_old_run_survives_until_the_new_one_is_finished(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"model": small_vit(), "data": coloured(), "out": tmp_path / "run", **QUICK}
    first = vs.finetune(**options)
    changed = options | {"epochs": 2, "overwrite": True, "save_steps": 1}

    def interrupt(*arguments: Any) -> None:
        if moment != "training" or arguments[0].completed == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment != "training":
            patch.setattr(finetune_module, "replace_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            vs.finetune(**changed, progress=interrupt if moment == "training" else None)
    assert dict(read_run(tmp_path / "run").record) == dict(first.record)
    assert same(weights(vs.load(tmp_path / "run")), weights(first.model))
    steps: list[int] = []
    again = vs.finetune(**changed, progress=lambda step: steps.append(step.completed))
    assert (min(steps) > 1) if moment == "training" else not steps
    assert again.record["epochs"] == 2
    assert dict(read_run(tmp_path / "run").record) == dict(again.record)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_class_names_make_another_run(tmp_path: Path) -> None:
    vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **QUICK)
    renamed = replace(coloured(), labels=("a", "b", "c"))
    with pytest.raises(OutputExistsError):
        vs.finetune(small_vit(), renamed, out=tmp_path / "run", **QUICK)


def test_another_split_of_the_same_images_makes_another_run(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "data", {"red": 10, "green": 10})
    vs.finetune(small_vit(), load_data(folder), out=tmp_path / "run", **QUICK)
    with pytest.raises(OutputExistsError):
        vs.finetune(small_vit(), load_data(folder, DataOptions(split_seed=1)), out=tmp_path / "run", **QUICK)


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="holds something other than a run: choose another"):
            vs.finetune(small_vit(), coloured(), out=tmp_path / "thesis", overwrite=overwrite, **QUICK)
        for out in ("chapter.txt", "chapter.txt/run"):
            with pytest.raises(CallError, match="is a file or lies inside one: choose another --out"):
                vs.finetune(small_vit(), coloured(), out=tmp_path / "thesis" / out, overwrite=overwrite, **QUICK)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "one"
    assert len(list((tmp_path / "thesis").iterdir())) == 1
    with pytest.raises(CallError, match="holds no finished run"):
        read_run(tmp_path / "thesis")


@pytest.mark.slow
def test_early_stop_keeps_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "tuning": "full",
        "batch_size": 4,
        "schedule": "constant",
        "warmup": 0,
        "validation": 0.25,
    }
    two = vs.finetune(small_vit(), coloured(), out=tmp_path / "two", epochs=2, **options)
    accuracies = iter([0.2, 0.9, 0.5, 0.9, 0.95])
    monkeypatch.setattr(trainer, "_accuracy", lambda _: {"accuracy": next(accuracies)})
    stopped = vs.finetune(small_vit(), coloured(), out=tmp_path / "stopped", epochs=9, early_stop=2, **options)
    assert stopped.record["epochs"] == 4
    assert same(weights(stopped.model), weights(two.model))


@pytest.mark.slow
def test_only_a_backbone_that_learns_uses_dropout(tmp_path: Path) -> None:
    modes: list[bool] = []
    for tuning, augment in (("head", ()), ("head", ("mirror",)), ("bitfit", ())):
        model = small_vit(dropout=0.5)
        modes.clear()
        reset = finetune_module.reset_classifier

        def record_modes(*arguments: Any, reset: Any = reset, **options: Any) -> vs.VisionModel:
            result = reset(*arguments, **options)
            result.module.vit.register_forward_hook(lambda module, *_: modes.append(module.training))
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune_module, "reset_classifier", record_modes)
            vs.finetune(
                model, coloured(), out=tmp_path / f"{tuning}{len(augment)}", tuning=tuning, augment=augment, **QUICK
            )
        assert any(modes) == (tuning == "bitfit")


def test_half_precision_runs_on_the_cpu(tmp_path: Path) -> None:
    tuned = vs.finetune(
        small_vit(), coloured(8, 4, 2), out=tmp_path / "o", tuning="full", precision="bfloat16", **QUICK
    )
    assert tuned.model.dtype == torch.float32
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(tuned.model).values())


def test_damaged_images_in_a_folder_are_refused_or_skipped(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "data", {"red": 8, "green": 8})
    (folder / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(WorkError, match=r"1 image of data cannot be read: .*broken\.png"):
        vs.finetune(small_vit(), folder, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
    options = DataOptions(unreadable="skip")
    with pytest.warns(vs.VitscopeWarning, match="skipped"):
        tuned = vs.finetune(small_vit(), folder, out=tmp_path / "run", data_options=options, **QUICK)
    assert tuned.record["images"]["train"] + tuned.record["images"]["test"] == 16
    with pytest.warns(vs.VitscopeWarning, match="skipped"):
        checked = vs.finetune(
            small_vit(), vs.check_data(load_data(folder)), out=tmp_path / "run", data_options=options, **QUICK
        )
    assert checked.record == tuned.record, "a checked data set is the same run"


def test_progress_and_log_report_every_step_and_epoch(tmp_path: Path) -> None:
    steps: list[vs.Progress] = []
    vs.finetune(small_vit(), coloured(), out=tmp_path / "o", progress=steps.append, epochs=2, batch_size=8)
    assert [step.completed for step in steps] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {(step.description, step.total) for step in steps} == {("training", 6)}
    evaluated = [step for step in steps if "accuracy" in step.metrics]
    assert [step.completed for step in evaluated] == [3, 6]
    assert all(step.metrics["loss"] > 0 for step in steps)
    rows = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "eval_accuracy" in row] == [1, 2]
    assert [step.metrics["accuracy"] for step in evaluated] == [
        row["eval_accuracy"] for row in rows if "eval_loss" in row
    ]


def test_the_check_of_a_folder_reports_progress_before_training(tmp_path: Path) -> None:
    folder, steps = coloured_folder(tmp_path / "data", {"red": 8, "green": 8}), []
    vs.finetune(small_vit(), folder, out=tmp_path / "run", progress=steps.append, **QUICK)
    reading = [step for step in steps if step.description == "reading images"]
    assert [(step.completed, step.total, step.metrics) for step in reading] == [(i + 1, 16, {}) for i in range(16)]
    assert {step.description for step in steps[16:]} == {"training"}


def test_a_tuned_model_can_be_tuned_again(tmp_path: Path) -> None:
    first = vs.finetune(small_vit(), coloured(), out=tmp_path / "a", tuning="lora", **QUICK)
    second = vs.finetune(tmp_path / "a", coloured(24, 12, 2), out=tmp_path / "b", **QUICK)
    before, after = weights(first.model), weights(second.model)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("classifier."))
    assert reset_classifier(second.model, ("x", "y")).labels == ("x", "y")

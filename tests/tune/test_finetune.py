"""finetune(): it learns, it leaves everything else alone, and its folder is the model."""

import json
import random
from collections.abc import Mapping
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
from vitscope.tune import finetune as finetuning
from vitscope.tune import trainer
from vitscope.tune.data import load_data
from vitscope.tune.metrics import macro_f1, wilson
from vitscope.tune.run_folder import read_run

pytestmark = pytest.mark.usefixtures("little_garbage", "no_pickles")

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8}
LEARNS: dict[str, Any] = {"epochs": 4, "batch_size": 4, "learning_rate": 3e-3, "augment": ()}


def state(model: vs.VisionModel) -> dict[str, Any]:
    """Random numbers, flags and gradients: all that a run could leave changed beside the weights."""
    numpy_state: Any = np.random.get_state()
    flags = [(name, one.training) for name, one in model.module.named_modules()]
    flags += [(name, one.requires_grad) for name, one in model.module.named_parameters()]
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.module.modules())
    grads = [one.grad for one in model.module.parameters()]
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


@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
@pytest.mark.parametrize("tuning", ["full", "lora", "adapter-parallel"])
def test_it_learns_and_the_folder_is_the_model(build: Any, tuning: str, tmp_path: Path) -> None:
    data, model = coloured(), build()
    tuned = vs.finetune(model, data, out=tmp_path / "run", tuning=tuning, **LEARNS)
    assert tuned.accuracy >= 0.75
    again = vs.load(tmp_path / "run")
    assert again.labels == data.labels
    images = [data.test.read(at) for at in range(len(data.test))]
    named = [found[0].index for found in again.predict(images)]
    assert named == tuned.said.tolist() == [found[0].index for found in tuned.model.predict(images)]
    assert same(weights(again), weights(tuned.model))
    about, truth = tuned.about, data.test.classes
    assert about["truth"] == truth.tolist()
    assert about["accuracy"] == np.mean(truth == tuned.said)
    assert about["interval"] == list(wilson(int((truth == tuned.said).sum()), 12))
    assert about["macro_f1"] == macro_f1(tuned.confusion)
    assert tuned.confusion.sum(1).tolist() == [4, 4, 4]
    assert (about["epochs"], about["tuning"], about["labels"]) == (4, tuning, list(data.labels))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    assert not any(one.grad is not None for one in tuned.model.module.parameters())


@pytest.mark.usefixtures("unchecked")  # beartype draws from Python's random numbers
def test_the_given_model_and_all_random_numbers_stay_as_they_were(tmp_path: Path) -> None:
    model = small_vit(dropout=0.1)
    model.module.train()
    next(model.module.parameters()).requires_grad_(False)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before, kept = state(model), weights(model)

    def fail(told: Mapping[str, float]) -> None:
        if told["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.finetune(model, coloured(), out=tmp_path / "run", tuning="lora", progress=fail, **QUICK)
    assert differing(before, state(model)) == []
    vs.finetune(model, coloured(), out=tmp_path / "run", tuning="lora", **QUICK)
    assert differing(before, state(model)) == []
    assert same(weights(model), kept)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        run = vs.finetune(small_vit(dropout=0.1), coloured(), out=tmp_path / str(i), tuning="full", seed=seed, **QUICK)
        found.append(weights(run.model))
    assert same(found[0], found[1])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in ("classifier.weight", "classifier.bias"))


@pytest.mark.parametrize("tuning", [name for name in WAYS if name != "full"])
def test_what_is_frozen_comes_out_bit_by_bit(tuning: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
def test_a_head_on_features_kept_is_the_head_on_images(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = vs.finetune(build(), coloured(), out=tmp_path / "kept", recipe="report", epochs=3)
    fed: list[int] = []
    monkeypatch.setattr(finetuning, "heads", lambda _: ["one", "other"])
    get = finetuning.ImageDataset.__getitems__
    monkeypatch.setattr(
        finetuning.ImageDataset, "__getitems__", lambda feed, at: (fed.append(len(at)), get(feed, at))[1]
    )
    anew = vs.finetune(build(), coloured(), out=tmp_path / "anew", recipe="report", epochs=3)
    assert sum(fed) == 3 * (24 + 12) + 12
    for name, tensor in weights(kept.model).items():
        torch.testing.assert_close(weights(anew.model)[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_finished_run_is_given_back_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **QUICK)

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(finetuning._Run, "trained", refuse)
    for options in ({}, {"overwrite": True}, {"save_steps": 3}):
        again = vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **QUICK, **options)
        assert same(weights(again.model), weights(first.model))
        assert dict(again.about) == dict(first.about)
    assert dict(read_run(tmp_path / "run").about) == dict(first.about)


OTHERS: dict[str, Any] = {
    "recipe": {"epochs": 2},
    "tuning": {"tuning": "bitfit"},
    "weights": {"model": small_vit(seed=1)},
    "data": {"data": replace(coloured(), name="other")},
    "images": {"data": coloured(27)},
    "library": {"model": small_swin()},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_does_not_take_the_place_of_one(what: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": small_vit(), "data": coloured(), "out": tmp_path / "run", **QUICK}
    first = vs.finetune(**given)
    other = given | OTHERS[what]
    with pytest.raises(OutputExistsError, match=r"holds a run with another .*: choose another --out") as error:
        vs.finetune(**other)
    assert "\n" not in str(error.value)
    assert same(weights(vs.load(tmp_path / "run")), weights(first.model))
    assert (what == "recipe") == ("recipe (epochs 1, not 2)" in str(error.value))
    replaced = vs.finetune(**other, overwrite=True)
    assert replaced.folder == tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not same(weights(vs.load(tmp_path / "run")), weights(first.model)) or what == "data"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == replaced.about["model"]


@pytest.mark.parametrize("moment", ["training", "taking its place"])
def test_a_run_that_is_replaced_is_whole_until_the_new_one_is(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"model": small_vit(), "data": coloured(), "out": tmp_path / "run", **QUICK}
    first = vs.finetune(**given)
    other = given | {"epochs": 2, "overwrite": True, "save_steps": 1}

    def stop(*told: Any) -> None:
        if moment != "training" or told[0]["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment != "training":
            patch.setattr(finetuning, "take_place", stop)
        with pytest.raises(KeyboardInterrupt):
            vs.finetune(**other, progress=stop if moment == "training" else None)
    assert dict(read_run(tmp_path / "run").about) == dict(first.about)
    assert same(weights(vs.load(tmp_path / "run")), weights(first.model))
    told: list[float] = []
    again = vs.finetune(**other, progress=lambda found: told.append(found["step"]))
    assert (min(told) > 1) if moment == "training" else not told
    assert again.about["epochs"] == 2
    assert dict(read_run(tmp_path / "run").about) == dict(again.about)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_names_for_the_classes_make_another_run(tmp_path: Path) -> None:
    vs.finetune(small_vit(), coloured(), out=tmp_path / "run", **QUICK)
    renamed = replace(coloured(), labels=("a", "b", "c"))
    with pytest.raises(OutputExistsError):
        vs.finetune(small_vit(), renamed, out=tmp_path / "run", **QUICK)


def test_another_split_of_the_same_images_makes_another_run(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "data", {"red": 10, "green": 10})
    vs.finetune(small_vit(), load_data(folder, seed=0), out=tmp_path / "run", **QUICK)
    with pytest.raises(OutputExistsError):
        vs.finetune(small_vit(), load_data(folder, seed=1), out=tmp_path / "run", **QUICK)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="holds something else than a run: choose another"):
            vs.finetune(small_vit(), coloured(), out=tmp_path / "thesis", overwrite=overwrite, **QUICK)
        for out in ("chapter.txt", "chapter.txt/run"):
            with pytest.raises(CallError, match="is a file, or lies under one: choose another --out"):
                vs.finetune(small_vit(), coloured(), out=tmp_path / "thesis" / out, overwrite=overwrite, **QUICK)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "one"
    assert len(list((tmp_path / "thesis").iterdir())) == 1
    with pytest.raises(CallError, match="holds no finished run"):
        read_run(tmp_path / "thesis")


def test_early_stop_keeps_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"tuning": "full", "batch_size": 4, "schedule": "constant", "warmup": 0, "validation": 0.25}
    two = vs.finetune(small_vit(), coloured(), out=tmp_path / "two", epochs=2, **given)
    accuracies = iter([0.2, 0.9, 0.5, 0.9, 0.95])
    monkeypatch.setattr(trainer, "_accuracy", lambda _: {"accuracy": next(accuracies)})
    stopped = vs.finetune(small_vit(), coloured(), out=tmp_path / "stopped", epochs=9, early_stop=2, **given)
    assert stopped.about["epochs"] == 4
    assert same(weights(stopped.model), weights(two.model))


def test_a_frozen_backbone_runs_without_dropout_and_a_learning_one_with_it(tmp_path: Path) -> None:
    modes: list[bool] = []
    for tuning, augment in (("head", ()), ("head", ("mirror",)), ("bitfit", ())):
        model = small_vit(dropout=0.5)
        modes.clear()
        made = finetuning.reset_classifier

        def watched(*given: Any, made: Any = made, **options: Any) -> vs.VisionModel:
            found = made(*given, **options)
            found.module.vit.register_forward_hook(lambda module, *_: modes.append(module.training))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetuning, "reset_classifier", watched)
            vs.finetune(
                model, coloured(), out=tmp_path / f"{tuning}{len(augment)}", tuning=tuning, augment=augment, **QUICK
            )
        assert any(modes) == (tuning == "bitfit")


def test_half_precision_runs_on_the_processor(tmp_path: Path) -> None:
    tuned = vs.finetune(
        small_vit(), coloured(8, 4, 2), out=tmp_path / "o", tuning="full", precision="bfloat16", **QUICK
    )
    assert tuned.model.dtype == torch.float32
    assert all(bool(torch.isfinite(one).all()) for one in weights(tuned.model).values())


def test_a_folder_is_inspected_and_its_damage_refused_or_skipped(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "data", {"red": 8, "green": 8})
    (folder / "red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(WorkError, match=r"1 image of data cannot be read: .*broken\.png"):
        vs.finetune(small_vit(), folder, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
    with pytest.warns(vs.VitscopeWarning, match="skipped"):
        tuned = vs.finetune(small_vit(), folder, out=tmp_path / "run", unreadable="skip", **QUICK)
    assert tuned.about["images"]["train"] + tuned.about["images"]["test"] == 16
    with pytest.raises(CallError, match="unreadable is 'ignore': refuse or skip"):
        vs.finetune(small_vit(), folder, out=tmp_path / "other", unreadable="ignore")


def test_progress_and_log_tell_of_every_step_and_epoch(tmp_path: Path) -> None:
    told: list[Mapping[str, float]] = []
    vs.finetune(small_vit(), coloured(), out=tmp_path / "o", progress=told.append, epochs=2, batch_size=8)
    assert sorted({one["step"] for one in told}) == [1, 2, 3, 4, 5, 6]
    assert {one["steps"] for one in told} == {6}
    rows = [json.loads(line) for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "eval_accuracy" in row] == [1, 2]


def test_a_tuned_model_is_tuned_again(tmp_path: Path) -> None:
    first = vs.finetune(small_vit(), coloured(), out=tmp_path / "a", tuning="lora", **QUICK)
    second = vs.finetune(tmp_path / "a", coloured(24, 12, 2), out=tmp_path / "b", **QUICK)
    kept, after = weights(first.model), weights(second.model)
    assert all(torch.equal(after[name], kept[name]) for name in kept if not name.startswith("classifier."))
    assert reset_classifier(second.model, ("x", "y")).labels == ("x", "y")

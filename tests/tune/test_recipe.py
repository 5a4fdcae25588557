"""Recipes of training, the optimizers that they name, and the schedules of their learning rates."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import vitscope as vs
from tests.helpers.coloured import small_swin, small_vit
from tests.helpers.every_model import LABELS
from vitscope.errors import CallError, VitscopeError
from vitscope.models.heads import reset_classifier
from vitscope.tune.methods import prepare
from vitscope.tune.muon import Muon, orthogonal
from vitscope.tune.recipe import PRESETS, Recipe, read_recipe
from vitscope.tune.trainer import _optimizer, arguments


def refused(**settings: Any) -> str:
    with pytest.raises(CallError) as error:
        Recipe(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_reports_recipe_is_the_reports() -> None:
    report = read_recipe("report")
    assert (report.epochs, report.rate("head"), report.weight_decay, report.schedule) == (10, 1e-3, 1e-4, "constant")
    assert (report.warmup, report.augment, report.label_smoothing, report.clip) == (0, (), 0, 0)
    assert set(PRESETS) == {"report", "modern"}
    assert read_recipe("modern") == Recipe()


def test_full_tuning_learns_ten_times_slower_unless_told() -> None:
    assert [Recipe().rate(tuning) for tuning in ("head", "lora", "adapter-mlp", "full")] == [1e-3, 1e-3, 1e-3, 1e-4]
    assert Recipe(learning_rate=1).rate("full") == 1.0
    assert Recipe(learning_rate=0).rate("head") == 0.0


def test_changes_take_the_place_of_settings_and_none_leaves_them() -> None:
    made = read_recipe("report", epochs=3, seed=None, augment=["mirror"])
    assert (made.epochs, made.seed, made.augment, made.weight_decay) == (3, 0, ("mirror",), 1e-4)
    assert PRESETS["report"].epochs == 10
    assert read_recipe(made, epochs=4).augment == ("mirror",)


def test_a_toml_file_builds_on_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "report"\nepochs = 2\naugment = ["mirror", "shift"]\nbetas = [0.8, 0.9]\n')
    made = read_recipe(path, batch_size=4)
    assert (made.epochs, made.augment, made.betas, made.batch_size) == (2, ("mirror", "shift"), (0.8, 0.9), 4)
    assert made.schedule == "constant"
    path.write_text("epochs = 5\n")
    assert read_recipe(str(path)) == Recipe(epochs=5)
    assert Recipe(**{**Recipe().as_json(), "epochs": 5}) == Recipe(epochs=5)


BAD_FILES = {
    "epochs = ": "is no recipe",
    "speed = 3": "has no setting 'speed': it has accumulate, ",
    'base = "old"': "builds on 'old': choose report, modern",
    "epochs = 0": "epochs is 0, at least 1",
    'epochs = "three"': "epochs is 'three'",
    "warmup = 2": "warmup is 2, a number between 0 and 1",
    "betas = [1.0, 0.9]": "betas is (1.0, 0.9), two numbers from 0 to below 1 are expected",
    "betas = [0.9]": "betas is (0.9,), two numbers from 0",
    "betas = 0.9": "betas is 0.9, two numbers from 0",
    'augment = ["blur"]': "unknown augmentation 'blur': choose mirror, shift, crop, light",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_recipe_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(CallError) as error:
        jaxtyping_off(path)
    assert BAD_FILES[text] in str(error.value)
    assert "\n" not in str(error.value)


def jaxtyping_off(path: Path) -> Recipe:
    """What a user gets, who has no type checks."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return read_recipe(path)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_recipe_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    for name, told in (("modem", "unknown recipe 'modem': choose report, modern"), (tmp_path / "no.toml", "not exist")):
        with pytest.raises(VitscopeError, match=told):
            read_recipe(name)
    with pytest.raises(CallError, match="a recipe has no setting 'speed'"):
        read_recipe("report", speed=3)


def test_bad_values_are_one_line() -> None:
    for name in ("epochs", "batch_size", "accumulate"):
        assert refused(**{name: 0}) == f"{name} is 0, at least 1 is expected"
    for name in ("warmup", "decay", "label_smoothing", "validation"):
        assert "a number between 0 and 1" in refused(**{name: 1.5})
    for name in ("weight_decay", "clip", "learning_rate", "muon_learning_rate"):
        assert refused(**{name: -1}) == f"{name} is -1: choose 0 to 3.4e+38"
        assert refused(**{name: 1e39}) == f"{name} is 1e+39: choose 0 to 3.4e+38"
        assert refused(**{name: 10**400}).endswith("a number is expected")
        assert refused(**{name: math.nan}) == f"{name} is nan, a number is expected"
    assert refused(schedule="step") == "unknown schedule 'step': choose constant, cosine, trapezoid"
    assert refused(optimizer="sgd") == "unknown optimizer 'sgd': choose adamw, muon"
    assert refused(precision="int8") == "unknown precision 'int8': choose float32, bfloat16, float16"
    assert refused(early_stop=2) == "early_stop needs validation, a share of the training images to watch"
    assert "early_stop is 0" in refused(early_stop=0, validation=0.1)
    assert "seed is -1" in refused(seed=-1)


def rates(recipe: Recipe, steps: int = 20) -> list[float]:
    """The share of the learning rate at each step, from the library's own schedule."""
    args = arguments(recipe, "head", Path("unused"), steps, on_cpu=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*found, schedule.get_last_lr()[0]]


def test_the_learning_rate_follows_its_schedule() -> None:
    assert rates(Recipe(schedule="constant", warmup=0)) == [1.0] * 21
    rising = [0, 0.25, 0.5, 0.75]
    assert rates(Recipe(schedule="constant", warmup=0.2)) == [*rising, *[1.0] * 17]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 16)) for i in range(17)]
    assert rates(Recipe(schedule="cosine", warmup=0.2)) == pytest.approx([*rising, *cosine])
    trapezoid = rates(Recipe(schedule="trapezoid", warmup=0.2, decay=0.5))
    assert trapezoid[:11] == [*rising, *[1.0] * 7]
    assert trapezoid[10:] == pytest.approx(np.linspace(1, 0, 11).tolist())


def test_what_the_engine_is_told() -> None:
    recipe = Recipe(precision="bfloat16", accumulate=3, clip=0.5, seed=7, batch_size=5, epochs=2)
    args = arguments(recipe, "full", Path("unused"), 10, on_cpu=True)
    assert (args.bf16, args.fp16, args.gradient_accumulation_steps, args.max_grad_norm) == (True, False, 3, 0.5)
    assert (args.seed, args.data_seed, args.per_device_train_batch_size, args.num_train_epochs) == (7, 7, 5, 2)
    assert (args.learning_rate, args.save_strategy, args.report_to) == (1e-4, "epoch", [])


@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
@pytest.mark.parametrize("tuning", ["full", "lora", "adapter-mlp"])
def test_only_weights_of_linear_layers_and_convolutions_decay(build: Any, tuning: str) -> None:
    model: vs.VisionModel = reset_classifier(build(), LABELS)
    prepare(model, tuning)
    recipe = Recipe(weight_decay=0.3)
    args = arguments(recipe, tuning, Path("unused"), 10, on_cpu=True)
    optimizer = _optimizer(model.module, recipe, args)
    names = {id(one): name for name, one in model.module.named_parameters()}
    decays = {names[id(one)]: group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert set(decays) == {name for name, one in model.module.named_parameters() if one.requires_grad}
    for name, decay in decays.items():
        parameter = model.module.get_parameter(name)
        table = "position" in name or "token" in name
        assert decay == (0.3 if parameter.ndim > 1 and not table else 0.0), name


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    model = reset_classifier(small_vit(), LABELS)
    prepare(model, "full")
    recipe = Recipe(optimizer="muon", muon_learning_rate=0.02, learning_rate=0.5)
    args = arguments(recipe, "full", Path("unused"), 10, on_cpu=True)
    optimizer = _optimizer(model.module, recipe, args)
    names = {id(one): name for name, one in model.module.named_parameters()}
    (group,) = [group for group in optimizer.param_groups if group["matrices"]]
    taken = {names[id(one)] for one in group["params"]}
    assert group["lr"] == 0.02
    assert {other["lr"] for other in optimizer.param_groups if other is not group} == {0.5}
    assert taken == {n for n, one in model.module.named_parameters() if ".layers." in n and one.ndim == 2}
    assert len(taken) == 12


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_singular_values_are_moved_to_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 100
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert not orthogonal(torch.zeros(3, 4)).any()


def test_muon_for_other_groups_is_adamw() -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    muon = Muon([{"params": [mine], "lr": 0.1, "weight_decay": 0.2}], (0.8, 0.95))
    adam = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    for _ in range(5):
        mine.grad = torch.randn(3, 4)
        theirs.grad = mine.grad.clone()
        muon.step()
        adam.step()
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_muon_steps_along_its_orthogonal_momentum() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 10))
    muon = Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.5, "matrices": True}], (0.9, 0.999))
    average = torch.zeros(6, 10)
    for _ in range(3):
        gradient, before = torch.randn(6, 10), parameter.detach().clone()
        parameter.grad = gradient.clone()
        muon.step()
        average = 0.95 * average + 0.05 * gradient
        update = orthogonal(0.05 * gradient + 0.95 * average)
        expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 10**0.5 * update
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(parameter.grad, gradient)

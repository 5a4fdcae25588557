"""Training recipes, their optimizers, and the schedules of their learning rates."""

import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
from vitscope.tune.augmentation import AUGMENTATIONS
from vitscope.tune.methods import prepare
from vitscope.tune.muon import Muon, orthogonalize
from vitscope.tune.recipe import PRESETS, Augmentation, Recipe, RecipeChanges, read_recipe
from vitscope.tune.trainer import _optimizer, training_arguments


def refusal(**settings: Any) -> str:
    with pytest.raises(CallError) as error:
        Recipe(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_report_preset_has_the_settings_of_the_report() -> None:
    report = read_recipe("report")
    assert (report.epochs, report.rate("head"), report.weight_decay, report.schedule) == (10, 1e-3, 1e-4, "constant")
    assert (report.warmup, report.augment, report.label_smoothing, report.clip) == (0, (), 0, 0)
    assert set(PRESETS) == {"report", "modern"}
    assert read_recipe("modern") == Recipe()


def test_full_tuning_learns_ten_times_slower_by_default() -> None:
    assert [Recipe().rate(tuning) for tuning in ("head", "lora", "adapter-mlp", "full")] == [1e-3, 1e-3, 1e-3, 1e-4]
    assert Recipe(learning_rate=1).rate("full") == 1.0
    assert Recipe(learning_rate=0).rate("head") == 0.0


def test_changes_replace_settings_and_none_keeps_them() -> None:
    recipe = read_recipe("report", epochs=3, seed=None, augment=["mirror"])
    assert (recipe.epochs, recipe.seed, recipe.augment, recipe.weight_decay) == (3, 0, ("mirror",), 1e-4)
    assert PRESETS["report"].epochs == 10
    assert read_recipe(recipe, epochs=4).augment == ("mirror",)


def test_a_toml_file_changes_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "report"\nepochs = 2\naugment = ["mirror", "shift"]\nbetas = [0.8, 0.9]\n')
    recipe = read_recipe(path, batch_size=4)
    assert (recipe.epochs, recipe.augment, recipe.betas, recipe.batch_size) == (2, ("mirror", "shift"), (0.8, 0.9), 4)
    assert recipe.schedule == "constant"
    path.write_text("epochs = 5\n")
    assert read_recipe(str(path)) == Recipe(epochs=5)
    assert Recipe(**{**Recipe().as_json(), "epochs": 5}) == Recipe(epochs=5)


BAD_FILES = {
    "epochs = ": "is not a recipe",
    "speed = 3": "has no setting 'speed': choose accumulate, ",
    'base = "old"': "has the base 'old': choose report, modern",
    "epochs = 0": "epochs is 0, at least 1",
    'epochs = "three"': "epochs is 'three'",
    "warmup = 2": "warmup is 2, a number between 0 and 1",
    "betas = [1.0, 0.9]": "betas is (1.0, 0.9): pass two numbers from 0 to below 1",
    "betas = [0.9]": "betas is (0.9,): pass two numbers from 0",
    "betas = 0.9": "betas is 0.9: pass two numbers from 0",
    'augment = ["blur"]': "unknown augmentation 'blur': choose mirror, shift, crop, light",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_file_with_a_wrong_setting_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(CallError) as error:
        read_without_type_checks(path)
    assert BAD_FILES[text] in str(error.value)
    assert "\n" not in str(error.value)


def read_without_type_checks(path: Path) -> Recipe:
    """Read a recipe without type checks, as users do."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return read_recipe(path)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_recipe_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("modem", "unknown recipe 'modem': choose report, modern"),
        (tmp_path / "no.toml", "not exist"),
    ):
        with pytest.raises(VitscopeError, match=message):
            read_recipe(name)
    with pytest.raises(CallError, match="a recipe has no setting 'speed'"):
        read_recipe("report", speed=3)


@pytest.mark.usefixtures("unchecked")
def test_values_out_of_range_are_refused() -> None:
    for name in ("epochs", "batch_size", "accumulate"):
        assert refusal(**{name: 0}) == f"{name} is 0, at least 1 is expected"
    for name in ("warmup", "decay", "label_smoothing", "validation"):
        assert "a number between 0 and 1" in refusal(**{name: 1.5})
    for name in ("weight_decay", "clip", "learning_rate", "muon_learning_rate"):
        assert refusal(**{name: -1}) == f"{name} is -1: choose 0 to 3.4e+38"
        assert refusal(**{name: 1e39}) == f"{name} is 1e+39: choose 0 to 3.4e+38"
        assert refusal(**{name: 10**400}).endswith("a number is expected")
        assert refusal(**{name: math.nan}) == f"{name} is nan, a number is expected"
    assert refusal(schedule="step") == "unknown schedule 'step': choose constant, cosine, trapezoid"
    assert refusal(optimizer="sgd") == "unknown optimizer 'sgd': choose adamw, muon"
    assert refusal(precision="int8") == "unknown precision 'int8': choose float32, bfloat16, float16"
    assert refusal(early_stop=2) == "early_stop needs validation, a share of the training images to hold out"
    assert "early_stop is 0" in refusal(early_stop=0, validation=0.1)
    assert "seed is -1" in refusal(seed=-1)


def test_changes_have_the_names_and_types_of_the_recipe() -> None:
    assert get_type_hints(RecipeChanges) == get_type_hints(Recipe)


def test_every_named_augmentation_exists() -> None:
    assert tuple(AUGMENTATIONS) == get_args(Augmentation)


def rates(recipe: Recipe, steps: int = 20) -> list[float]:
    """Return the share of the learning rate at each step, from the schedule of the library."""
    args = training_arguments(recipe, "head", Path("unused"), steps, on_cpu=True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    shares = []
    for _ in range(steps):
        shares.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*shares, schedule.get_last_lr()[0]]


def test_the_learning_rate_follows_its_schedule() -> None:
    assert rates(Recipe(schedule="constant", warmup=0)) == [1.0] * 21
    rising = [0, 0.25, 0.5, 0.75]
    assert rates(Recipe(schedule="constant", warmup=0.2)) == [*rising, *[1.0] * 17]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 16)) for i in range(17)]
    assert rates(Recipe(schedule="cosine", warmup=0.2)) == pytest.approx([*rising, *cosine])
    trapezoid = rates(Recipe(schedule="trapezoid", warmup=0.2, decay=0.5))
    assert trapezoid[:11] == [*rising, *[1.0] * 7]
    assert trapezoid[10:] == pytest.approx(np.linspace(1, 0, 11).tolist())


def test_the_arguments_of_the_engine() -> None:
    recipe = Recipe(precision="bfloat16", accumulate=3, clip=0.5, seed=7, batch_size=5, epochs=2)
    args = training_arguments(recipe, "full", Path("unused"), 10, on_cpu=True)
    assert (args.bf16, args.fp16, args.gradient_accumulation_steps, args.max_grad_norm) == (True, False, 3, 0.5)
    assert (args.seed, args.data_seed, args.per_device_train_batch_size, args.num_train_epochs) == (7, 7, 5, 2)
    assert (args.learning_rate, args.save_strategy, args.report_to) == (1e-4, "epoch", [])


@pytest.mark.parametrize("build", [small_vit, small_swin], ids=["vit", "swin"])
@pytest.mark.parametrize("tuning", ["full", "lora", "adapter-mlp"])
def test_only_weights_of_linear_layers_and_convolutions_decay(build: Any, tuning: str) -> None:
    model: vs.VisionModel = reset_classifier(build(), LABELS)
    prepare(model, tuning)
    recipe = Recipe(weight_decay=0.3)
    args = training_arguments(recipe, tuning, Path("unused"), 10, on_cpu=True)
    optimizer = _optimizer(model.module, recipe, args)
    names = {id(weight): name for name, weight in model.module.named_parameters()}
    decays = {
        names[id(weight)]: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]
    }
    assert set(decays) == {name for name, weight in model.module.named_parameters() if weight.requires_grad}
    for name, decay in decays.items():
        parameter = model.module.get_parameter(name)
        table = "position" in name or "token" in name
        assert decay == (0.3 if parameter.ndim > 1 and not table else 0.0), name


def test_muon_updates_only_the_matrices_of_the_blocks() -> None:
    model = reset_classifier(small_vit(), LABELS)
    prepare(model, "full")
    recipe = Recipe(optimizer="muon", muon_learning_rate=0.02, learning_rate=0.5)
    args = training_arguments(recipe, "full", Path("unused"), 10, on_cpu=True)
    optimizer = _optimizer(model.module, recipe, args)
    names = {id(weight): name for name, weight in model.module.named_parameters()}
    (group,) = [group for group in optimizer.param_groups if group["matrices"]]
    matrices = {names[id(weight)] for weight in group["params"]}
    assert group["lr"] == 0.02
    assert {entry["lr"] for entry in optimizer.param_groups if entry is not group} == {0.5}
    assert matrices == {n for n, weight in model.module.named_parameters() if ".layers." in n and weight.ndim == 2}
    assert len(matrices) == 12


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4)])
def test_singular_values_are_moved_to_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 100
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert not orthogonalize(torch.zeros(3, 4)).any()


def test_muon_updates_other_groups_as_adamw_does() -> None:
    torch.manual_seed(0)
    parameter, expected = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    muon = Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.2}], (0.8, 0.95))
    adam = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    for _ in range(5):
        parameter.grad = torch.randn(3, 4)
        expected.grad = parameter.grad.clone()
        muon.step()
        adam.step()
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)


def test_muon_steps_along_its_orthogonalized_momentum() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 10))
    muon = Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.5, "matrices": True}], (0.9, 0.999))
    average = torch.zeros(6, 10)
    for _ in range(3):
        gradient, before = torch.randn(6, 10), parameter.detach().clone()
        parameter.grad = gradient.clone()
        muon.step()
        average = 0.95 * average + 0.05 * gradient
        update = orthogonalize(0.05 * gradient + 0.95 * average)
        expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 10**0.5 * update
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(parameter.grad, gradient)

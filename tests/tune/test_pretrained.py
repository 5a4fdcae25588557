"""Fine-tuning starts from every pretrained weight, and never changes a frozen one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vitscope as vs
from tests.helpers.coloured import coloured, small_swin, small_vit
from tests.helpers.every_model import LABELS, WAYS, case, every_case, weights
from tests.helpers.tiny import tiny_vit
from vitscope.errors import VitscopeError, WorkError
from vitscope.models.heads import reset_classifier
from vitscope.tune import finetune as finetune_module
from vitscope.tune.methods import prepare
from vitscope.tune.pretrained import check_frozen_weights, check_pretrained_weights, frozen_digests

pytestmark = pytest.mark.usefixtures("little_garbage")
OPTIONS: dict[str, Any] = {"epochs": 1, "batch_size": 8, "augment": ()}


def prepared(model: vs.VisionModel, tuning: str) -> vs.VisionModel:
    trainable = reset_classifier(model, LABELS, by_windows=tuning == "window-cls")
    prepare(trainable, tuning)
    return trainable


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("tuning", ["head", "lora", "adapter-both"])
def test_every_family_keeps_its_weights(case: Any, tuning: str) -> None:
    model = case.model()
    check_pretrained_weights(model, prepared(model, tuning))


@pytest.mark.slow
@pytest.mark.parametrize("model", [small_vit, small_swin], ids=["transformers", "timm"])
@pytest.mark.parametrize("tuning", WAYS)
def test_every_tuning_method_keeps_the_weights(model: Callable[[], vs.VisionModel], tuning: str) -> None:
    base = model()
    check_pretrained_weights(base, prepared(base, tuning))


def test_tokens_in_windows_keep_the_weights() -> None:
    base = small_swin()
    check_pretrained_weights(base, prepared(base, "window-cls"))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["head", "lora"])
@every_case
def test_one_changed_value_is_detected(case: Any, tuning: str) -> None:
    base = case.model()
    trainable = prepared(base, tuning)
    frozen = (weight for weight in trainable.module.parameters() if weight.ndim >= 2 and not weight.requires_grad)
    parameter = next(frozen)
    with torch.no_grad():
        parameter.view(-1)[0] += 1
    with pytest.raises(WorkError, match=r"would lose 1 pretrained tensor \(\S+\)"):
        check_pretrained_weights(base, trainable)


def test_a_loader_that_drops_weights_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.ViTForImageClassification, "load_state_dict", lambda *_, **__: None)
    monkeypatch.setattr(finetune_module, "check_folder", lambda _: None)
    steps: list[vs.Progress] = []
    with pytest.raises(WorkError, match=r"would lose \d+ pretrained tensors \(\S+, \S+, \S+ and \d+ more\)") as error:
        vs.finetune(small_vit(seed=5), coloured(), out=tmp_path / "run", progress=steps.append, **OPTIONS)
    assert "\n" not in str(error.value)
    assert not steps
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_never_loses_its_weights(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["query", "q_proj"], init_lora_weights=False)
    base = vs.load(get_peft_model(tiny_vit(), config))
    try:
        tuned = vs.finetune(base, coloured(), out=tmp_path / "run", tuning="head", **OPTIONS)
    except VitscopeError as error:
        message = str(error)
    else:
        check_pretrained_weights(base, tuned.model)
        return
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["head", "bitfit", "adapter-mlp", "lora"])
@pytest.mark.parametrize("name", ["transformers-vit", "timm-swin", "torchvision-vit"])
def test_a_run_leaves_frozen_weights_bit_equal(name: str, tuning: str, tmp_path: Path) -> None:
    model = case(name).model()
    tuned = vs.finetune(model, coloured(8, 4, 2), out=tmp_path / "run", tuning=tuning, **OPTIONS)
    before, after = weights(model), weights(tuned.model)
    norms = [key for key in before if ("norm" in key or ".ln" in key) and key.endswith("weight")]
    assert norms
    assert all(torch.equal(before[key], after.get(key, after.get(f"backbone.{key}", before[key][:0]))) for key in norms)


def test_a_frozen_weight_that_changed_in_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit()

    def change_a_weight(step: vs.Progress) -> None:  # noqa: ARG001
        parameter = next(weight for weight in modules[0].parameters() if not weight.requires_grad)
        parameter.data.view(-1)[0] += 1e-3

    modules: list[nn.Module] = []
    prepare_ = finetune_module.prepare

    def remember(trainable: vs.VisionModel, *arguments: Any, **options: Any) -> Any:
        modules.append(trainable.module)
        return prepare_(trainable, *arguments, **options)

    monkeypatch.setattr(finetune_module, "prepare", remember)
    with pytest.raises(WorkError, match=r"changed 1 frozen tensor \(\S+\)"):
        vs.finetune(model, coloured(), out=tmp_path / "run", tuning="lora", progress=change_a_weight, **OPTIONS)
    assert not (tmp_path / "run" / "result.json").exists()


def test_statistics_of_a_normalization_may_change_only_if_the_backbone_trains() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    module.requires_grad_(False)
    training, evaluating = (frozen_digests(module, evaluating=flag) for flag in (False, True))
    module.train()(torch.randn(2, 3, 4, 4, device="cpu"))
    check_frozen_weights(module, training, "m")
    with pytest.raises(WorkError, match=r"changed 3 frozen tensors \(1.running_mean"):
        check_frozen_weights(module, evaluating, "m")

"""All methods explain the numbers that predict() returns, whatever the output of the model means."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import PHOTO, WithOutput, hf_vit, images, timm_vit
from tests.models.test_outputs import heads, identity, module_rows, sigmoid, softmax, with_head
from vitscope.errors import CallError

EVERY_MEANING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda: timm_vit(5), {}, softmax, "probability"),
    "sigmoid": (lambda: hf_vit(5, problem_type="multi_label_classification"), {}, sigmoid, "probability"),
    "single output": (lambda: timm_vit(1), {}, sigmoid, "probability"),
    "softmax at the end": (lambda: with_head(nn.Softmax(-1)), {}, identity, "probability"),
    "sigmoid at the end": (lambda: WithOutput(torch.sigmoid), {}, torch.sigmoid, "probability"),
    "stated": (WithOutput, {"output": "sigmoid"}, sigmoid, "probability"),
    "selected": (lambda: WithOutput(heads), {"select": "species", "output": "logits"}, softmax, "probability"),
    "regression": (lambda: hf_vit(3, problem_type="regression"), {}, identity, "value"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_MEANING)
def test_all_methods_explain_the_same_numbers(case: str) -> None:
    build, options, formula, kind = EVERY_MEANING[case]
    module, pixels = build(), images(1)
    expected = formula(module_rows(module, pixels))[0].double()
    model = vs.load(module, **options)
    column = len(expected) - 1
    quick: dict[str, Any] = {"segments": "patches", "target": column}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)  # few samples
        results: dict[str, Any] = {
            "lime": vs.lime(model, pixels, num_samples=24, **quick),
            "kernel_shap": vs.kernel_shap(model, pixels, num_samples=40, **quick),
            "occlusion": vs.occlusion(model, pixels, target=column),
            "rise": vs.rise(model, pixels, target=column, num_samples=8, cells=2),
        }
        composed = vs.compose(model, pixels, (8, 8, 8, 8), tests=("size",), scales=[1.0])
        rollout = vs.occlusion(model, pixels, target=column)
        faithful = vs.faithfulness(model, pixels, rollout, target=column, steps=2)
    for result in results.values():
        assert result.provenance["parameters"]["output"] == kind
        assert result.provenance["output"] == model.meaning
    for method in ("lime", "kernel_shap"):
        assert results[method].output == pytest.approx(float(expected[column]), abs=1e-5)
    assert composed.output == kind
    assert composed.outputs[0] == pytest.approx(expected.numpy(), abs=1e-5)
    hidden = outputs_without_patch(module, formula, pixels, results["occlusion"])
    assert float(results["occlusion"].values[0, 1, 2]) == pytest.approx(
        float(expected[column]) - hidden[column], abs=1e-5
    )
    assert faithful.deletion.shape == (1,)


def outputs_without_patch(
    module: nn.Module, formula: Callable[[Tensor], Tensor], pixels: Tensor, occlusion: Any
) -> Any:
    """Return the output with patch (1, 2) hidden as occlusion hides it, computed directly."""
    assert occlusion.provenance["parameters"]["hide"] == "mean"
    changed = pixels.clone()
    changed[:, :, 8:16, 16:24] = pixels[:, :, 8:16, 16:24].mean((2, 3), keepdim=True)
    return formula(module_rows(module, changed))[0].double().numpy()


class Constant(nn.Module):
    """A classifier that is saturated for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_vit(5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels) * 1e-3 + torch.tensor([80.0, 0, 0, 0, 0], device=pixels.device)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lime", "kernel_shap", "rise", "occlusion"])
def test_a_constant_prediction_gives_no_explanation_and_a_warning(method: str) -> None:
    model = vs.load(Constant().eval(), output="logits", labels=list("abcde"))
    options: dict[str, Any] = {"target": "a"}
    if method in ("lime", "kernel_shap"):
        options |= {"segments": "patches", "num_samples": 64}
    if method == "rise":
        options |= {"num_samples": 16, "cells": 3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = getattr(vs, method)(model, images(1), **options)
    messages = [str(warning.message) for warning in caught]
    assert any("'a'" in message and "masks" in message for message in messages), messages
    values = result.values[torch.isfinite(result.values)]
    assert float(values.max() - values.min()) <= 1e-6


def test_a_photo_and_its_pixels_give_the_same_predictions() -> None:
    model = vs.load(WithOutput(torch.sigmoid))
    pixels, _ = model.prepare(PHOTO)
    assert model.predict(PHOTO) == model.predict(pixels)


def test_a_model_with_probabilities_has_no_logits() -> None:
    model = vs.load(WithOutput(torch.sigmoid))
    with pytest.raises(CallError, match=r"^WithOutput gives probabilities, not logits: pass output='probability'$"):
        vs.occlusion(model, images(1), target=0, output="logit")

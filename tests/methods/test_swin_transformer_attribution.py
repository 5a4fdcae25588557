"""Transformer attribution of window transformers equals propagation layer by layer; padding keeps its relevance."""

from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.reference import swin_transformer_attribution as reference
from tests.reference import transformer_attribution as propagation
from vitscope.attention import alpha_beta_rules
from vitscope.models.targets import score
from vitscope.tracing.gradients import GradientOptions, capture_gradients

TARGET = 2
CASES = [
    ("timm-swin", "fitting"),
    ("timm-swin", "padded"),
    ("torchvision-swin", "odd"),
    ("torchvision-swinv2", "rectangular"),
]


def slow_attribution(name: str, module: Any, pixels: torch.Tensor) -> reference.Result:
    """Return the slow attribution of one image, after a check that its logits are the model's."""
    model = reference.from_timm(module) if name.startswith("timm") else reference.from_torchvision(module)
    result, logits = reference.transformer_attribution(model, pixels, TARGET)
    with torch.no_grad():
        torch.testing.assert_close(logits, module(pixels)[0], rtol=1e-9, atol=1e-9)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_map_is_relevance_propagated_layer_by_layer(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        alpha_beta_rules, "STABILISER", 1e-15
    )  # the paper does not say how to stabilise a matrix product
    monkeypatch.setattr(propagation, "EPSILON", 1e-15)
    size = swin.SIZES[kind]
    model, pixels = laws.in_float64(swin.family(name).model(size)), swin.pixels(size, 1).double()
    expected = slow_attribution(name, model.module, pixels)
    matrices: list[torch.Tensor] = []
    with capture_gradients(model, pixels, GradientOptions(rules="alpha_beta")) as run:
        values = score(run.model, run.output, run.has_classes, TARGET).values
        relevance = run.relevance(
            values, run.require_streams(), lambda _step, _rows, weights, product: matrices.append(weights * product)
        )
    for matrix, slow in zip(matrices, expected.matrices, strict=True):  # the last block first
        fused = matrix.clamp_min(0).mean(2)[0]
        torch.testing.assert_close(fused, slow, rtol=0, atol=1e-8 * float(slow.max()))
    totals = [float(stream.sum()) for stream in reversed(relevance)]
    assert totals == pytest.approx(expected.totals, abs=1e-9)
    result = vs.transformer_attribution(model, pixels, target=TARGET)
    torch.testing.assert_close(result.values[0].flatten(), expected.row.float(), rtol=1e-6, atol=0)
    assert result.provenance["relevance"] == pytest.approx(expected.totals[-1:], abs=1e-9)
    assert result.provenance["padding_relevance"] == pytest.approx(expected.lost[-1:], abs=1e-9)
    assert result.provenance["padding_mass"] == pytest.approx([expected.padding], abs=1e-6)
    for total, lost in zip(expected.totals, expected.lost, strict=True):
        assert total + lost == pytest.approx(1, abs=1e-3)  # less outputs without a positive contribution


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers-swin", "timm-swin", "torchvision-swinv2"])
def test_relevance_on_padding_is_reported(name: str) -> None:
    """Relevance of the first block and of padding add up to 1, but for outputs without a positive contribution."""
    family = swin.family(name)
    size = family.sizes.get("small", family.least)
    model, pixels = laws.in_float64(family.model(size)), swin.pixels(size).double()
    facts = vs.transformer_attribution(model, pixels, target=TARGET).provenance
    parts = zip(facts["relevance"], facts["padding_relevance"], strict=True)
    assert [of_tokens + of_padding for of_tokens, of_padding in parts] == pytest.approx([1, 1], abs=2e-3)
    assert min(map(abs, facts["padding_relevance"])) > 0.01
    alone = vs.transformer_attribution(model, pixels[1:], target=TARGET).provenance
    assert alone["padding_relevance"] == pytest.approx(facts["padding_relevance"][1:], abs=1e-9)

"""Transformer attribution equals relevance propagation layer by layer, and conserves relevance."""

import pytest
import torch
import torch.nn.functional as F

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.helpers.families import ALL, Family, every_family
from tests.reference.transformer_attribution import transformer_attribution as slow_attribution


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@pytest.mark.parametrize("start_layer", [0, 1, -1])
def test_the_map_is_relevance_propagated_layer_by_layer(start_layer: int) -> None:
    model, pixels = laws.in_float64(family("timm-vit").model()), family("timm-vit").pixels()
    result = vs.transformer_attribution(model, pixels.double(), target=[2, 5], start_layer=start_layer)
    for index, target in enumerate((2, 5)):
        row, totals = slow_attribution(model.module, pixels[index : index + 1], target, start_layer % 3)
        expected = family("timm-vit").grid.patches(row[None])[0].float()
        torch.testing.assert_close(result.values[index], expected, rtol=2e-6, atol=1e-9)
        assert result.provenance["relevance"][index] == pytest.approx(totals[-1], abs=1e-7)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_and_explicit_attention_agree(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = laws.in_float64(family("timm-vit").model()), family("timm-vit").pixels().double()
    expected = vs.transformer_attribution(model, pixels, target=1)
    for block in model.module.blocks:
        monkeypatch.setattr(block.attn, "fused_attn", fused)
    result = vs.transformer_attribution(model, pixels, target=1)
    torch.testing.assert_close(result.values, expected.values, rtol=1e-5, atol=1e-9)
    assert result.provenance["relevance"] == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.slow
@every_family
def test_every_family_conserves_relevance(family: Family) -> None:
    """Relevance at the first block is 1, up to the stabiliser of each division."""
    model = laws.in_float64(family.model())
    result = laws.check_batch(vs.transformer_attribution, model, family.pixels().double(), 1e-6)
    assert result.values.shape == (2, family.grid.height, family.grid.width)
    assert result.provenance["relevance"] == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.slow
@swin.every_swin
def test_windows_without_padding_conserve_relevance(family: swin.SwinFamily) -> None:
    size = next(size for size in (swin.SIZES["fitting"], swin.SIZES["small"]) if size in family.sizes.values())
    model, pixels = laws.in_float64(family.model(size)), swin.pixels(size).double()
    result = laws.check_batch(vs.transformer_attribution, model, pixels, 1e-5)
    if size == swin.SIZES["fitting"]:  # with 16 channels, a few outputs have no positive contribution at all
        assert result.provenance["relevance"] == pytest.approx([1, 1], abs=1e-4)
        assert result.provenance["padding_relevance"] == [0, 0]


def test_a_contrast_starts_with_relevance_1() -> None:
    model, pixels = laws.in_float64(family("timm-vit").model()), family("timm-vit").pixels().double()
    result = vs.transformer_attribution(model, pixels, target=(1, 4))
    assert result.provenance["relevance"] == pytest.approx([1, 1], abs=1e-6)


def test_row_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = laws.in_float64(family("timm-vit").model()), family("timm-vit").pixels().double()
    laws.check_row_blocks(vs.transformer_attribution, model, pixels, monkeypatch)


def test_the_callers_gradient_mode_changes_nothing() -> None:
    laws.check_gradient_modes(vs.transformer_attribution, family("timm-vit").model(), family("timm-vit").pixels())


@pytest.mark.parametrize("name", ["timm-vit", "transformers-vit"])
def test_nothing_is_left_behind(name: str) -> None:
    laws.check_nothing_left(vs.transformer_attribution, family(name).model(), family(name).pixels())


def _with_activation(function: object) -> vs.VisionModel:
    """Return a model whose first MLP ends with a function."""
    module = family("timm-vit").model().module
    mlp = module.blocks[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: function(original(x))  # type: ignore[operator]
    return vs.load(module)


def test_a_function_without_a_rule_is_reported() -> None:
    model = _with_activation(lambda x: torch.exp(x) - 1)
    with pytest.warns(vs.VitscopeWarning, match="relevance is not conserved"):
        vs.transformer_attribution(model, family("timm-vit").pixels(), target=1)


def test_adding_in_place_is_refused() -> None:
    model = _with_activation(lambda x: x.clone().add_(x))
    with pytest.raises(vs.UnsupportedModelError, match="adds to its activations in place"):
        vs.transformer_attribution(model, family("timm-vit").pixels(), target=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.silu(x) * x,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 1 - x,
        lambda x: x - 2 * F.relu(x),
        lambda x: x / (1 + x.abs().mean(-1, keepdim=True)),
        lambda x: torch.add(x, F.gelu(x), alpha=0.5),
    ],
    ids=["gate", "quick-gelu", "constant minus", "difference", "quotient", "alpha"],
)
def test_rules_conserve_relevance(function: object) -> None:
    model = laws.in_float64(_with_activation(function))
    result = vs.transformer_attribution(model, family("timm-vit").pixels().double(), target=1)
    assert result.provenance["relevance"] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("start_layer", [3, -4])
def test_a_layer_out_of_range_is_refused(start_layer: int) -> None:
    with pytest.raises(vs.CallError, match=f"start_layer is {start_layer}: the model has layers 0 to 2"):
        vs.transformer_attribution(family("timm-vit").model(), family("timm-vit").pixels(), start_layer=start_layer)


def test_probabilities_are_refused() -> None:
    module = torch.nn.Sequential(family("timm-vit").model().module, torch.nn.Softmax(-1))
    with pytest.raises(vs.UnsupportedModelError, match="returns probabilities, not logits"):
        vs.transformer_attribution(vs.load(module, output="probabilities"), family("timm-vit").pixels(), target=1)

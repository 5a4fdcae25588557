"""LeGrad equals its formula block by block, keeps the laws of gradient methods, and says what it cannot do."""

import pytest
import torch

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.helpers.families import ALL, Family, every_family
from tests.reference.le_grad import le_grad as slow_le_grad
from tests.reference.le_grad import pooled_le_grad, without_fused_attention


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "timm-dinov2-registers"])
@pytest.mark.parametrize("start_layer", [0, 1, -1])
def test_the_map_is_the_formula(name: str, start_layer: int) -> None:
    model, pixels = laws.in_float64(family(name).model()), family(name).pixels()
    result = vs.le_grad(model, pixels.double(), target=[2, 5], start_layer=start_layer)
    assert result.provenance["layers"] == list(range(start_layer % 3, 3))
    slow = without_fused_attention(model.module)
    for index, target in enumerate((2, 5)):
        row = slow_le_grad(slow, pixels[index : index + 1], target, start_layer % 3)
        expected = family(name).grid.patches(row[None])[0].float()
        torch.testing.assert_close(result.values[index], expected, rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize("size", [(32, 32), (64, 64)])
def test_windows_of_the_last_stage(size: tuple[int, int]) -> None:
    """The last grids are 4×4, a single window, and 8×8, with four windows that block 5 shifts."""
    model, pixels = laws.in_float64(swin.family("timm-swin").model(size)), swin.pixels(size, 1)
    result = vs.le_grad(model, pixels.double(), target=2)
    assert result.provenance["layers"] == [4, 5]
    tokens = slow_le_grad(without_fused_attention(model.module), pixels, 2)
    coarse = tokens.view(size[0] // 8, size[1] // 8)
    expected = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1) / 16
    torch.testing.assert_close(result.values[0], expected.float(), rtol=2e-6, atol=1e-10)


def test_a_pooling_layer_gives_its_own_attention() -> None:
    model, pixels = laws.in_float64(family("timm-siglip").model()), family("timm-siglip").pixels()
    result = vs.le_grad(model, pixels.double(), target=4)
    for index in range(2):
        row = pooled_le_grad(model.module, pixels[index : index + 1], 4)
        torch.testing.assert_close(result.values[index], row.view(4, 6).float(), rtol=2e-6, atol=1e-10)


def test_the_target_is_the_answer_to_the_image_itself() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(4)
    with torch.no_grad():
        logits = model.module(pixels)
    result = vs.le_grad(model, pixels)
    assert result.provenance["score"] == pytest.approx(logits.max(1).values.tolist(), rel=1e-5)
    assert torch.equal(result.values, vs.le_grad(model, pixels, target=logits.argmax(1).tolist()).values)


def test_a_function_of_the_output() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    expected = vs.le_grad(model, pixels, target=(1, 6)).values
    actual = vs.le_grad(model, pixels, target=lambda output: output[:, 1] - output[:, 6]).values
    torch.testing.assert_close(actual, expected)


def test_features_keep_the_direction_of_the_whole_model() -> None:
    """The last block alone: the direction is that of the model's features, not of the features of mean tokens."""
    model, pixels = laws.in_float64(family("transformers-vit-bare").model()), family("timm-vit").pixels(1).double()
    with torch.no_grad():
        direction = torch.nn.functional.normalize(model.features(pixels), dim=-1)
    by_function = vs.le_grad(model, pixels, target=lambda features: (features * direction).sum(-1))
    torch.testing.assert_close(vs.le_grad(model, pixels, target="similarity").values, by_function.values)


@pytest.mark.slow
@every_family
def test_every_family(family: Family) -> None:
    model = laws.in_float64(family.model())
    result = laws.check_batch(vs.le_grad, model, family.pixels().double(), 1e-6)
    assert result.values.shape == (2, family.grid.height, family.grid.width)
    trace = vs.capture(model, family.pixels().double())
    assert trace.readout is not None


@pytest.mark.slow
@swin.each_size
def test_every_window_transformer(family: swin.SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    result = laws.check_batch(vs.le_grad, family.model(size), swin.pixels(size), 1e-4)
    grid = family.grid(size)
    assert result.values.shape == (2, grid.height, grid.width)


def test_row_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    laws.check_row_blocks(vs.le_grad, family("timm-vit").model(), family("timm-vit").pixels(), monkeypatch)


def test_the_callers_gradient_mode_changes_nothing() -> None:
    laws.check_gradient_modes(vs.le_grad, family("timm-vit").model(), family("timm-vit").pixels())


@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip", "transformers-vit"])
def test_nothing_is_left_behind(name: str) -> None:
    model, pixels = family(name).model(), family(name).pixels()
    laws.check_nothing_left(vs.le_grad, model, pixels)
    # A later run reads one row per image again.
    assert model.module.eval() is model.module
    assert vs.capture(model, pixels).readout is not None
    assert len(model.predict(pixels)) == 2


@pytest.mark.parametrize("start_layer", [3, -4])
def test_a_layer_out_of_range_is_refused(start_layer: int) -> None:
    with pytest.raises(vs.CallError, match=f"start_layer is {start_layer}: the model has layers 0 to 2"):
        vs.le_grad(family("timm-vit").model(), family("timm-vit").pixels(), start_layer=start_layer)


def test_a_model_without_classes_needs_similarity() -> None:
    with pytest.raises(vs.CallError, match="similarity"):
        vs.le_grad(family("transformers-dinov2").model(), family("transformers-dinov2").pixels())

"""Transition attention equals its formula with dense matrices, and keeps the laws of gradient methods."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.helpers.families import ALL, Family, every_family
from tests.reference import transition_attention as reference
from tests.reference.swin_rollout import story


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


def explain(*args: Any, **options: Any) -> vs.Attribution:
    return vs.transition_attention(*args, **{"steps": 3, "start_layer": 0, **options})


def output_of(model: vs.VisionModel, pixels: Tensor) -> Tensor:
    """Return logits, or features without a classifier."""
    with model.running():
        output = model.features(pixels) if model.meaning == "features" else model.logits(pixels)
    assert output is not None
    return output


def assert_equal(values: Tensor, expected: Tensor) -> None:
    assert float(expected.max()) > 0
    torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-6 * float(expected.max()))


def check_formula(family: Family, start_layer: int, steps: int) -> None:
    """Check the maps of the third class or channel."""
    model, pixels = laws.in_float64(family.model()), family.pixels().double()
    result = vs.transition_attention(
        model, pixels, target=lambda output: output[:, 2], start_layer=start_layer, steps=steps
    )
    assert result.provenance["parameters"]["start_layer"] == start_layer % 3
    for index in range(2):
        row = reference.transition_attention(
            model.module,
            pixels[index : index + 1],
            lambda x: output_of(model, x)[:, 2],
            *(family.readout, family.prefix_names, start_layer % 3, steps),
        )
        assert_equal(result.values[index], family.grid.patches(row[None])[0])


@pytest.mark.parametrize(("start_layer", "steps"), [(0, 2), (1, 1), (-1, 4)])
def test_the_map_is_the_formula(start_layer: int, steps: int) -> None:
    check_formula(family("timm-vit"), start_layer, steps)


@pytest.mark.slow
@every_family
def test_the_map_of_every_family_is_the_formula(family: Family) -> None:
    check_formula(family, 0, 3)
    check_formula(family, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fitting", "padded", "odd"])
def test_windows_and_merging_equal_dense_matrices(kind: str) -> None:
    size = swin.SIZES[kind]
    model, pixels = laws.in_float64(swin.family("timm-swin").model(size)), swin.pixels(size).double()
    for start_layer in (0, 3, 5):
        result = explain(model, pixels, target=2, start_layer=start_layer)
        for index in range(2):
            image = pixels[index : index + 1]
            plain = story(model.module, image, (result.grid.height, size[1] // 2))
            row, padding = reference.window_transition_attention(
                model.module, image, lambda x: model.module(x)[:, 2], plain, start_layer, 3
            )
            assert_equal(result.values[index].flatten(), row)
            assert result.provenance["padding_mass"][index] == pytest.approx(float(padding), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("blocks", "start_layer"), [(3, 1), (2, 0), (6, 2), (12, 4)])
def test_a_third_of_the_blocks_is_left_out(blocks: int, start_layer: int) -> None:
    import timm

    torch.manual_seed(0)
    module = timm.create_model(
        "vit_small_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=blocks, num_heads=4, num_classes=7
    ).eval()
    pixels = family("timm-vit").pixels(1)[..., :32]
    result = vs.transition_attention(vs.load(module), pixels, target=1, steps=2)
    assert result.provenance["parameters"] == {
        "start_layer": start_layer,
        "steps": 2,
        "target": ["class 1"],
        "output": "logit",
    }
    expected = vs.transition_attention(vs.load(module), pixels, target=1, steps=2, start_layer=start_layer)
    assert torch.equal(result.values, expected.values)


@pytest.mark.slow
@every_family
def test_every_family_in_batches(family: Family) -> None:
    model = laws.in_float64(family.model())
    result = laws.check_batch(explain, model, family.pixels().double(), 1e-6)
    assert result.values.shape == (2, family.grid.height, family.grid.width)


@pytest.mark.slow
@swin.every_swin
def test_every_window_transformer_in_batches(family: swin.SwinFamily) -> None:
    size = family.sizes[family.kinds[0]]

    def explain_a_class(model: vs.VisionModel, pixels: Tensor, *, target: Any) -> vs.Attribution:
        return explain(model, pixels, target=target or 4)  # of some classes, no attention of the last block raises one

    laws.check_batch(explain_a_class, laws.in_float64(family.model(size)), swin.pixels(size).double(), 1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean"])
def test_row_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = laws.in_float64(family(name).model()), family(name).pixels().double()
    laws.check_row_blocks(explain, model, pixels, monkeypatch)


def test_another_class_has_another_map() -> None:
    model, pixels = laws.in_float64(family("timm-vit").model()), family("timm-vit").pixels().double()
    first, second = (explain(model, pixels, target=target).values for target in (1, 4))
    assert float((first - second).norm()) > 0.1 * float(first.norm())


def test_the_target_is_that_of_the_image_itself() -> None:
    """On the way from zero the most probable class may be another one."""
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(4)
    with torch.no_grad():
        classes = model.module(pixels).argmax(1).tolist()
    assert torch.equal(explain(model, pixels).values, explain(model, pixels, target=classes).values)


def test_the_callers_gradient_mode_changes_nothing() -> None:
    laws.check_gradient_modes(explain, family("timm-vit").model(), family("timm-vit").pixels())


@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip", "transformers-vit"])
def test_nothing_is_left_behind(name: str) -> None:
    laws.check_nothing_left(explain, family(name).model(), family(name).pixels())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start_layer": 3}, "start_layer is 3: the model has layers 0 to 2"),
        ({"start_layer": -4}, "start_layer is -4: the model has layers 0 to 2"),
        ({"start_layer": 0.5}, "start_layer is 0.5"),
        ({"steps": 0}, "steps is 0, at least 1 is expected"),
        ({"output": "loss"}, "unknown output 'loss'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(vs.CallError, match=text):
        vs.transition_attention(family("timm-vit").model(), family("timm-vit").pixels(), **options)

"""Grad-CAM and its kin equal their formulas, channel by channel."""

from typing import Any

import pytest
import torch
from timm.models import eva, vision_transformer
from torch import Tensor

import vitscope as vs
from tests.helpers.gradients import RELATIVE, assert_equal, case, transformers_vit
from tests.reference import gradients as reference
from tests.reference.explicit_functions import explicit_functions
from vitscope.errors import CallError, VitscopeWarning

VARIANTS = ("grad_cam", "hires_cam", "layer_cam", "element_wise", "x_grad_cam", "grad_cam++")


def score(logits: Tensor) -> Tensor:
    return logits[:, 1]


def expected_maps(run: reference.Run, tensor: Tensor, variant: str) -> Tensor:
    (gradient,) = run.gradients(score, [tensor])
    pairs = zip(tensor.detach()[:, 1:], gradient[:, 1:], strict=True)  # without the CLS token
    return torch.stack([reference.cam(x, g, variant) for x, g in pairs])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["timm-vit", "timm-vit-mean", "transformers"])
def test_every_variant_equals_its_formula(family: str, variant: Any) -> None:
    model, pixels = transformers_vit() if family == "transformers" else case(family).in_float64()
    run = reference.run(
        (reference.from_transformers if family == "transformers" else reference.from_timm)(model.module), pixels
    )
    for layer in (-1, 1):
        result = vs.grad_cam(model, pixels, target=1, layer=layer, variant=variant)
        # Quotients by sums near zero amplify rounding in x_grad_cam.
        assert_equal(result.values.flatten(1), expected_maps(run, run.norms[layer], variant), 10 * RELATIVE)
        assert result.signed
    result = vs.grad_cam(model, pixels, target=1, layer=0, variant=variant, at="block")
    assert_equal(result.values.flatten(1), expected_maps(run, run.outputs[0], variant), 10 * RELATIVE)


@pytest.mark.parametrize("rules", ["libra", "attn_lrp"])
def test_rules_change_the_gradient(rules: Any) -> None:
    model, pixels = case("timm-vit").in_float64()
    run = reference.run(reference.from_timm(model.module), pixels, rules)
    result = vs.grad_cam(model, pixels, target=1, rules=rules, layer=1, variant="hires_cam")
    assert_equal(result.values.flatten(1), expected_maps(run, run.norms[1], "hires_cam"))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_window_transformer_repeats_the_values_of_coarser_blocks(layer: int) -> None:
    model, pixels = case("timm-swin-fitting").in_float64()
    blocks = [block for stage in model.module.layers for block in stage.blocks]  # type: ignore[union-attr]
    norms: list[Tensor] = []
    handle = blocks[layer].norm1.register_forward_hook(lambda _, __, output: norms.append(output))
    with explicit_functions(model.module, "plain"):
        (gradient,) = torch.autograd.grad(score(model.module(pixels.clone().requires_grad_())).sum(), norms)
    handle.remove()
    x, g = norms[0].detach(), gradient
    expected = torch.stack(
        [reference.cam(a.flatten(0, 1), b.flatten(0, 1), "grad_cam") for a, b in zip(x, g, strict=True)]
    )
    expected = expected.view(x.shape[:3])
    factor = 16 // x.shape[1]
    expected = expected.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert_equal(vs.grad_cam(model, pixels, target=1, layer=layer).values, expected)


def test_the_prefix_has_no_part_in_the_mean() -> None:
    """Four registers would change the mean over tokens, but not the mean over patches."""
    model, pixels = case("timm-dinov2-registers").in_float64()
    block: Any = model.module.blocks[1]  # type: ignore[index,union-attr]
    norms: list[Tensor] = []
    handle = block.norm1.register_forward_hook(lambda _, __, output: norms.append(output))
    (gradient,) = torch.autograd.grad(model.module(pixels.clone().requires_grad_()).norm(dim=-1).sum(), norms)
    handle.remove()
    x, g = norms[0].detach()[:, 5:], gradient[:, 5:]
    expected = torch.stack([reference.cam(a, b, "grad_cam") for a, b in zip(x, g, strict=True)])
    result = vs.grad_cam(model, pixels, target=lambda output: output.norm(dim=-1), layer=1)
    assert_equal(result.values.flatten(1), expected)


def test_no_gradient_reaches_the_patches_behind_the_last_block_of_a_cls_readout() -> None:
    model, pixels = case("timm-vit").in_float64()
    with pytest.warns(VitscopeWarning, match="zero everywhere"):
        result = vs.grad_cam(model, pixels, target=1, at="block")
    assert not bool(result.values.any())


@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range() -> None:
    model, pixels = transformers_vit()
    for options, text in (
        ({"variant": "score_cam"}, "variant is 'score_cam': choose grad_cam, hires_cam"),
        ({"at": "attention"}, "at is 'attention': choose norm, block"),
        ({"layer": 3}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"layer": 1.5}, "layer is 1.5"),
        ({"rules": "lrp"}, "rules is 'lrp'"),
    ):
        with pytest.raises(CallError, match=text):
            vs.grad_cam(model, pixels, **options)  # type: ignore[arg-type]


def test_the_output_of_the_last_block_holds_a_test_time_register() -> None:
    model, pixels = case("timm-vit-mean").in_float64()
    expected = vs.grad_cam(model, pixels, target=1, at="block").values
    with vs.test_time_registers(model, [(1, 3)]):
        assert vs.grad_cam(model, pixels, target=1, at="block").values.shape == expected.shape


@pytest.mark.parametrize("block", ["ResPostBlock", "EvaBlockPostNorm"])
def test_the_map_of_a_post_norm_block_is_that_of_its_input(block: str) -> None:
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    if block == "ResPostBlock":
        module: Any = vision_transformer.VisionTransformer(
            **size, num_classes=5, init_values=0.5, block_fn=vision_transformer.ResPostBlock
        )
    else:
        module = eva.Eva(**size, num_classes=5, use_post_norm=True, head_init_scale=1.0)
    module = module.eval().double()
    assert type(module.blocks[1]).__name__ == block
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    streams: list[Tensor] = []
    handle = module.blocks[1].register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    (gradient,) = torch.autograd.grad(score(module(pixels.clone().requires_grad_())).sum(), streams)
    handle.remove()
    expected = reference.cam(streams[0].detach()[0, 1:], gradient[0, 1:], "hires_cam")[None]
    result = vs.grad_cam(module, pixels, target=1, layer=1, variant="hires_cam")
    assert_equal(result.values.flatten(1), expected, 10 * RELATIVE)

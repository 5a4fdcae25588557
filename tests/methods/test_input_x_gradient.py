"""Input times gradient, SmoothGrad and AttnLRP equal the gradients of explicit forward passes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.gradients import assert_equal, case, transformers_vit
from tests.reference import gradients as reference
from tests.reference.explicit_functions import explicit_functions
from vitscope.errors import CallError

RULES = ("plain", "libra", "attn_lrp")


def score(logits: Tensor) -> Tensor:
    return logits[:, 1]


def setting(family: str) -> tuple[vs.VisionModel, Tensor, reference.Weights]:
    if family == "transformers":
        model, pixels = transformers_vit()
        return model, pixels, reference.from_transformers(model.module)
    model, pixels = case(family).in_float64()
    return model, pixels, reference.from_timm(model.module)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", ["timm-vit", "timm-vit-mean", "transformers"])
def test_patches_and_pixels_equal_an_explicit_forward_pass(family: str, rules: Any) -> None:
    model, pixels, weights = setting(family)
    run = reference.run(weights, pixels, rules)
    tokens = reference.relevance(run, score, run.streams[0])
    result = vs.input_x_gradient(model, pixels, target=1, rules=rules)
    assert_equal(result.values.flatten(1), tokens[:, 1:])
    for image, completeness in enumerate(result.provenance["completeness"]):
        output = float(run.logits.detach()[image, 1])
        expected = {"output": output, "prefix": float(tokens[image, 0]), "error": output - float(tokens[image].sum())}
        assert completeness == pytest.approx(expected, rel=1e-9, abs=1e-9)
    on_pixels = vs.input_x_gradient(model, pixels, target=1, rules=rules, at="pixels")
    assert_equal(on_pixels.values, reference.relevance(run, score, run.pixels))
    if rules == "attn_lrp":
        assert torch.equal(vs.attn_lrp(model, pixels, target=1).values, result.values)
        assert torch.equal(vs.attn_lrp(model, pixels, target=1, at="pixels").values, on_pixels.values)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", ["fitting", "padded"])
def test_windows_equal_an_explicit_forward_pass(kind: str, rules: Any) -> None:
    model, pixels = case(f"timm-swin-{kind}").in_float64()
    pixels = pixels.requires_grad_()
    streams: list[Tensor] = []
    first: Any = model.module.layers[0].blocks[0]  # type: ignore[index,union-attr]
    handle = first.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with explicit_functions(model.module, rules):
        gradients = torch.autograd.grad(score(model.module(pixels)).sum(), [streams[0], pixels])
    handle.remove()
    values = vs.input_x_gradient(model, pixels.detach(), target=1, rules=rules).values
    assert_equal(values, (streams[0] * gradients[0]).sum(-1).detach())
    on_pixels = vs.input_x_gradient(model, pixels.detach(), target=1, rules=rules, at="pixels").values
    assert_equal(on_pixels, (pixels * gradients[1]).sum(1).detach())


@pytest.mark.parametrize("method", [vs.input_x_gradient, vs.attn_lrp, vs.libra])
@pytest.mark.parametrize("name", ["timm-vit", "timm-swin-padded"])
def test_a_contrast_is_the_difference_of_two_maps(method: Any, name: str) -> None:
    model, pixels = case(name).in_float64()
    first, second, contrast = (method(model, pixels, target=target) for target in (0, 2, (0, 2)))
    assert_equal(contrast.values, first.values.double() - second.values.double())
    assert " − " in str(contrast.target)


def test_smooth_grad_is_the_mean_gradient_at_noisy_inputs() -> None:
    model, pixels, weights = setting("timm-vit")
    clean = reference.run(weights, pixels).streams[0].detach()
    span = clean.amax((1, 2), keepdim=True) - clean.amin((1, 2), keepdim=True)
    generator, total = torch.Generator().manual_seed(7), torch.zeros_like(clean)
    for _ in range(3):
        noise = torch.randn(clean.shape[1:], generator=generator)
        noisy = (clean + 0.2 * span * noise.double()).requires_grad_()
        total += torch.autograd.grad(score(tail(model.module, noisy)).sum(), noisy)[0] / 3
    result = vs.smooth_grad(model, pixels, target=1, samples=3, noise=0.2, seed=7)
    assert_equal(result.values.flatten(1), (clean * total).sum(-1)[:, 1:])
    other = vs.smooth_grad(model, pixels, target=1, samples=3, noise=0.2, seed=8)
    assert not torch.allclose(other.values, result.values, rtol=1e-2)
    assert "completeness" not in result.provenance


def test_smooth_grad_without_noise_is_input_x_gradient() -> None:
    model, pixels, _ = setting("transformers")
    for at in ("patches", "pixels"):
        smooth = vs.smooth_grad(model, pixels, target=1, samples=2, noise=0.0, at=at)  # type: ignore[arg-type]
        assert_equal(smooth.values, vs.input_x_gradient(model, pixels, target=1, at=at).values)  # type: ignore[arg-type]


def tail(module: Any, tokens: Tensor) -> Tensor:
    """Return the logits of timm's ViT for tokens that enter the first block."""
    return module.forward_head(module.norm(module.blocks(tokens)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("gamma", "conv_gamma"), [(0.05, 0.0), (0.0, 0.25), (0.25, 1.0)])
def test_the_gamma_rules_of_attn_lrp_equal_an_explicit_forward_pass(gamma: float, conv_gamma: float) -> None:
    model, pixels, weights = setting("timm-vit")
    run = reference.run(weights, pixels, "attn_lrp", gamma, conv_gamma)
    options = {"gamma": gamma, "conv_gamma": conv_gamma}
    on_pixels = vs.attn_lrp(model, pixels, target=1, at="pixels", **options)  # type: ignore[arg-type]
    assert_equal(on_pixels.values, reference.relevance(run, score, run.pixels))
    on_patches = vs.attn_lrp(model, pixels, target=1, **options)  # type: ignore[arg-type]
    assert_equal(on_patches.values.flatten(1), reference.relevance(run, score, run.streams[0])[:, 1:])
    if not gamma:  # the convolution comes before the patches
        assert torch.equal(on_patches.values, vs.attn_lrp(model, pixels, target=1).values)


@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range() -> None:
    model, pixels = transformers_vit()
    for method, options, text in (
        (vs.input_x_gradient, {"at": "tokens"}, "at is 'tokens': choose patches, pixels"),
        (vs.input_x_gradient, {"rules": "gamma"}, "rules is 'gamma'"),
        (vs.attn_lrp, {"gamma": -1}, "gamma is -1: at least 0"),
        (vs.attn_lrp, {"conv_gamma": float("inf")}, "conv_gamma is inf"),
        (vs.attn_lrp, {"at": "tokens"}, "at is 'tokens'"),
        (vs.smooth_grad, {"samples": 0}, "samples is 0, at least 1"),
        (vs.smooth_grad, {"noise": -0.1}, "noise is -0.1"),
        (vs.smooth_grad, {"seed": -1}, "seed is -1"),
        (vs.smooth_grad, {"rules": "lrp"}, "rules is 'lrp'"),
    ):
        with pytest.raises(CallError, match=text):
            method(model, pixels, **options)  # type: ignore[operator]

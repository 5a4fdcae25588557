"""Equality with captum, pytorch-grad-cam and zennit on their own ground; skipped without these packages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.helpers import families, swin_families
from vitscope.attention.linear_rules import gamma_pull

TOLERANCE = 2e-6  # relative to the largest value: results are float32


def model_and_pixels(name: str) -> tuple[vs.VisionModel, Tensor]:
    family: Any = next(family for family in (*families.ALL, *swin_families.ALL) if family.name == name)
    model = family.model()
    model.module.double()
    pixels = family.pixels(2) if hasattr(family, "pixels") else swin_families.pixels((32, 32))[:2]
    return model, pixels.double()


def assert_equal(values: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(values.double(), expected.double(), rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def test_input_x_gradient_equals_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    model, pixels = model_and_pixels("timm-vit")
    expected = attr.InputXGradient(model.module).attribute(pixels.clone().requires_grad_(), target=1).sum(1)
    assert_equal(vs.input_x_gradient(model, pixels, target=1, at="pixels").values, expected.detach())


@pytest.mark.slow
def test_integrated_gradients_equal_captum() -> None:
    attr = pytest.importorskip("captum.attr")
    model, pixels = model_and_pixels("timm-vit")
    blank = torch.zeros_like(pixels)
    expected = attr.IntegratedGradients(model.module).attribute(pixels, baselines=blank, target=1, n_steps=50).sum(1)
    result = vs.integrated_gradients(model, pixels, target=1, at="pixels", baseline=blank)
    assert_equal(result.values, expected.detach())
    # The patch embedding is linear, so the way through the tokens is the way through the pixels.
    patches = F.avg_pool2d(expected.detach()[:, None], 8)[:, 0] * 64
    assert_equal(vs.integrated_gradients(model, pixels, target=1, baseline=blank).values, patches)


CAMS = {
    "grad_cam": "GradCAM",
    "hires_cam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "x_grad_cam": "XGradCAM",
    "grad_cam++": "GradCAMPlusPlus",
    "element_wise": "GradCAMElementWise",
}


def cam_image(
    name: str, module: nn.Module, layer: nn.Module, pixels: Tensor, reshape: Callable[[Tensor], Tensor]
) -> Any:
    """Return the raw map of pytorch-grad-cam, before it is clamped and rescaled."""
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    cam = getattr(library, name)(model=module, target_layers=[layer], reshape_transform=reshape)
    try:
        outputs = cam.activations_and_grads(pixels.clone().requires_grad_())
        outputs[:, 1].sum().backward()
        activations, gradients = (
            tensors[0].cpu().numpy()
            for tensors in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        target = [targets.ClassifierOutputTarget(1)] * len(pixels)
        return torch.from_numpy(
            np.asarray(cam.get_cam_image(pixels, layer, target, activations, gradients, eigen_smooth=False))
        )
    finally:
        cam.activations_and_grads.release()
        module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("variant", CAMS)
@pytest.mark.parametrize("layer", [-1, 1])
def test_cams_of_a_vit_equal_pytorch_grad_cam(variant: str, layer: int) -> None:
    model, pixels = model_and_pixels("timm-vit")
    module: Any = model.module

    def reshape(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)

    expected = cam_image(CAMS[variant], module, module.blocks[layer].norm1, pixels, reshape)
    assert_equal(vs.grad_cam(model, pixels, target=1, layer=layer, variant=variant).values, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", CAMS)
def test_cams_of_a_swin_equal_pytorch_grad_cam(variant: str) -> None:
    model, pixels = model_and_pixels("timm-swin")
    module: Any = model.module
    layer = module.layers[-1].blocks[-1].norm1
    expected = cam_image(CAMS[variant], module, layer, pixels, lambda tokens: tokens.permute(0, 3, 1, 2))
    values = vs.grad_cam(model, pixels, target=1, variant=variant).values  # type: ignore[arg-type]
    factor = values.shape[1] // expected.shape[1]
    assert factor > 1
    assert_equal(values, expected.repeat_interleave(factor, 1).repeat_interleave(factor, 2))


@pytest.mark.parametrize("gamma", [0.05, 0.25, 100.0])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_the_gamma_rule_equals_zennit(gamma: float, layer: str) -> None:
    rules = pytest.importorskip("zennit.rules")
    torch.manual_seed(0)
    module: Any = nn.Linear(6, 5) if layer == "linear" else nn.Conv2d(3, 4, 2, stride=2)
    module.double()
    x = torch.randn(*((7, 6) if layer == "linear" else (2, 3, 8, 8)), dtype=torch.float64).requires_grad_()
    handle = rules.Gamma(gamma=gamma).register(module)
    output = module(x)
    gradient = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, output.detach() * gradient)  # zennit passes relevance, not gradients
    handle.remove()
    function: Any = F.linear if layer == "linear" else F.conv2d
    options = {} if layer == "linear" else {"stride": (2, 2)}
    pull = gamma_pull(function, module.weight.detach(), module.bias.detach(), gamma, options)
    with torch.no_grad():
        values = pull(x.detach(), gradient) * x.detach()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

"""Head importance by gradient: the derivative of the output by a factor on the head's output."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from vitscope.errors import CallError


def derivatives(model: vs.VisionModel, pixels: Tensor, target: int) -> Tensor:
    """Return the derivative of a logit by a factor on each head of a timm model, in float64, (image, layer, head)."""
    module: Any = model.module
    factors: list[Tensor] = []
    handles = []
    for block in module.blocks:
        heads = block.attn.num_heads
        factor = torch.ones(len(pixels), heads, dtype=torch.float64, requires_grad=True)
        factors.append(factor)

        def scale(_: Any, args: Any, factor: Tensor = factor, heads: int = heads) -> Any:
            outputs = args[0].unflatten(-1, (heads, -1))
            return ((outputs * factor[:, None, :, None]).flatten(-2),)

        handles.append(block.attn.proj.register_forward_pre_hook(scale))
    try:
        logits = module(pixels)[:, target].sum()
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(torch.autograd.grad(logits, factors), dim=1)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean", "timm-dinov2-registers"])
def test_the_importance_is_the_derivative_by_a_factor_on_each_head(name: str) -> None:
    family = next(family for family in families.ALL if family.name == name)
    model = family.model()
    model.module.double()
    pixels = family.pixels(2).double()
    result = vs.head_importance(model, pixels, target=3, by="gradient")
    expected = derivatives(model, pixels, 3)
    torch.testing.assert_close(result.values.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert result.provenance["parameters"] == {"by": "gradient", "replacement": "zero", "output": "logit"}


@pytest.mark.slow
@every_family
def test_a_batch_is_its_images_in_every_family(family: Family) -> None:
    model, pixels = family.model(), family.pixels(2)
    target: Any = "similarity" if model.meaning == "features" else None
    result = vs.head_importance(model, pixels, target=target, by="gradient")
    assert result.values.shape == (2, 3, 4)
    assert bool(result.values.isfinite().all())
    for image in range(2):
        alone = vs.head_importance(model, pixels[image : image + 1], target=target, by="gradient")
        torch.testing.assert_close(alone.values[0], result.values[image], rtol=1e-4, atol=1e-5)
        assert alone.targets == result.targets[image : image + 1]


def test_windows_have_as_many_heads_as_their_stage() -> None:
    model = swin_families.family("timm-swin").model()
    result = vs.head_importance(model, swin_families.pixels((32, 32)), target=1, by="gradient")
    ablation = vs.head_importance(model, swin_families.pixels((32, 32)), target=1)
    assert torch.equal(result.values.isnan(), ablation.values.isnan())


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_measure_is_refused(chelsea: Any) -> None:
    with pytest.raises(CallError, match="unknown measure 'taylor': choose ablation or gradient"):
        vs.head_importance(vs.load("vit-nano"), chelsea, by="taylor")  # type: ignore[arg-type]

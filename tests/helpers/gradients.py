"""Models in float64 with pixels, every family at sizes that fit and do not fit, and every gradient method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families, swin_families
from tests.helpers.swin_families import SIZES
from tests.helpers.tiny import tiny_vit

RELATIVE = 1e-6  # values are float32


class Case(NamedTuple):
    """A family, and the size of its images."""

    name: str
    model: Callable[[], vs.VisionModel]
    pixels: Tensor

    def in_float64(self) -> tuple[vs.VisionModel, Tensor]:
        model = self.model()
        model.module.double()
        return model, self.pixels.double()


def _windowed(family: swin_families.SwinFamily, kind: str) -> Case:
    size = SIZES[kind]
    return Case(f"{family.name}-{kind}", lambda: family.model(size), swin_families.pixels(size))


PLAIN = [Case(family.name, family.model, family.pixels()) for family in families.ALL]
FITTING = [_windowed(family, family.kinds[0]) for family in swin_families.ALL]
UNFITTING = [_windowed(family, kind) for family in swin_families.ALL for kind in family.kinds[1:]]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def case(name: str) -> Case:
    return next(case for case in (*PLAIN, *FITTING, *UNFITTING) if case.name == name)


def transformers_vit() -> tuple[vs.VisionModel, Tensor]:
    """Return transformers' ViT in float64, with pixels (2, 3, 32, 32)."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return vs.load(swin_families.perturbed(tiny_vit(), 0.1).double()), pixels


def assert_equal(values: Tensor, expected: Tensor, relative: float = RELATIVE, least: float = 1e-4) -> None:
    """Compare up to an error relative to the largest expected value, which is more than ``least``."""
    assert values.shape == expected.shape
    assert float(expected.abs().max()) > least
    tolerance = relative * float(expected.abs().max())
    torch.testing.assert_close(values.double(), expected.double(), rtol=0, atol=tolerance)


def target_of(model: vs.VisionModel, target: Any = 1) -> Any:
    """Return a target that fits the model."""
    return "similarity" if model.meaning == "features" else target


METHODS: dict[str, Callable[..., vs.Attribution]] = {
    "grad_cam": vs.grad_cam,
    "layer_cam of a block": lambda *args, **options: vs.grad_cam(
        *args, variant="layer_cam", layer=1, at="block", **options
    ),
    "input_x_gradient": vs.input_x_gradient,
    "input_x_gradient of pixels": lambda *args, **options: vs.input_x_gradient(*args, at="pixels", **options),
    "integrated_gradients": lambda *args, **options: vs.integrated_gradients(
        *args, steps=2, baseline="grey", **options
    ),
    "smooth_grad": lambda *args, **options: vs.smooth_grad(*args, samples=2, **options),
    "gradient_rollout": lambda *args, **options: vs.gradient_rollout(*args, discard_ratio=0.3, **options),
    "generic_attention": vs.generic_attention,
    "generic_attention by norm": lambda *args, **options: vs.generic_attention(
        *args, merge="norm", rules="libra", **options
    ),
    "token_tm": vs.token_tm,
    "token_tm by norm": lambda *args, **options: vs.token_tm(*args, merge="norm", rules="libra", **options),
    "att_cat": vs.att_cat,
    "transition_attention": lambda *args, **options: vs.transition_attention(*args, steps=2, **options),
    "attn_lrp": vs.attn_lrp,
    "attn_lrp with γ": lambda *args, **options: vs.attn_lrp(*args, gamma=0.05, **options),
    "libra": vs.libra,
    "libra, grad_cam_plus": lambda *args, **options: vs.libra(*args, variant="grad_cam_plus", **options),
    "libra, input_x_gradient": lambda *args, **options: vs.libra(*args, variant="input_x_gradient", **options),
}
each_method = pytest.mark.parametrize("method", METHODS)

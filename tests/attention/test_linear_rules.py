"""The γ-rule equals the sum of its contributions, and the derivative for γ = 0."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.gradients import gamma_rule
from vitscope.attention.linear_rules import gamma_pull


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layer(gamma: float, with_bias: bool) -> None:
    x, weight, bias, g = numbers(7, 6), numbers(5, 6, seed=1), numbers(5, seed=2) * with_bias, numbers(7, 5, seed=3)
    x[0, 2] = 0
    x[1] = 0
    pull = gamma_pull(F.linear, weight, bias if with_bias else None, gamma, {})
    torch.testing.assert_close(pull(x, g), gamma_rule(x, weight, bias, g, gamma), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.25, 100.0])
@pytest.mark.parametrize("options", [{"stride": (2, 2)}, {"stride": 1, "padding": 1}, {"groups": 3}])
def test_a_convolution(gamma: float, options: dict[str, Any]) -> None:
    groups = options.get("groups", 1)
    x, weight, bias = numbers(2, 3, 6, 6), numbers(6, 3 // groups, 2, 2, seed=1), numbers(6, seed=2)
    g = torch.ones_like(F.conv2d(x, weight, bias, **options)) * numbers(1, 6, 1, 1, seed=3)
    pull = gamma_pull(F.conv2d, weight, bias, gamma, options)
    # A convolution is a linear layer whose matrix is its response to each pixel.
    pixels = x[0].numel()
    basis = torch.eye(pixels, dtype=torch.float64).view(pixels, 3, 6, 6)
    matrix = F.conv2d(basis, weight, **options).flatten(1).T
    offsets = bias.repeat_interleave(g[0, 0].numel())
    expected = gamma_rule(x.flatten(1), matrix, offsets, g.flatten(1), gamma).view_as(x)
    torch.testing.assert_close(pull(x, g), expected, rtol=1e-10, atol=1e-12)


def test_zero_is_the_derivative_and_a_half_is_computed_in_float32() -> None:
    x, weight, bias, g = numbers(7, 6), numbers(5, 6, seed=1), numbers(5, seed=2), numbers(7, 5, seed=3)
    torch.testing.assert_close(gamma_pull(F.linear, weight, bias, 0.0, {})(x, g), g @ weight, rtol=1e-3, atol=1e-4)
    halves = [tensor.half() for tensor in (weight, bias, x, g)]
    expected = gamma_pull(F.linear, halves[0].double(), halves[1].double(), 0.5, {})(*(t.double() for t in halves[2:]))
    pulled = gamma_pull(F.linear, halves[0], halves[1], 0.5, {})(*halves[2:])
    assert pulled.dtype == torch.float32
    torch.testing.assert_close(pulled.double(), expected, rtol=1e-4, atol=1e-4)

"""The γ-rule of linear layers and convolutions, as a gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

STABILISER = 1e-6  # keeps denominators away from zero, with their sign


def gamma_pull(
    func: Any, weight: Tensor, bias: Tensor | None, gamma: float, options: Mapping[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the gradient of a linear layer or a convolution by the generalised γ-rule.

    Positive contributions to a positive output, and negative ones to a negative output, count (1 + γ) times. Only the
    input is stored; the output is computed again.

    Args:
        func: ``F.linear`` or ``F.conv2d``.
        weight: weight of the layer.
        bias: bias of the layer, or None.
        gamma: γ, at least 0.
        options: other arguments of the convolution.
    """

    def layer(x: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Tensor:
        result: Tensor = func(x, matrix, offset, **options)
        return result

    def pull(x: Tensor, gradient: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        values, matrix, received = x.to(dtype), weight.to(dtype), gradient.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        up, down = matrix + gamma * matrix.clamp_min(0), matrix + gamma * matrix.clamp_max(0)
        above, below = values.clamp_min(0), values.clamp_max(0)
        output = layer(values, matrix, offset)
        raised = layer(above, up, None if offset is None else offset + gamma * offset.clamp_min(0))
        raised += layer(below, down)
        lowered = layer(above, down, None if offset is None else offset + gamma * offset.clamp_max(0))
        lowered += layer(below, up)
        is_positive = output > 0
        scores = torch.where(is_positive, raised, lowered)
        shares = output * received / stabilised(scores, STABILISER)
        of_positive, of_negative = shares * is_positive, shares * (output < 0)
        to_above = _transposed(func, values, up, of_positive, options)
        to_above = to_above + _transposed(func, values, down, of_negative, options)
        to_below = _transposed(func, values, down, of_positive, options)
        to_below = to_below + _transposed(func, values, up, of_negative, options)
        return torch.where(values > 0, to_above, torch.where(values < 0, to_below, 0.0))

    return pull


def stabilised(denominator: Tensor, stabiliser: float) -> Tensor:
    """Return a denominator that is farther from zero by the stabiliser."""
    # Two numbers alone would have torch's default dtype.
    return denominator + torch.where(denominator < 0, -stabiliser, stabiliser).to(denominator.dtype)


def _transposed(func: Any, x: Tensor, matrix: Tensor, gradient: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Return the transposed layer applied to the gradient of its output."""
    if func is F.linear:
        return gradient @ matrix
    names = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | dict(options)
    result: Tensor = conv2d_input(tuple(x.shape), matrix, gradient, **names)
    return result

"""The gradients of norms whose deviation is a constant."""

from typing import Any

import torch
from torch import Tensor


class NormPull:
    """The gradient of a norm whose deviation is a constant, recomputed from the input."""

    def __init__(self, axes: tuple[int, ...], weight: Any, eps: float, centred: bool) -> None:
        self.axes, self.weight, self.eps, self.centred = axes, weight, eps, centred

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        dtype = torch.promote_types(activation.dtype, torch.float32)
        values, received = activation.to(dtype), gradient.to(dtype)
        result = received.clone() if self.weight is None else received * self.weight.to(dtype)
        if not self.centred:
            return result.mul_((values.square().mean(self.axes, keepdim=True) + self.eps).rsqrt())
        # On the CPU, the kernel of the norm is ten times as fast as the variance.
        shape = values.shape[len(self.axes) * -1 :]
        _, _, inverse_deviation = torch.native_layer_norm(values, shape, None, None, self.eps)
        return result.sub_(result.mean(self.axes, keepdim=True)).mul_(inverse_deviation)


class GroupNormPull:
    """The gradient of a GroupNorm whose deviation is a constant, recomputed from the input."""

    def __init__(self, groups: int, weight: Any, eps: float) -> None:
        self.groups, self.weight, self.eps = groups, weight, eps

    def __call__(self, activation: Tensor, gradient: Tensor) -> Tensor:
        dtype = torch.promote_types(activation.dtype, torch.float32)
        received = gradient.to(dtype)
        if self.weight is not None:
            received = received * self.weight.to(dtype).view(-1, *(1,) * (received.ndim - 2))
        in_groups = activation.to(dtype).reshape(len(activation), self.groups, -1)
        deviation = (in_groups.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()
        received = received.reshape(in_groups.shape)
        return ((received - received.mean(-1, keepdim=True)) / deviation).view(activation.shape)

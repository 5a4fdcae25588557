"""Preprocessed images: what a model accepts as a batch of them, and how they are displayed."""

from typing import Any

import torch
from torch import Tensor, nn

from vitscope.errors import CallError
from vitscope.images.image import InputImage, image_of_unit
from vitscope.images.preprocessing import Preprocessing
from vitscope.typing import Pixels


def require_pixels(pixels: Any, channels: int | None) -> Pixels:
    """Return a plain tensor if it is a batch of preprocessed images, (batch, channel, height, width).

    Args:
        pixels: the tensor.
        channels: number of channels of the model's input; None if it is unknown.

    Raises:
        CallError: it has another shape, is not floating-point, or contains NaN or infinity.
    """
    if pixels.ndim != 4 or 0 in pixels.shape or channels not in (None, pixels.shape[1]):
        raise CallError(
            f"a tensor of shape {tuple(pixels.shape)} is not a batch of images: (batch, {channels or 3}, height, "
            "width) is expected"
        )
    if not pixels.is_floating_point():
        raise CallError(
            f"a tensor of {pixels.dtype} is not preprocessed: pass a floating-point tensor, or arrays of uint8"
        )
    if not bool(torch.isfinite(pixels).all()):
        raise CallError("the tensor contains NaN or infinity")
    # Results of a subclass (torchvision's tv_tensors, a parameter) would be of that class too.
    return pixels if type(pixels) is Tensor else pixels.as_subclass(Tensor)


def displayed_images(pixels: Pixels, preprocessing: Preprocessing | None) -> list[InputImage]:
    """Return preprocessed pixels as images; if their preprocessing is unknown, scaled from minimum to maximum."""
    if preprocessing is not None:
        return [preprocessing.image_of(image) for image in pixels]
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    unit = (pixels - low) / (high - low).clamp_min(1e-12)
    return [image_of_unit(image.detach().float().cpu()) for image in unit]


def input_channels(module: nn.Module) -> int | None:
    """Return the input channels of a module's first convolution; None if it has no convolution."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    return None

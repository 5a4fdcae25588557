"""Modules that contain a known vision transformer: the preprocessing that such a module needs."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.images.preprocessing import Preprocessing
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel

# Inputs that differ by less are treated as equal: the order of the operations may differ.
_TOLERANCE = 1e-5


def with_backbone_preprocessing(container: VisionModel, backbone: VisionModel) -> VisionModel:
    """Return the container with the preprocessing that its backbone needs, as far as one forward pass reveals it.

    If the container passes its input on unchanged, its input needs the backbone's preprocessing. If it normalises the
    input as the backbone requires, it takes pixels in [0, 1]. In all other cases the preprocessing stays unknown.
    """
    preprocessing = backbone.preprocessing
    if preprocessing is None:
        return replace(container, no_preprocessing=f"its {container.backbone}: {backbone.no_preprocessing}")
    inputs = _inputs_or_none(container, backbone, preprocessing)
    source = f"{preprocessing.source} of {container.backbone}"
    if inputs is None:
        size = "×".join(map(str, preprocessing.size))
        reason = f"{container.backbone} did not run on an image of {size} pixels by itself"
        return replace(container, no_preprocessing=reason)
    pixels, received = inputs
    if _equal(pixels, received):
        return replace(container, preprocessing=replace(preprocessing, source=source))
    if _equal(_normalize(pixels, preprocessing), received):
        zeros, ones = (0.0,) * len(preprocessing.mean), (1.0,) * len(preprocessing.std)
        source = f"{source}, normalised by the module itself"
        return replace(container, preprocessing=replace(preprocessing, source=source, mean=zeros, std=ones))
    return replace(container, no_preprocessing=f"it changes its input before {container.backbone} in its own way")


def _inputs_or_none(
    container: VisionModel, backbone: VisionModel, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor] | None:
    """Return a random image and the tensor that the backbone's first layer received for it; None if it got none."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    pixels = torch.rand((1, len(preprocessing.mean), *preprocessing.size), generator=generator, device="cpu")
    pixels = pixels.to(container.device, container.dtype)
    received: list[Tensor] = []

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        received.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4)

    first = next((child for child in backbone.module.modules() if isinstance(child, nn.Conv2d)), backbone.module)
    hook = in_this_thread(record)
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in (backbone.module, first)]
    devices = [container.device] if container.device.type == "cuda" else []
    try:
        # Errors of the module are reported when the caller runs it, not during loading.
        with torch.random.fork_rng(devices), suppress(Exception), torch.no_grad(), container.running():
            container.module(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return (pixels, received[0]) if received else None


def _normalize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the pixels minus mean, divided by std."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (pixels.float() - mean) / std


def _equal(expected: Tensor, received: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding."""
    if expected.shape != received.shape:
        return False
    tolerance = _TOLERANCE if received.dtype in (torch.float32, torch.float64) else 0.05
    return bool(torch.allclose(expected.float(), received.float(), atol=tolerance, rtol=tolerance))

"""A module that contains a known vision transformer: what it does to the image before and after."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.images.preprocessing import Preprocessing
from vitscope.models.vision_model import VisionModel

# Inputs that differ by less are one input, computed in another order.
_TOLERANCE = 1e-5


def with_backbone(container: VisionModel, backbone: VisionModel) -> VisionModel:
    """Return the container with the preprocessing that its backbone needs, if one forward pass shows what that is.

    The container may hand its input on as it is, which then needs the backbone's preprocessing; or it may normalise
    it as the backbone needs it, and then takes pixels in [0, 1]. Anything else leaves the preprocessing unknown.
    """
    prepared = backbone.preprocessing
    if prepared is None:
        return replace(container, no_preprocessing=f"its {container.backbone}: {backbone.no_preprocessing}")
    entered = _entering(container, backbone, prepared)
    where = f"{prepared.source} of {container.backbone}"
    if entered is None:
        why = f"{container.backbone} did not run on an image of {prepared.size[0]}×{prepared.size[1]} pixels by itself"
        return replace(container, no_preprocessing=why)
    pixels, received = entered
    if _equal(pixels, received):
        return replace(container, preprocessing=replace(prepared, source=where))
    if _equal(_normalized(pixels, prepared), received):
        zero, unit = (0.0,) * len(prepared.mean), (1.0,) * len(prepared.std)
        source = f"{where}, normalised by the module itself"
        return replace(container, preprocessing=replace(prepared, source=source, mean=zero, std=unit))
    return replace(container, no_preprocessing=f"it changes its input before {container.backbone} in a way of its own")


def _entering(container: VisionModel, backbone: VisionModel, prepared: Preprocessing) -> tuple[Tensor, Tensor] | None:
    """One random image, and what reached the backbone's first layer of it; None if nothing did."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    pixels = torch.rand((1, len(prepared.mean), *prepared.size), generator=generator, device="cpu")
    pixels = pixels.to(container.device, container.dtype)
    received: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        received.extend(part for part in (*args, *kwargs.values()) if isinstance(part, Tensor) and part.ndim == 4)

    first = next((child for child in backbone.module.modules() if isinstance(child, nn.Conv2d)), backbone.module)
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in (backbone.module, first)]
    devices = [container.device] if container.device.type == "cuda" else []
    try:
        # What the module itself thinks of its input is said when it is asked for something, not here.
        with torch.random.fork_rng(devices), suppress(Exception), torch.no_grad(), container.running():
            container.module(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return (pixels, received[0]) if received else None


def _normalized(pixels: Tensor, prepared: Preprocessing) -> Tensor:
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
        for values in (prepared.mean, prepared.std)
    )
    return (pixels.float() - mean) / std


def _equal(expected: Tensor, received: Tensor) -> bool:
    if expected.shape != received.shape:
        return False
    tolerance = _TOLERANCE if received.dtype in (torch.float32, torch.float64) else 0.05
    return bool(torch.allclose(expected.float(), received.float(), atol=tolerance, rtol=tolerance))

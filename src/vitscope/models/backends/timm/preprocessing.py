"""timm: ``pretrained_cfg`` and data configurations as a :class:`~vitscope.images.preprocessing.Preprocessing`."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image
from timm.data import resolve_model_data_config

from vitscope.errors import CallError
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.input_pixels import input_channels

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


def input_size(module: Any) -> tuple[int, int]:
    """Return the height and width that the module was built for, in pixels."""
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return tuple(size) if size else tuple(resolve_model_data_config(module)["input_size"][1:])


def module_preprocessing(module: Any, image_size: tuple[int, int] | None) -> tuple[Preprocessing | None, str]:
    """Return the preprocessing in the module's ``pretrained_cfg`` and "", or None and the reason why there is none."""
    facts = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    if not facts.get("mean"):
        return None, "the module has no pretrained_cfg"
    size = image_size or input_size(module)
    config = resolve_model_data_config(module)
    channels = input_channels(module)
    if len(config["mean"]) != len(config["std"]) or channels not in (None, len(config["mean"])):
        return None, f"its pretrained_cfg is for {len(config['mean'])} channels, but the module takes {channels}"
    if config.get("crop_mode") == "border":
        return None, "timm's crop mode 'border' pads the image, which is not supported"
    preprocessing = read_data_config({**config, "input_size": (channels, *size)}, None)
    return replace(preprocessing, source="timm's pretrained_cfg"), ""


def read_data_config(config: Mapping[str, Any], image_size: tuple[int, int] | None) -> Preprocessing:
    """Return timm's data configuration as a Preprocessing.

    Args:
        config: result of timm's ``resolve_model_data_config``.
        image_size: height and width of the input in pixels; None for the size in the configuration.

    Raises:
        CallError: the configuration pads the image, or lacks mean, std or size.
    """
    missing = [name for name in ("input_size", "mean", "std") if not config.get(name)]
    if missing and (missing != ["input_size"] or image_size is None):
        raise CallError(
            f"timm's data configuration lacks {', '.join(missing)}: pass the result of resolve_model_data_config"
        )
    size = image_size or tuple(config["input_size"][1:])
    squash, crop_pct = config.get("crop_mode") == "squash", config.get("crop_pct") or 0.875
    if config.get("crop_mode") == "border":
        raise CallError("timm's crop mode 'border' pads the image, which is not supported: pass mean and std")
    return Preprocessing(
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit="squash" if squash else "crop",
        resize_to=(math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)),
        resample=_RESAMPLE.get(config.get("interpolation", "bicubic"), Image.Resampling.BICUBIC),
        round_half_even=True,
    )

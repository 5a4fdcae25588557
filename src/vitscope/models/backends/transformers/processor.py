"""transformers: image processor settings as a :class:`~vitscope.images.preprocessing.Preprocessing`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers
from PIL import Image

from vitscope.errors import CallError
from vitscope.images.preprocessing import Preprocessing


def processor_settings(source: str, local_only: bool) -> Mapping[str, Any] | None:
    """Return the image processor settings of a checkpoint; None if it has none."""
    if not source:
        return None
    try:
        return transformers.ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local_only)[0]
    except (OSError, ValueError):
        return None


def default_processor(processor: str | Mapping[str, Any], size: Any) -> Preprocessing:
    """Return the preprocessing of a family's image processor, for models that were not loaded from a checkpoint."""
    settings = processor if isinstance(processor, Mapping) else getattr(transformers, processor)().to_dict()
    preprocessing = _at_size(read_processor(settings), size)
    return replace(
        preprocessing, source="the default of the model's family, because the model does not come from a checkpoint"
    )


def saved_processor(
    family: str | Mapping[str, Any], settings: Mapping[str, Any], size: tuple[int, int] | None, source: str
) -> Preprocessing:
    """Return the preprocessing that a checkpoint was saved with.

    Missing settings are taken from the class that saved the others or, if that is unknown, from the model's family.

    Args:
        family: name of the family's image processor class, or its settings.
        settings: content of ``preprocessor_config.json``.
        size: height and width in pixels; None for the size in the settings.
        source: origin of the settings, for people to read.

    Raises:
        CallError: the settings have no fixed input size, and ``size`` is None.
    """
    defaults = _processor_class(settings) or family
    if isinstance(defaults, str):
        defaults = getattr(transformers, defaults)().to_dict()
    merged = {**defaults, **settings}
    try:
        preprocessing = read_processor(merged)
    except CallError:
        if size is None:
            raise
        squash = {"do_resize": True, "do_center_crop": False, "size": {"height": size[0], "width": size[1]}}
        preprocessing = read_processor({**merged, **squash})
    return replace(_at_size(preprocessing, size), source=source)


def _at_size(preprocessing: Preprocessing, size: Any) -> Preprocessing:
    return preprocessing if size is None or size == preprocessing.size else preprocessing.resized(size)


def _processor_class(settings: Mapping[str, Any]) -> str | None:
    """Return the name of the class that saved the settings; None if transformers has none that needs no torchvision."""
    saved = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    name = saved.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor") + "Pil"
    return name if saved and hasattr(transformers, name) else None


def read_processor(settings: Mapping[str, Any]) -> Preprocessing:
    """Return the settings of a transformers image processor as a Preprocessing.

    Raises:
        CallError: the settings have no fixed input size.
    """
    size, crop = settings.get("size"), settings.get("crop_size")
    do_crop = bool(settings.get("do_center_crop")) and crop is not None
    if isinstance(size, int):
        # The meaning of a single number differs between classes.
        square = getattr(transformers, _processor_class(settings) or "", None)
        is_square = not do_crop if square is None else square.default_to_square
        size = {"height": size, "width": size} if is_square else {"shortest_edge": size}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if not settings.get("do_resize", True) or not isinstance(size, Mapping):
        raise CallError("this image processor does not resize, so the input size is unknown: pass image_size")
    fit: Any
    if size.get("shortest_edge") and settings.get("do_center_crop"):
        fit, target = "crop", (size["shortest_edge"], size["shortest_edge"])
    elif "height" in size and "width" in size:
        fit, target = "squash", (size["height"], size["width"])
    else:
        raise CallError(f"this image processor resizes to {dict(size)}, which is not a fixed size: pass image_size")
    final = (crop["height"], crop["width"]) if do_crop and crop else target
    # The input is (255 · factor · unit − mean) / std, but a Preprocessing always starts from pixels in [0, 1].
    scale = 255 * (settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 255
    normalise = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normalise else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(
        size=final,
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
        fit=fit,
        resize_to=target,
        resample=Image.Resampling(settings.get("resample", 2)),
    )

"""transformers: the settings of an image processor as a :class:`~vitscope.images.preprocessing.Preprocessing`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers
from PIL import Image

from vitscope.errors import CallError
from vitscope.images.preprocessing import Preprocessing


def processor_settings(source: str, local_only: bool) -> Mapping[str, Any] | None:
    """Return what the checkpoint says about its preprocessing, or None."""
    if not source:
        return None
    try:
        return transformers.ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local_only)[0]
    except (OSError, ValueError):
        return None


def default_processor(processor: str | Mapping[str, Any], size: Any) -> Preprocessing:
    """Return the preprocessing of a family's image processor, for models that come from no checkpoint."""
    settings = processor if isinstance(processor, Mapping) else getattr(transformers, processor)().to_dict()
    made = read_processor(settings)
    made = made if size is None or made.size == size else made.resized(size)
    return replace(made, source="the default of the model's family, because the model comes from no checkpoint")


def saved_processor(
    family: str | Mapping[str, Any], settings: Mapping[str, Any], size: tuple[int, int] | None, source: str
) -> Preprocessing:
    """Return the preprocessing that a checkpoint was saved with.

    What its settings leave out is completed by the class that saved them, else by that of the model's family.

    Raises:
        CallError: the settings keep no fixed input size, and ``size`` is None.
    """
    defaults = _processor_class(settings) or family
    if isinstance(defaults, str):
        defaults = getattr(transformers, defaults)().to_dict()
    merged = {**defaults, **settings}
    try:
        made = read_processor(merged)
    except CallError:
        if size is None:
            raise
        squash = {"do_resize": True, "do_center_crop": False, "size": {"height": size[0], "width": size[1]}}
        made = read_processor({**merged, **squash})
    made = made if size is None or size == made.size else made.resized(size)
    return replace(made, source=source)


def _processor_class(settings: Mapping[str, Any]) -> str | None:
    """The name of the class that saved the settings, if transformers has it without torchvision."""
    saved = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    name = saved.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor") + "Pil"
    return name if saved and hasattr(transformers, name) else None


def read_processor(settings: Mapping[str, Any]) -> Preprocessing:
    """The settings of a transformers image processor as a :class:`Preprocessing`."""
    size, crop = settings.get("size"), settings.get("crop_size")
    do_crop = bool(settings.get("do_center_crop")) and crop is not None
    if isinstance(size, int):
        # What one number means differs from class to class.
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
        raise CallError(f"this image processor resizes to {dict(size)}, which keeps no fixed size: pass image_size")
    final = (crop["height"], crop["width"]) if do_crop and crop else target
    # The input is (255 · factor · unit − mean) / std: whatever the factor, a Preprocessing starts from [0, 1].
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

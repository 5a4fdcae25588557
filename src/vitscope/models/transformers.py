"""transformers: which tokens its vision models have, and which of them their heads read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vitscope.errors import CallError, UnknownModelError
from vitscope.models import transformers_swin
from vitscope.models.foreign_errors import foreign_errors
from vitscope.models.hub import hub_in_reach
from vitscope.models.libraries import library_module
from vitscope.models.paths import model_path
from vitscope.models.transformers_checkpoint import Checkpoint, fill
from vitscope.models.transformers_classes import HEADS, quiet
from vitscope.models.transformers_classes import architecture as architecture
from vitscope.models.transformers_classes import build as build
from vitscope.models.transformers_classes import heads as heads
from vitscope.models.transformers_classes import read as read
from vitscope.models.transformers_classes import with_classes as with_classes
from vitscope.models.transformers_classes import write as write
from vitscope.models.transformers_config import check_processor_file, class_for, read_config
from vitscope.models.vision_model import Layout, VisionModel
from vitscope.models.weights import head_rows
from vitscope.models.weights_file import read_weights
from vitscope.picture import Preprocessing

Prefix = Callable[[Any], tuple[str, ...]]
Readout = Mapping[str, float]


def _cls(_: Any) -> tuple[str, ...]:
    return ("cls",)


def _cls_and_registers(config: Any) -> tuple[str, ...]:
    return ("cls", *(f"register_{i + 1}" for i in range(config.num_register_tokens)))


@dataclass(frozen=True)
class Family:
    """Facts of one model type.

    ``readout`` is what the bare model's pooled output reads, ``heads`` what a class with a head reads.
    ``resize_positions`` is True where the model stretches its position embedding only when asked to.
    """

    prefix: Prefix
    readout: Callable[[Any], Readout] = lambda _: {"cls": 1.0}
    heads: Mapping[str, Readout] = field(default_factory=dict)
    resize_positions: bool = False
    processor: str | Mapping[str, Any] = "ViTImageProcessorPil"


_HALF_PATCHES = {"cls": 0.5, "patches": 0.5}
_DINOV3_PROCESSOR = {
    "size": {"height": 224, "width": 224},
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "resample": 2,
}

FAMILIES: Mapping[str, Family] = {
    "vit": Family(_cls, resize_positions=True),
    "deit": Family(
        lambda _: ("cls", "distillation"),
        heads={"DeiTForImageClassificationWithTeacher": {"cls": 0.5, "distillation": 0.5}},
        resize_positions=True,
        processor="DeiTImageProcessorPil",
    ),
    "dinov2": Family(_cls, heads={"Dinov2ForImageClassification": _HALF_PATCHES}, processor="BitImageProcessorPil"),
    "dinov2_with_registers": Family(
        _cls_and_registers,
        heads={"Dinov2WithRegistersForImageClassification": _HALF_PATCHES},
        processor="BitImageProcessorPil",
    ),
    "dinov3_vit": Family(_cls_and_registers, processor=_DINOV3_PROCESSOR),
    # BEiT has a CLS token and, unless told otherwise, does not read it.
    "beit": Family(
        _cls,
        lambda config: {"patches": 1.0} if config.use_mean_pooling else {"cls": 1.0},
        processor="BeitImageProcessorPil",
    ),
    "clip_vision_model": Family(
        _cls,
        heads={"CLIPForImageClassification": {"patches": 1.0}},
        resize_positions=True,
        processor="CLIPImageProcessorPil",
    ),
    "siglip_vision_model": Family(
        lambda _: (),
        lambda config: {"pooling": 1.0} if config.vision_use_head else {"patches": 1.0},
        # SiglipForImageClassification has the pooling layer and reads the mean of the patches instead.
        heads={"SiglipForImageClassification": {"patches": 1.0}},
        resize_positions=True,
        processor="SiglipImageProcessorPil",
    ),
    "swin": Family(lambda _: (), lambda _: {"patches": 1.0}),
    "swinv2": Family(lambda _: (), lambda _: {"patches": 1.0}),
}


def load(
    name_or_path: str,
    *,
    pretrained: bool,
    image_size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    name: str | None = None,
    weights: str | Path | None = None,
    output: str | None = None,
    classes: int | None = None,
) -> VisionModel:
    """Load a hub id, a local folder or, for random weights or with ``weights``, a model type.

    Args:
        weights: a file with the weights of this architecture, in place of the pretrained ones.
        output: ``"features"`` leaves the classifier out; by default the model is what was saved.
        classes: the number of classes of a classifier that stays untrained, because the caller replaces it.

    Raises:
        ModelUnavailableError: the weights cannot be reached, or do not fill the model.
    """
    if output not in (None, "features"):
        raise CallError(f'output is {output!r}: pass "features", or None for the output that the model was saved with')
    called = name or name_or_path
    with quiet():
        if (not pretrained or weights is not None) and name_or_path in transformers.CONFIG_MAPPING:
            config, source, local_only = transformers.CONFIG_MAPPING[name_or_path](), "", True
        else:
            source, local_only = name_or_path, model_path(name_or_path).exists() or not hub_in_reach()
            config = read_config(source, local_only)
        if config.model_type == "timm_wrapper":
            return _by_timm(name_or_path, called, pretrained, image_size, dtype, weights)
        state = None if weights is None else read_weights(weights)
        rows = classes or (None if state is None else head_rows(state, HEADS))
        if rows is not None and rows != config.num_labels:
            config.num_labels = rows
        module_class = class_for(config, output, classes=classes is not None)
        if pretrained or state is not None:
            called_weights = called if weights is None else str(weights)
            checkpoint = Checkpoint(called_weights, source, local_only, state)
            module: Any = fill(module_class, config, checkpoint, dtype=dtype, untrained_head=classes is not None)
        else:
            with foreign_errors(f"{called} cannot be loaded: building {module_class.__name__} from its config.json"):
                wants_tower = not isinstance(config, module_class.config_class)
                module = module_class._from_config(config.vision_config if wants_tower else config)
                module = module if dtype is None else module.to(dtype)
        check_processor_file(called, source)
        settings = _processor_settings(source, local_only)
        with foreign_errors(f"{called} cannot be loaded: reading its layout and preprocessing"):
            return _describe(module.eval(), settings, image_size, called)


def _by_timm(
    source: str,
    name: str,
    pretrained: bool,
    image_size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    weights: str | Path | None,
) -> VisionModel:
    """Load what transformers would open with its wrapper of timm, whose preprocessing timm knows."""
    kind = "local-dir" if Path(source).exists() else "hf-hub"
    loaded: VisionModel = library_module("timm").load(
        f"{kind}:{source}", pretrained=pretrained, image_size=image_size, dtype=dtype, weights=weights
    )
    return replace(loaded, name=name)


def wrap(module: nn.Module, *, image_size: tuple[int, int] | None) -> VisionModel:
    """A live transformers model with the facts of its family; its preprocessing if it is on this machine."""
    source = getattr(module.config, "_name_or_path", "")
    with quiet():
        settings = _processor_settings(source, local_only=True)
    name = Path(source).name if Path(source).is_dir() else source  # a folder's path belongs to one machine only
    return _describe(module, settings, image_size, name or type(module).__name__)


def _describe(
    module: nn.Module, settings: Mapping[str, Any] | None, image_size: tuple[int, int] | None, name: str
) -> VisionModel:
    has_head = "ForImageClassification" in type(module).__name__
    if hasattr(module.config, "vision_config") and not has_head:
        module = module.vision_model  # type: ignore[assignment]
    if getattr(module, "main_input_name", "pixel_values") != "pixel_values":
        raise UnknownModelError(f"{name} is a {type(module).__name__}, which does not look at pictures")
    config: Any = getattr(module.config, "vision_config", module.config)
    family = FAMILIES.get(config.model_type)
    layout = None
    if family is not None:
        readout = family.heads.get(type(module).__name__, family.readout(config))
        windowed = config.model_type in transformers_swin.MODEL_TYPES
        hierarchy = transformers_swin.hierarchy(module) if windowed else None
        layout = Layout(_square(config.patch_size), family.prefix(config), readout, hierarchy, partial_patches=windowed)
    facts = family or Family(_cls)
    id2label: dict[int, str] = getattr(module.config, "id2label", {}) if has_head else {}
    return VisionModel(
        name,
        "transformers",
        module,
        _forward(module, config, facts.resize_positions),
        layout,
        _preprocessing(facts, config, settings, image_size),
        tuple(id2label[i] for i in sorted(id2label)) or None,
        {"transformers": transformers.__version__},
        None if has_head or layout is None else _embed(module, config, facts.resize_positions, layout),
    )


def _embed(
    module: nn.Module, config: Any, resize_positions: bool, layout: Layout
) -> Callable[[Tensor], Float[Tensor, "batch channel"]]:
    """The pooled output, or the readout of the last tokens where the pooling layer is one that needs training."""
    trained = _square(getattr(config, "image_size", None))
    untrained = hasattr(getattr(module, "pooler", None), "dense")

    def embed(pixels: Tensor) -> Tensor:
        output: Any = module(pixel_values=pixels, **_positions(pixels, trained, resize_positions))
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and not untrained:
            return pooled
        tokens, prefix = output.last_hidden_state, layout.prefix_names
        sources = {name: tokens[:, i] for i, name in enumerate(prefix)}
        sources |= {"patches": tokens[:, len(prefix) :].mean(1), "tokens": tokens.mean(1)}
        return sum(weight * sources[source] for source, weight in layout.readout.items())

    return embed


def _positions(pixels: Tensor, trained: tuple[Any, Any], resize_positions: bool) -> dict[str, bool]:
    """What a model is told that stretches its position embedding only when asked to."""
    return {"interpolate_pos_encoding": True} if resize_positions and tuple(pixels.shape[-2:]) != trained else {}


def _forward(module: nn.Module, config: Any, resize_positions: bool) -> Callable[[Tensor], Tensor | None]:
    trained = _square(getattr(config, "image_size", None))

    def forward(pixels: Tensor) -> Tensor | None:
        return getattr(module(pixel_values=pixels, **_positions(pixels, trained, resize_positions)), "logits", None)

    return forward


def _processor_settings(source: str, local_only: bool) -> Mapping[str, Any] | None:
    """What the checkpoint says about its preprocessing, or None."""
    if not source:
        return None
    try:
        return transformers.ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local_only)[0]
    except (OSError, ValueError):
        return None


def _preprocessing(
    family: Family, config: Any, settings: Mapping[str, Any] | None, size: tuple[int, int] | None
) -> Preprocessing:
    """The checkpoint's own preprocessing; where none was saved, the family's at the size of the configuration."""
    defaults = _processor_class(settings or {}) or family.processor
    if isinstance(defaults, str):
        defaults = getattr(transformers, defaults)().to_dict()
    merged = {**defaults, **(settings or {})}
    try:
        made = read_processor(merged)
    except CallError:
        if size is None:
            raise
        squash = {"do_resize": True, "do_center_crop": False, "size": {"height": size[0], "width": size[1]}}
        made = read_processor({**merged, **squash})
    if size is None and settings is None and getattr(config, "image_size", None):
        size = _square(config.image_size)
    return made if size is None or size == made.size else made.resized(size)


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


def _square(size: Any) -> tuple[Any, Any]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)

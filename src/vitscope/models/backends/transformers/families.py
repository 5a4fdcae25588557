"""transformers: one table of facts for each family, its tokens and what its classes with a head read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Prefix = Callable[[Any], tuple[str, ...]]
Readout = Mapping[str, float]


def cls_alone(_: Any) -> tuple[str, ...]:
    return ("cls",)


def cls_and_registers(config: Any) -> tuple[str, ...]:
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
    "vit": Family(cls_alone, resize_positions=True),
    "deit": Family(
        lambda _: ("cls", "distillation"),
        heads={"DeiTForImageClassificationWithTeacher": {"cls": 0.5, "distillation": 0.5}},
        resize_positions=True,
        processor="DeiTImageProcessorPil",
    ),
    "dinov2": Family(
        cls_alone, heads={"Dinov2ForImageClassification": _HALF_PATCHES}, processor="BitImageProcessorPil"
    ),
    "dinov2_with_registers": Family(
        cls_and_registers,
        heads={"Dinov2WithRegistersForImageClassification": _HALF_PATCHES},
        processor="BitImageProcessorPil",
    ),
    "dinov3_vit": Family(cls_and_registers, processor=_DINOV3_PROCESSOR),
    # BEiT has a CLS token and, unless told otherwise, does not read it.
    "beit": Family(
        cls_alone,
        lambda config: {"patches": 1.0} if config.use_mean_pooling else {"cls": 1.0},
        processor="BeitImageProcessorPil",
    ),
    "clip_vision_model": Family(
        cls_alone,
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

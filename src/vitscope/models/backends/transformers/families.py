"""transformers: the facts of each family: its tokens, what its heads read, and the classes that belong to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitscope.models.outputs import Output

Prefix = Callable[[Any], tuple[str, ...]]
Readout = Mapping[str, float]

# Attributes of a model: classifiers, and pooling layers of bare models, which classes with a classifier may not have.
HEADS = ("classifier", "cls_classifier", "distillation_classifier")
POOLERS = ("pooler", "head")


def cls_alone(_: Any) -> tuple[str, ...]:
    """Return the prefix of a family with a CLS token only."""
    return ("cls",)


def cls_and_registers(config: Any) -> tuple[str, ...]:
    """Return the prefix of a family with a CLS token and register tokens."""
    return ("cls", *(f"register_{i + 1}" for i in range(config.num_register_tokens)))


@dataclass(frozen=True)
class Family:
    """Facts of one model type.

    Attributes:
        prefix: function that returns the names of the tokens before the patches from the configuration.
        readout: function that returns the readout of the bare model's pooled output from the configuration.
        heads: readout of each class with a head, by class name.
        resize_positions: True if the model resamples its position embedding only on request.
        processor: name of the family's image processor class, or its settings.
        windowed: True if attention runs in windows, with patch merging between the stages.
        classifier_class: name of the class with a classifier, if it belongs to the model type of the whole text-image
            model.
    """

    prefix: Prefix
    readout: Callable[[Any], Readout] = lambda _: {"cls": 1.0}
    heads: Mapping[str, Readout] = field(default_factory=dict)
    resize_positions: bool = False
    processor: str | Mapping[str, Any] = "ViTImageProcessorPil"
    windowed: bool = False
    classifier_class: str = ""


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
    # BEiT has a CLS token, but by default its classifier does not read it.
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
        classifier_class="CLIPForImageClassification",
    ),
    "siglip_vision_model": Family(
        lambda _: (),
        lambda config: {"pooling": 1.0} if config.vision_use_head else {"patches": 1.0},
        # SiglipForImageClassification has the pooling layer, but reads the mean of the patches.
        heads={"SiglipForImageClassification": {"patches": 1.0}},
        resize_positions=True,
        processor="SiglipImageProcessorPil",
        classifier_class="SiglipForImageClassification",
    ),
    "swin": Family(lambda _: (), lambda _: {"patches": 1.0}, windowed=True),
    "swinv2": Family(lambda _: (), lambda _: {"patches": 1.0}, windowed=True),
}


@dataclass(frozen=True)
class TextFamily:
    """Facts of one type of text-image model.

    Attributes:
        module_class: name of the class with both towers.
        meaning: meaning of its logits.
        padding: padding of the tokens in training: ``"longest"`` or ``"max_length"``.
        reads_end: whether the vector of a text is that of its end token.
    """

    module_class: str
    meaning: Output
    padding: str
    reads_end: bool = False


TEXT_FAMILIES: Mapping[str, TextFamily] = {
    "clip": TextFamily("CLIPModel", "softmax", "longest", reads_end=True),
    "siglip": TextFamily("SiglipModel", "sigmoid", "max_length"),
}

# Text-image models are loaded as their vision tower.
TOWERS: Mapping[str, str] = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}

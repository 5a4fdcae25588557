"""transformers: models with another classifier, and their architecture as JSON and as a folder."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from vitscope.errors import ModelUnavailableError, WorkError
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.backends.library_logging import quiet as quiet
from vitscope.models.backends.transformers.families import FAMILIES, HEADS, POOLERS
from vitscope.models.checkpoints.paths import PROCESSOR_FILE
from vitscope.models.checkpoints.weights import Mismatch, list_names
from vitscope.validation import short_repr


def reset_classifier(module: Any, labels: Sequence[str]) -> nn.Module | None:
    """Return a new model with an untrained classifier and the weights of ``module``.

    The result is None if transformers has no class with a classifier for this backbone.

    Raises:
        WorkError: a weight of ``module`` has no counterpart in the class with a classifier.
    """
    if not isinstance(module, transformers.PreTrainedModel) and hasattr(module, "get_base_model"):
        module = module.get_base_model()  # PEFT's wrapper
    module_class = _class_with_head(module)
    if module_class is None:
        return None
    config = copy.deepcopy(module.config)
    if not isinstance(config, module_class.config_class):
        config = module_class.config_class(vision_config=config.to_dict())
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    classifier = module_class._from_config(config, attn_implementation=module.config._attn_implementation)
    if isinstance(module, module_class):
        _copy_backbone(module, classifier)
    else:
        backbone = "vision_model" if hasattr(config, "vision_config") else classifier.base_model_prefix
        _copy_backbone(getattr(module, backbone, module), getattr(classifier, backbone))
    weight = next(module.parameters())
    return classifier.to(weight.device, weight.dtype).train(module.training)


def get_classifiers(module: Any) -> list[nn.Linear]:
    """Return the linear layers that compute the logits."""
    return [getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), nn.Linear)]


def architecture(module: Any) -> Mapping[str, Any]:
    """Return what :func:`build` needs, as JSON values: the class and its configuration."""
    return {"class": type(module).__name__, "config": json.loads(module.config.to_json_string(use_diff=False))}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Build a model with random weights from the result of :func:`architecture`.

    Raises:
        ModelUnavailableError: the class is not a vision model of transformers.
    """
    module_class = _vision_class(architecture["class"])
    config = dict(architecture["config"])
    if any("timm" in key and config[key] for key in config) or config.get("auto_map"):
        raise ModelUnavailableError(
            f"{module_class.__name__} cannot be built: its configuration requests code from outside transformers"
        )
    return module_class._from_config(module_class.config_class.from_dict(config))


def _vision_class(name: Any) -> Any:
    """Return the class of transformers with this name, if it is a model that takes images."""
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.__name__ == name
    if not is_model or name.startswith("Timm") or getattr(cls, "main_input_name", "") != "pixel_values":
        raise ModelUnavailableError(
            f"{short_repr(name, 80)} is not a vision model of transformers, so it cannot be built"
        )
    return cls


def write(module: Any, folder: Path, preprocessing: Preprocessing | None) -> None:
    """Write a module and its preprocessing as an ordinary transformers folder."""
    with quiet():
        module.save_pretrained(folder)
    if preprocessing is not None:
        settings = _processor_settings(preprocessing)
        (folder / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, architecture: Mapping[str, Any]) -> nn.Module:
    """Return the module that :func:`write` wrote.

    Raises:
        ValueError: the weights belong to another model; transformers itself would fill missing ones randomly.
    """
    module_class = _vision_class(architecture["class"])
    with quiet():
        module, info = module_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatch = mismatch_from(info)
    if mismatch:
        raise ValueError(f"its weights do not fit {module_class.__name__}: {mismatch}")
    return module


def mismatch_from(info: Mapping[str, Any]) -> Mismatch:
    """Return the loading report of transformers as a Mismatch."""
    return Mismatch(
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        tuple((name, tuple(saved), tuple(expected)) for name, saved, expected in sorted(info["mismatched_keys"])),
    )


def _copy_backbone(source: nn.Module, target: nn.Module) -> None:
    """Copy every weight except those of the classifier and of a pooling layer that ``target`` does not have.

    Raises:
        WorkError: another weight has no counterpart in ``target``.
    """
    expected, weights = target.state_dict(), source.state_dict()
    heads = {name for name in weights if name.partition(".")[0] in HEADS}
    backbone = {name: tensor for name, tensor in weights.items() if name not in heads}
    fitting = {
        name: tensor for name, tensor in backbone.items() if name in expected and expected[name].shape == tensor.shape
    }
    # Masked image modelling replaces patches by a token that no classifier ever reads.
    unread = {name for name in backbone if name.partition(".")[0] in POOLERS or name.endswith("mask_token")}
    lost = [name for name in backbone if name not in fitting and name not in unread]
    untrained = [name for name in expected if name not in fitting and name.partition(".")[0] not in (*HEADS, *POOLERS)]
    if lost or untrained:
        raise WorkError(
            f"cannot replace the classifier of {type(source).__name__}: {len(lost)} of its {len(backbone)} weights do "
            f"not exist in {type(target).__name__} ({list_names(lost)}), and {len(untrained)} weights of that would be "
            f"untrained ({list_names(untrained)})"
        )
    target.load_state_dict(fitting, strict=False)


def _class_with_head(module: Any) -> Any:
    """Return the class with a classifier for this module; None if transformers has none."""
    if get_classifiers(module):
        return type(module)
    config: Any = module.config
    family = FAMILIES.get(config.model_type)
    if family is not None and family.classifier_class:
        return getattr(transformers, family.classifier_class)
    return classification_class(config)


def classification_class(config: Any) -> Any:
    """Return transformers' image classification class for a configuration; None if there is none."""
    classes = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    return classes[0] if isinstance(classes, tuple) else classes


def _processor_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return a preprocessing as the settings of an image processor of transformers."""
    height, width = preprocessing.size
    resize_height, resize_width = preprocessing.resize_to or preprocessing.size
    crops = preprocessing.fit == "crop"
    squashed = {"height": resize_height, "width": resize_width}
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(resize_height, resize_width)} if crops else squashed,
        **(crop if crops else {}),
        "resample": int(preprocessing.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }

"""timm: the classifier of a model and its labels, and the options from which a model is rebuilt."""

import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.data import ImageNetInfo
from torch import nn

from vitscope.errors import ModelUnavailableError, UnknownModelError
from vitscope.models.backends.timm.preprocessing import input_size
from vitscope.validation import short_repr

# Prefixes of options that lead to files, to the hub, or to other code.
_SOURCE_OPTIONS = ("pretrained", "checkpoint", "file", "url", "hf_hub", "cache_dir", "state_dict", "script", "export")

# The subsets of ImageNet whose class names timm contains, by number of classes.
_IMAGENETS = {1000: "imagenet-1k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog", 11821: "imagenet-12k"}


def classifier_of(module: Any) -> Any:
    """Return the classifier that the module declares; None if it declares none."""
    try:
        return module.get_classifier()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def get_classifiers(module: Any) -> list[nn.Linear]:
    """Return the linear layers that compute the logits."""
    return [layer for layer in _layers(module.get_classifier()) if isinstance(layer, nn.Linear)]


def _layers(classifier: Any) -> tuple[Any, ...]:
    return classifier if isinstance(classifier, tuple) else (classifier,)


def reset_classifier(module: Any, labels: Sequence[str]) -> nn.Module:
    """Return the same module with an untrained classifier."""
    module.reset_classifier(len(labels))
    weight = next(module.parameters())
    return module.to(weight.device, weight.dtype)


def class_labels(module: Any, classifier: Any) -> tuple[str, ...] | None:
    """Return the names of the classes; None if they do not fit the current classifier.

    A replaced head may have other classes than ``num_classes`` states.
    """
    sizes = {layer.out_features for layer in _layers(classifier) if isinstance(layer, nn.Linear)}
    facts = getattr(module, "pretrained_cfg", None) or {}
    saved = facts.get("label_names")
    if saved and sizes == {len(saved)}:
        descriptions = facts.get("label_descriptions") or {}
        return tuple(str(descriptions.get(name, name)) for name in saved)
    subset = _IMAGENETS.get(module.num_classes) if sizes == {module.num_classes} else None
    if subset is None or facts.get("num_classes", 1000) != module.num_classes:
        return None
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def architecture(module: Any) -> Mapping[str, Any]:
    """Return what :func:`build` needs, as JSON values: timm's name, and the options that differ from its defaults."""
    if hasattr(timm.models, "get_model_args"):
        options = timm.models.get_model_args(module)
    else:  # timm before 1.0.31 keeps no record
        options = {"num_classes": module.num_classes, "img_size": input_size(module)}
    return {"name": module.pretrained_cfg.get("architecture", ""), "options": json.loads(json.dumps(options))}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Build a model with random weights from the result of :func:`architecture`.

    Raises:
        UnknownModelError: timm has no model of this name.
        ModelUnavailableError: an option is not an argument of the model's class.
    """
    name = architecture["name"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise UnknownModelError(f"timm has no model {short_repr(name, 80)}")
    return timm.create_model(name, pretrained=False, **require_options(name, architecture["options"]))


def require_options(architecture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of timm's class, with lists as tuples.

    Raises:
        ModelUnavailableError: an option is not an argument of the class, or is a source of weights.
    """
    arguments = {"num_classes", "in_chans", "img_size", "global_pool"}
    source = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    for cls in vars(source).values():
        if isinstance(cls, type) and (issubclass(cls, nn.Module) or dataclasses.is_dataclass(cls)):
            arguments |= set(inspect.signature(cls).parameters)
    arguments = {f"{prefix}{name}" for prefix in ("", "transformer_", "conv_") for name in arguments}
    refused = sorted(name for name in options if name not in arguments or name.startswith(_SOURCE_OPTIONS))
    if refused:
        raise ModelUnavailableError(
            f"{architecture} cannot be built with the option {refused[0]!r}: pass arguments of its class only"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}

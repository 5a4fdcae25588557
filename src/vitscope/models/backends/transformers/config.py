"""transformers: the checked configuration of a model, and the class that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from vitscope.errors import ModelUnavailableError, UnknownModelError, first_line, quoted_error
from vitscope.models.backends.transformers.families import TOWERS
from vitscope.models.backends.transformers.heads import classification_class
from vitscope.models.checkpoints.json_file import read_object
from vitscope.models.checkpoints.paths import PROCESSOR_FILE

PROCESSOR_FILES = (PROCESSOR_FILE, "processor_config.json")

# No vision model has more layers, heads, channels or pixels per side than this.
_LARGEST_SIZE = 100_000
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "image_size", "num_channels")


def read_config(name: str, local_only: bool) -> Any:
    """Return the configuration of a local folder or hub id; code that comes with it never runs.

    Args:
        name: a folder or hub id.
        local_only: whether the hub's client must use its cache alone.

    Raises:
        UnknownModelError: the folder does not contain a model of transformers, or its configuration is damaged.
        ModelUnavailableError: the configuration is not in the cache and could not be downloaded.
    """
    local = Path(name).exists()
    if local:
        try:
            settings = read_object(Path(name) / "config.json")
        except ValueError as error:
            raise UnknownModelError(f"{name} is not a transformers folder: {error}") from None
        _check_code(name, settings)
        _check_sizes(name, settings)
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local_only, trust_remote_code=False)
        if config.model_type != "timm_wrapper":
            _check_names(config)
    except OSError as error:
        if local:
            raise UnknownModelError(f"{name} is not a transformers folder: {first_line(error)}") from None
        raise ModelUnavailableError(
            f"{name} is not in the local cache and could not be downloaded: use the bundled vit-nano, a local folder "
            "saved with save_pretrained, or check the name and the network"
        ) from None
    except Exception as error:  # a damaged configuration causes as many kinds of errors as there are settings
        kind = "a transformers folder" if local else "a transformers model"
        raise UnknownModelError(
            f"{name} is not {kind}: its config.json cannot be used ({quoted_error(error)})"
        ) from None
    return config


def _check_sizes(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse sizes that would fill the memory before any other check runs."""
    vision = settings.get("vision_config")
    for section in (settings, vision if isinstance(vision, Mapping) else {}):
        for key in _SIZES:
            value = section.get(key)
            if isinstance(value, int | float) and value > _LARGEST_SIZE:
                raise UnknownModelError(
                    f"{name} is not a transformers folder: {key} in its config.json is {value:.3g}, at most "
                    f"{_LARGEST_SIZE:,} is supported"
                )


def class_for(config: Any, output: str | None = None, *, classes: bool = False) -> Any:
    """Return the class with a classifier from which the weights were saved, or else the vision tower or bare model.

    Args:
        config: the configuration.
        output: ``"features"`` selects a class without a classifier.
        classes: whether to select a class with a classifier, regardless of the class that was saved.

    Raises:
        UnknownModelError: transformers has no vision model of this type.
    """
    if output is None:
        for name in config.architectures or ():
            if isinstance(name, str) and "ForImageClassification" in name and hasattr(transformers, name):
                return getattr(transformers, name)
    has_classification_class = type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if classes and has_classification_class:
        return classification_class(config)
    if config.model_type in TOWERS:
        return getattr(transformers, TOWERS[config.model_type])
    if output is None and not config.architectures and has_classification_class:
        return classification_class(config)
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise UnknownModelError(f"transformers has no vision model of type {config.model_type!r}") from None


def check_processor_file(name: str, source: str) -> None:
    """Refuse a folder whose preprocessing was saved but cannot be read.

    Raises:
        ModelUnavailableError: the file is damaged.
    """
    for file in PROCESSOR_FILES:
        path = Path(source) / file
        if source and Path(source).is_dir() and (path.exists() or path.is_symlink()):
            try:
                read_object(path)
            except ValueError as error:
                raise ModelUnavailableError(f"{name} cannot be loaded: {error}: repair or remove the file") from None


def _check_code(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that needs Python code from outside transformers."""
    supported = settings.get("model_type") in transformers.CONFIG_MAPPING
    if settings.get("auto_map") and not supported and "architecture" not in settings:
        raise UnknownModelError(
            f"{name} needs Python code that comes with it, which vitscope never runs: build the model yourself and "
            "pass it to vs.load"
        )


def _check_names(config: Any) -> None:
    """Refuse class names and labels of the wrong type."""
    if config.architectures is not None and not isinstance(config.architectures, list):
        raise ValueError("architectures must be a list of class names")
    labels = config.id2label
    if not isinstance(labels, Mapping) or sorted(labels) != list(range(len(labels))):
        raise ValueError("id2label must name the classes 0, 1, 2, … in order")
    if not all(isinstance(label, str) for label in labels.values()):
        raise ValueError("id2label has a class name that is not text")

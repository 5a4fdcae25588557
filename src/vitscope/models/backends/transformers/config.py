"""transformers: the configuration of a model, checked, and the class that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from vitscope.errors import ModelUnavailableError, UnknownModelError, first_line, quoted_error
from vitscope.models.checkpoints.json_file import read_object
from vitscope.models.checkpoints.paths import PROCESSOR_FILE

PROCESSOR_FILES = (PROCESSOR_FILE, "processor_config.json")

# A model with a text half is read through its vision half.
_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def read_config(name: str, local_only: bool) -> Any:
    """Return the configuration of a local folder or hub id; code that comes with it never runs.

    Raises:
        UnknownModelError: the folder holds no model of transformers.
        ModelUnavailableError: the hub did not give it.
    """
    local = Path(name).exists()
    if local:
        try:
            settings = read_object(Path(name) / "config.json")
        except ValueError as error:
            raise UnknownModelError(f"{name} is no transformers folder: {error}") from None
        _check_code(name, settings)
        _check_sizes(name, settings)
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local_only, trust_remote_code=False)
        if config.model_type != "timm_wrapper":
            _check_names(config)
    except OSError as error:
        if local:
            raise UnknownModelError(f"{name} is no transformers folder: {first_line(error)}") from None
        raise ModelUnavailableError(
            f"{name} is not on this machine and the model hub did not give it: use the bundled vit-nano, a local "
            "folder saved with save_pretrained, or check the name and the network"
        ) from None
    except Exception as error:  # a damaged configuration fails in as many ways as there are settings
        reason = quoted_error(error)
        raise UnknownModelError(
            f"{name} is no {'transformers folder' if local else 'model of transformers'}: its config.json cannot be "
            f"used ({reason})"
        ) from None
    return config


# No vision model has more layers, heads, channels or pixels a side than this.
_LARGEST = 100_000
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "image_size", "num_channels")


def _check_sizes(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse sizes that would fill the memory before anything could be said of them."""
    vision = settings.get("vision_config")
    for part in (settings, vision if isinstance(vision, Mapping) else {}):
        for key in _SIZES:
            value = part.get(key)
            if isinstance(value, int | float) and value > _LARGEST:
                raise UnknownModelError(f"{name} is no transformers folder: its config.json says {key} is {value:.3g}")


def class_for(config: Any, output: str | None = None, *, classes: bool = False) -> Any:
    """Return the class with the classifier that the weights were saved from, else the vision tower or bare model.

    Args:
        output: ``"features"`` asks for a class without a classifier.
        classes: a class with a classifier is needed, whatever was saved.
    """
    with_head = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if output is None:
        for name in config.architectures or ():
            if isinstance(name, str) and "ForImageClassification" in name and hasattr(transformers, name):
                return getattr(transformers, name)
    if classes and type(config) in with_head:
        found = with_head[type(config)]
        return found[0] if isinstance(found, tuple) else found
    if config.model_type in _TOWERS:
        return getattr(transformers, _TOWERS[config.model_type])
    if output is None and not config.architectures and type(config) in with_head:
        found = with_head[type(config)]
        return found[0] if isinstance(found, tuple) else found
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
    """Refuse a folder that no class of transformers itself can open."""
    known = settings.get("model_type") in transformers.CONFIG_MAPPING
    if settings.get("auto_map") and not known and "architecture" not in settings:
        raise UnknownModelError(
            f"{name} needs Python code that comes with it, which vitscope never runs: build the model yourself and "
            "pass it to vs.load"
        )


def _check_names(config: Any) -> None:
    if config.architectures is not None and not isinstance(config.architectures, list):
        raise ValueError("architectures must be a list of class names")
    labels = config.id2label
    if not isinstance(labels, Mapping) or sorted(labels) != list(range(len(labels))):
        raise ValueError("id2label must name the classes 0, 1, 2, … in order")
    if not all(isinstance(label, str) for label in labels.values()):
        raise ValueError("id2label holds a class whose name is no text")

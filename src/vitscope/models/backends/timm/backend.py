"""The backend of timm: load a model by name or folder, and describe a live model."""

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitscope.errors import CallError, ModelUnavailableError, UnknownModelError
from vitscope.models.backends.foreign_errors import foreign_errors
from vitscope.models.backends.timm.families import token_layout
from vitscope.models.backends.timm.heads import architecture as architecture
from vitscope.models.backends.timm.heads import build as build
from vitscope.models.backends.timm.heads import class_labels, classifier_of, require_options
from vitscope.models.backends.timm.heads import get_classifiers as get_classifiers
from vitscope.models.backends.timm.heads import reset_classifier as reset_classifier
from vitscope.models.backends.timm.preprocessing import module_preprocessing
from vitscope.models.backends.timm.preprocessing import read_data_config as read_data_config
from vitscope.models.backends.timm.weights import create_filled
from vitscope.models.checkpoints.hub import is_hub_reachable, offline, repository_folder
from vitscope.models.checkpoints.paths import model_path
from vitscope.models.checkpoints.timm_folder import WEIGHTS_FILES, WRAPPER_PREFIX, TimmFolder, read_folder
from vitscope.models.checkpoints.weights_file import read_weights
from vitscope.models.forward import Classes, MeanOfTokens, NoClasses, Observed
from vitscope.models.vision_model import VisionModel

SOURCES = ("hf-hub", "local-dir")

Size = tuple[int, int]


def load(
    name: str,
    *,
    pretrained: bool,
    image_size: Size | None,
    dtype: torch.dtype | None,
    weights: str | Path | None = None,
    classes: int | None = None,
) -> VisionModel:
    """Load a model by timm's name; for another ``image_size``, timm resamples the position embedding.

    Args:
        name: timm's name, ``hf-hub:org/name`` or ``local-dir:/path``.
        pretrained: whether to load pretrained weights; False gives random weights.
        image_size: height and width in pixels; None for the model's own size.
        dtype: precision of the weights; None for timm's choice.
        weights: weights file for this architecture, used instead of the pretrained weights.
        classes: number of classes of a classifier that stays untrained because the caller replaces it.
    """
    source, colon, location = name.partition(":")
    source = source.lower().replace("_", "-")
    if colon and source in SOURCES:
        return _load_folder(_folder(source, location, name), name, pretrained, image_size, dtype, weights, classes)
    _check_name(name)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if weights is not None:
        create = partial(timm.create_model, name, **options)
        module = create_filled(create, read_weights(weights), str(weights), image_size, adapt_classes=True)
    else:
        module = _create(name, pretrained, options | ({} if image_size is None else {"img_size": image_size}))
    module = module if dtype is None else module.to(dtype)
    return wrap(module.eval(), image_size=image_size, name=f"timm:{name}")


def has_model(name: str) -> bool:
    """Return whether timm has an architecture of this name, without the tag of its weights."""
    return timm.is_model(name.split(".")[0])


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know, and suggest the most similar names."""
    if not has_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f": did you mean {', '.join(close)}?" if close else ": timm.list_models() lists all names"
        raise UnknownModelError(f"timm has no model {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True))
        raise UnknownModelError(f"timm has no weights {name!r}: available: {tags or 'none for this model'}") from None


def _create(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    try:
        with nullcontext() if not pretrained or is_hub_reachable() else offline():
            return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise CallError(f"timm's {name} does not support image_size: {error}") from None
    except Exception as error:
        if not pretrained:
            raise
        # The hub's client raises a dozen kinds of errors for a failed download.
        raise ModelUnavailableError(
            f"timm:{name} is not in the local cache and could not be downloaded: use the bundled vit-nano, a local "
            f"folder, or pretrained=False ({type(error).__name__})"
        ) from None


def _folder(source: str, location: str, name: str) -> TimmFolder:
    """Return the folder of a local or hub model."""
    if source == "local-dir":
        path = model_path(location)
        if not location or not path.is_dir():
            raise UnknownModelError(f"timm:{name}: the folder {location!r} does not exist")
        return read_folder(path)
    snapshot = repository_folder(location, "config.json", WEIGHTS_FILES)
    if snapshot is None:
        raise ModelUnavailableError(
            f"timm:{name} is not in the local cache and could not be downloaded: check the name and the network, or "
            "use the bundled vit-nano or a local folder"
        )
    return read_folder(snapshot)


def _load_folder(
    folder: TimmFolder,
    name: str,
    pretrained: bool,
    image_size: Size | None,
    dtype: torch.dtype | None,
    weights: str | Path | None,
    classes: int | None,
) -> VisionModel:
    _check_name(folder.architecture)
    options = require_options(folder.architecture, folder.options)
    if classes is not None:
        options["num_classes"] = classes
    create = partial(timm.create_model, folder.architecture, pretrained_cfg=dict(folder.facts), **options)
    with foreign_errors(f"timm:{name} cannot be loaded: building {folder.architecture}"):
        if pretrained or weights is not None:
            file = folder.weights_file() if weights is None else weights
            state = read_weights(file)
            if folder.wrapped and all(key.startswith(WRAPPER_PREFIX) for key in state):
                state = {key.removeprefix(WRAPPER_PREFIX): tensor for key, tensor in state.items()}
            adapt = weights is not None or ("num_classes" not in folder.facts and "num_classes" not in options)
            module = create_filled(
                create, state, str(file), image_size, adapt_classes=adapt, untrained_head=bool(classes)
            )
        else:
            module = create(**({} if image_size is None else {"img_size": image_size}))
        module = module if dtype is None else module.to(dtype)
        loaded = wrap(module.eval(), image_size=image_size, name=f"timm:{name}")
    has_labels = folder.labels is not None and len(folder.labels) == getattr(module, "num_classes", 0)
    return replace(loaded, labels=folder.labels) if has_labels else loaded


def wrap(module: nn.Module, *, image_size: Size | None, name: str | None = None) -> VisionModel:
    """Describe a live timm model by the facts of its class.

    Args:
        module: a model of timm; it is not changed.
        image_size: height and width in pixels; None for the module's own size.
        name: name in messages and results; by default that of the class.
    """
    name = name or f"timm:{type(module).__name__}"
    classifier = classifier_of(module)
    has_classes = getattr(module, "num_classes", 0) > 0 and not isinstance(classifier, nn.Identity)
    own_forward = type(module).__module__.startswith("timm.")
    forward: Any = NoClasses(module)
    if has_classes:
        certain = own_forward and isinstance(classifier, nn.Linear | tuple)
        forward = Classes(module, name) if certain else Observed(module, name)
    preprocessing, reason = module_preprocessing(module, image_size)
    return VisionModel(
        name,
        "timm",
        module,
        forward,
        token_layout(module),
        preprocessing,
        class_labels(module, classifier) if has_classes else None,
        {"timm": timm.__version__},
        # Without a pooling layer, the class returns all tokens; the embedding is then their mean.
        None if has_classes else MeanOfTokens(module),
        verified=own_forward,
        no_preprocessing=reason,
    )

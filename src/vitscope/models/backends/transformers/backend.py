"""The backend of transformers: load a checkpoint, and describe a live model by the facts of its family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.errors import CallError
from vitscope.models.backends.foreign_errors import foreign_errors
from vitscope.models.backends.libraries import backend as backend_of
from vitscope.models.backends.library_logging import quiet
from vitscope.models.backends.transformers import swin
from vitscope.models.backends.transformers.checkpoint import Checkpoint, fill
from vitscope.models.backends.transformers.config import check_processor_file, class_for, read_config
from vitscope.models.backends.transformers.families import FAMILIES, HEADS, Family, cls_alone
from vitscope.models.backends.transformers.heads import architecture as architecture
from vitscope.models.backends.transformers.heads import build as build
from vitscope.models.backends.transformers.heads import get_classifiers as get_classifiers
from vitscope.models.backends.transformers.heads import read as read
from vitscope.models.backends.transformers.heads import reset_classifier as reset_classifier
from vitscope.models.backends.transformers.heads import write as write
from vitscope.models.backends.transformers.processor import default_processor, processor_settings
from vitscope.models.backends.transformers.processor import read_processor as read_processor
from vitscope.models.backends.transformers.processor import saved_processor as saved_processor
from vitscope.models.backends.transformers.text import checkpoint_texts, live_texts
from vitscope.models.backends.transformers.towers import names_pixel_values, require_submodel, vision_tower
from vitscope.models.checkpoints.hub import is_hub_reachable
from vitscope.models.checkpoints.paths import PROCESSOR_FILE, model_path
from vitscope.models.checkpoints.weights import head_rows
from vitscope.models.checkpoints.weights_file import read_weights
from vitscope.models.forward import Classes, NoClasses, Observed
from vitscope.models.layout import Layout
from vitscope.models.outputs import Output
from vitscope.models.vision_model import VisionModel

Size = tuple[int, int]


def load(
    name: str,
    *,
    pretrained: bool,
    image_size: Size | None,
    dtype: torch.dtype | None,
    weights: str | Path | None = None,
    classes: int | None = None,
    display_name: str | None = None,
    output: str | None = None,
    backbone: str | None = None,
) -> VisionModel:
    """Load a hub id or a local folder; also a model type, for random weights or with ``weights``.

    Args:
        name: a hub id, a folder, or a model type such as ``"vit"``.
        pretrained: whether to load pretrained weights; False gives random weights.
        image_size: height and width in pixels; None for the model's own size.
        dtype: precision of the weights; None for that of the checkpoint.
        weights: weights file for this architecture, used instead of the pretrained weights.
        classes: number of classes of a classifier that stays untrained because the caller replaces it.
        display_name: name in messages and results; by default ``name``.
        output: ``"features"`` omits the classifier; None keeps what the checkpoint was saved with.
        backbone: path of the submodule that takes the image, for a model with several candidates.

    Raises:
        CallError: there is no such submodule, or ``output`` has another value.
        UnknownModelError: the folder or configuration does not describe a vision model.
        ModelUnavailableError: the weights cannot be found, or do not fill the model.
    """
    if output not in (None, "features"):
        raise CallError(f'output is {output!r}: pass "features", or None for the output that the model was saved with')
    display_name = display_name or name
    with quiet():
        if (not pretrained or weights is not None) and name in transformers.CONFIG_MAPPING:
            config, source, local_only = transformers.CONFIG_MAPPING[name](), "", True
        else:
            source, local_only = name, model_path(name).exists() or not is_hub_reachable()
            config = read_config(source, local_only)
        if config.model_type == "timm_wrapper":
            return _load_by_timm(name, display_name, pretrained, image_size, dtype, weights)
        state = None if weights is None else read_weights(weights)
        rows = classes or (None if state is None else head_rows(state, HEADS))
        if rows is not None and rows != config.num_labels:
            config.num_labels = rows
        module_class = class_for(config, output, classes=classes is not None)
        if pretrained or state is not None:
            weights_name = display_name if weights is None else str(weights)
            checkpoint = Checkpoint(weights_name, source, local_only, state)
            module: Any = fill(module_class, config, checkpoint, dtype=dtype, untrained_head=classes is not None)
        else:
            with foreign_errors(
                f"{display_name} cannot be loaded: building {module_class.__name__} from its config.json"
            ):
                needs_tower = not isinstance(config, module_class.config_class)
                module = module_class._from_config(config.vision_config if needs_tower else config)
                module = module if dtype is None else module.to(dtype)
        check_processor_file(display_name, source)
        settings = processor_settings(source, local_only)
        with foreign_errors(f"{display_name} cannot be loaded: reading its layout and preprocessing"):
            random_weights = not pretrained and state is None
            module = module.eval() if backbone is None else require_submodel(module.eval(), backbone)
            loaded = _describe(module, settings, image_size, display_name, source=source, random_weights=random_weights)
        if random_weights or backbone is not None or loaded.meaning != "features":
            return loaded
        texts = checkpoint_texts(config, display_name, source, local_only=local_only, weights=weights, dtype=dtype)
        return replace(loaded, text=texts)


def _load_by_timm(
    source: str,
    name: str,
    pretrained: bool,
    image_size: Size | None,
    dtype: torch.dtype | None,
    weights: str | Path | None,
) -> VisionModel:
    """Load with timm what transformers would load with its wrapper of timm, because timm knows the preprocessing."""
    kind = "local-dir" if Path(source).exists() else "hf-hub"
    loaded = backend_of("timm").load(
        f"{kind}:{source}", pretrained=pretrained, image_size=image_size, dtype=dtype, weights=weights
    )
    return replace(loaded, name=name)


def has_model(name: str) -> bool:
    """Return whether this is a model type of transformers, such as ``"vit"``."""
    return name in transformers.CONFIG_MAPPING


def wrap(module: Any, *, image_size: Size | None) -> VisionModel:
    """Describe a live transformers model by the facts of its family.

    Its preprocessing is that of its checkpoint, if the checkpoint is available locally.

    Args:
        module: a model of transformers; it is not changed.
        image_size: height and width in pixels; None for the model's own size.
    """
    if getattr(module, "timm_model", None) is not None:
        return _wrap_timm(module, image_size)
    source = getattr(module.config, "_name_or_path", "")
    with quiet():
        settings = processor_settings(source, local_only=True)
    name = Path(source).name if Path(source).is_dir() else source  # a folder's full path would depend on the machine
    name = name or type(module).__name__
    described = _describe(module, settings, image_size, name, source=source)
    return replace(described, text=live_texts(module, name, source))


def _wrap_timm(module: Any, image_size: Size | None) -> VisionModel:
    """Describe the timm model inside transformers' wrapper, with the labels of the wrapper's configuration."""
    described = backend_of("timm").wrap(module.timm_model, image_size=image_size)
    has_head = getattr(module.timm_model, "num_classes", 0) > 0
    return replace(described, labels=_labels(module.config, [module.timm_model.get_classifier()]) if has_head else None)


def _describe(
    module: nn.Module,
    settings: Mapping[str, Any] | None,
    image_size: Size | None,
    name: str,
    *,
    source: str = "",
    random_weights: bool = False,
) -> VisionModel:
    classifies = any("ForImageClassification" in cls.__name__ for cls in type(module).__mro__)
    if not classifies:
        module = vision_tower(module, name)
    config: Any = getattr(module.config, "vision_config", module.config)
    family = FAMILIES.get(config.model_type)
    layout = None if family is None else _layout(module, config, family)
    family = family or Family(cls_alone)
    trained = _pair(getattr(config, "image_size", None))
    run = PixelValues(module, trained, family.resize_positions, names_pixel_values(module))
    head = [getattr(module, attribute) for attribute in HEADS if getattr(module, attribute, None) is not None]
    has_classes = classifies and not any(isinstance(layer, nn.Identity) for layer in head)
    plain = not classifies or all(type(layer) is nn.Linear for layer in head)
    forward: Any = Classes(run, name) if plain else Observed(module, name, run)
    embed: Any = None
    if not has_classes:
        forward = Classes(run, name) if not classifies else NoClasses(run)
        embed = PooledFeatures(run, layout, module) if layout is not None and not classifies else None
        embed = LogitsAsFeatures(run) if classifies else embed
    preprocessing, reason = None, f"{source} has no {PROCESSOR_FILE}"
    if settings is not None:
        preprocessing = saved_processor(family.processor, settings, image_size, f"{PROCESSOR_FILE} of {name}")
    elif random_weights or not source:
        # Random weights, or a live module built from its configuration: no checkpoint states anything else.
        size = image_size or _pair(getattr(config, "image_size", None) or 224)
        preprocessing = default_processor(family.processor, size)
        channels = getattr(config, "num_channels", None)
        if isinstance(channels, int) and channels != preprocessing.channels:
            preprocessing = None
            reason = f"the default of its family is for 3 channels, but the model takes {channels}"
    return VisionModel(
        name,
        "transformers",
        module,
        forward,
        layout,
        preprocessing,
        _labels(module.config, head) if has_classes else None,
        {"transformers": transformers.__version__},
        embed,
        output=_output(module.config) if has_classes and plain else None,
        verified=type(module).__module__.startswith("transformers."),
        no_preprocessing="" if preprocessing else reason,
    )


def _layout(module: Any, config: Any, family: Family) -> Layout:
    """Return the tokens of a family; the readout is that of the nearest class among the module's base classes."""
    readouts = (family.heads[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in family.heads)
    readout = next(readouts, None) or family.readout(config)
    hierarchy = swin.hierarchy(module) if family.windowed else None
    return Layout(_pair(config.patch_size), family.prefix(config), readout, hierarchy, partial_patches=family.windowed)


def _output(config: Any) -> Output:
    """Return the kind of output that the classifier was trained for."""
    kinds: Mapping[Any, Output] = {"multi_label_classification": "sigmoid", "regression": "value"}
    return kinds.get(getattr(config, "problem_type", None), "logits")


def _labels(config: Any, head: Sequence[Any]) -> tuple[str, ...] | None:
    """Return the labels in the configuration; None if they do not fit the current classifier."""
    id2label: Any = getattr(config, "id2label", None) or {}
    labels = tuple(str(id2label[i]) for i in sorted(id2label))
    sizes = {layer.out_features for layer in head if isinstance(layer, nn.Linear)}
    return labels if labels and sizes <= {len(labels)} else None


@dataclass(frozen=True, eq=False)
class PixelValues:
    """The call of a model with its image, which requests resampled position embeddings if the family needs it."""

    module: nn.Module
    trained: tuple[Any, Any]
    resize_positions: bool
    by_name: bool = True  # False for the forward method of a subclass with other parameter names

    def __call__(self, pixels: Tensor) -> Any:
        if not self.by_name:
            return self.module(pixels)
        resize = self.resize_positions and tuple(pixels.shape[-2:]) != self.trained
        return self.module(pixel_values=pixels, **({"interpolate_pos_encoding": True} if resize else {}))


@dataclass(frozen=True, eq=False)
class PooledFeatures:
    """The projected or pooled output, or the readout of the last tokens if the pooling layer is untrained."""

    run: PixelValues
    layout: Layout
    module: nn.Module

    def __call__(self, pixels: Tensor) -> Float[Tensor, "batch channel"]:
        output: Any = self.run(pixels)
        if getattr(output, "image_embeds", None) is not None:  # of a class with a projection
            return output.image_embeds
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and not hasattr(getattr(self.module, "pooler", None), "dense"):
            return pooled
        tokens, prefix = output.last_hidden_state, self.layout.prefix_names
        sources = {name: tokens[:, i] for i, name in enumerate(prefix)}
        sources |= {"patches": tokens[:, len(prefix) :].mean(1), "tokens": tokens.mean(1)}
        return sum(weight * sources[source] for source, weight in self.layout.readout.items())


@dataclass(frozen=True, eq=False)
class LogitsAsFeatures:
    """The features that a model without its classifier returns as its logits."""

    run: PixelValues

    def __call__(self, pixels: Tensor) -> Float[Tensor, "batch channel"]:
        return self.run(pixels).logits


def _pair(size: Any) -> tuple[Any, Any]:
    """Return a size from the configuration as height and width."""
    return tuple(size) if isinstance(size, list | tuple) else (size, size)

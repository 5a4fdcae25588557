"""timm: which tokens its vision transformers have, and which of them their heads read."""

import dataclasses
import difflib
import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn

from vitscope.attention.windows import Windows
from vitscope.errors import CallError, ModelUnavailableError, UnknownModelError
from vitscope.grid import Grid
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.backends.foreign_errors import foreign_errors
from vitscope.models.backends.timm.weights import filled
from vitscope.models.checkpoints.hub import hub_in_reach, offline, repository_folder
from vitscope.models.checkpoints.paths import model_path
from vitscope.models.checkpoints.timm_folder import WEIGHTS_FILES, WRAPPER_PREFIX, TimmFolder, read_folder
from vitscope.models.checkpoints.weights_file import read_weights
from vitscope.models.forward import Classes, MeanOfTokens, NoClasses, Observed
from vitscope.models.hierarchy import Hierarchy, Merging, Projection, WindowBlock
from vitscope.models.vision_model import Layout, VisionModel, input_channels

# Classes whose tokens are prefix, then patches row by row.
_PLAIN = ("VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit")

_SWIN = ("SwinTransformer", "SwinTransformerV2")

SOURCES = ("hf-hub", "local-dir")

# Beginnings of the names of options that lead to files, to the hub, or to other code.
_SOURCE_OPTIONS = ("pretrained", "checkpoint", "file", "url", "hf_hub", "cache_dir", "state_dict", "script", "export")

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


def load(
    name: str,
    *,
    pretrained: bool,
    image_size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    weights: str | Path | None = None,
    classes: int | None = None,
) -> VisionModel:
    """Load a model by timm's name; ``image_size`` makes timm resample the position embedding.

    Args:
        name: also ``hf-hub:org/name`` and ``local-dir:/path``.
        weights: a file with the weights of this architecture, in place of the pretrained ones.
        classes: the number of classes of a classifier that stays untrained, because the caller replaces it.
    """
    source, colon, place = name.partition(":")
    if colon and source.lower().replace("_", "-") in SOURCES:
        folder = _folder(source.lower().replace("_", "-"), place, name)
        return _load_folder(folder, name, pretrained, image_size, dtype, weights, classes)
    _check_name(name)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if weights is not None:
        create = partial(timm.create_model, name, **options)
        module = filled(create, read_weights(weights), str(weights), image_size, adapt_classes=True)
    else:
        module = _created(name, pretrained, options | ({} if image_size is None else {"img_size": image_size}))
    module = module if dtype is None else module.to(dtype)
    return wrap(module.eval(), image_size=image_size, name=f"timm:{name}")


def _check_name(name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f": did you mean {', '.join(close)}?" if close else ": timm.list_models() shows the names"
        raise UnknownModelError(f"timm has no model {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True))
        raise UnknownModelError(f"timm has no weights {name!r}: it has {tags or 'none of this model'}") from None


def _created(name: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    try:
        with nullcontext() if not pretrained or hub_in_reach() else offline():
            return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise CallError(f"timm's {name} takes no image_size: {error}") from None
    except Exception as error:
        if not pretrained:
            raise
        # The hub client has a dozen ways to say that it got nothing.
        raise ModelUnavailableError(
            f"timm:{name} is not on this machine and the model hub did not give it: use the bundled vit-nano, a local "
            f"folder, or pretrained=False ({type(error).__name__})"
        ) from None


def _folder(source: str, place: str, name: str) -> TimmFolder:
    """Return the folder of a local or hub model."""
    if source == "local-dir":
        path = model_path(place)
        if not place or not path.is_dir():
            raise UnknownModelError(f"timm:{name}: there is no folder {place!r}")
        return read_folder(path)
    snapshot = repository_folder(place, "config.json", WEIGHTS_FILES)
    if snapshot is None:
        raise ModelUnavailableError(
            f"timm:{name} is not on this machine and the model hub did not give it: check the name and the network, or "
            "use the bundled vit-nano or a local folder"
        )
    return read_folder(snapshot)


def _load_folder(
    folder: TimmFolder,
    name: str,
    pretrained: bool,
    image_size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    weights: str | Path | None,
    classes: int | None,
) -> VisionModel:
    _check_name(folder.architecture)
    options = known_options(folder.architecture, folder.options)
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
            module = filled(create, state, str(file), image_size, adapt_classes=adapt, untrained_head=bool(classes))
        else:
            module = create(**({} if image_size is None else {"img_size": image_size}))
        module = module if dtype is None else module.to(dtype)
        loaded = wrap(module.eval(), image_size=image_size, name=f"timm:{name}")
    has_labels = folder.labels is not None and len(folder.labels) == getattr(module, "num_classes", 0)
    return replace(loaded, labels=folder.labels) if has_labels else loaded


def known_options(architecture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that timm's classes take, with lists as tuples.

    Raises:
        ModelUnavailableError: another option is among them, such as a place to fetch weights from.
    """
    known = {"num_classes", "in_chans", "img_size", "global_pool"}
    home = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    for cls in vars(home).values():
        if isinstance(cls, type) and (issubclass(cls, nn.Module) or dataclasses.is_dataclass(cls)):
            known |= set(inspect.signature(cls).parameters)
    known = {name for part in ("", "transformer_", "conv_") for name in (f"{part}{option}" for option in known)}
    unknown = sorted(name for name in options if name not in known or name.startswith(_SOURCE_OPTIONS))
    if unknown:
        raise ModelUnavailableError(
            f"{architecture} cannot be built with the option {unknown[0]!r}: pass arguments of its class only"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def wrap(module: nn.Module, *, image_size: tuple[int, int] | None, name: str | None = None) -> VisionModel:
    """Describe a live timm model by the facts of its class."""
    name = name or f"timm:{type(module).__name__}"
    classifier = _classifier(module)
    has_classes = getattr(module, "num_classes", 0) > 0 and not isinstance(classifier, nn.Identity)
    own_forward = type(module).__module__.startswith("timm.")
    forward: Any = NoClasses(module)
    if has_classes:
        certain = own_forward and isinstance(classifier, nn.Linear | tuple)
        forward = Classes(module, name) if certain else Observed(module, name)
    preprocessing, unknown = _preprocessing(module, image_size)
    return VisionModel(
        name,
        "timm",
        module,
        forward,
        _layout(module),
        preprocessing,
        _labels(module, classifier) if has_classes else None,
        {"timm": timm.__version__},
        # Without a pooling layer the class gives all tokens; a mean over its places is what is left.
        None if has_classes else MeanOfTokens(module),
        verified=own_forward,
        no_preprocessing=unknown,
    )


def _classifier(module: Any) -> Any:
    """The layer that gives the classes; None if the module does not say."""
    try:
        return module.get_classifier()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _layout(module: Any) -> Layout | None:
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("timm.")}
    if names & {*_SWIN}:
        return Layout(tuple(module.patch_embed.patch_size), (), {"patches": 1.0}, _swin(module))
    if "MaxxVit" in names:
        hierarchy = _maxvit(module)
        return None if hierarchy is None else Layout(_MAXVIT_STEM, (), {"patches": 1.0}, hierarchy)
    return _plain_layout(module) if names & {*_PLAIN} else None


def _swin(module: Any) -> Hierarchy:
    """Swin and Swin v2: each stage but the first begins with merging."""
    head = getattr(module.head, "fc", None)
    averages = getattr(getattr(module.head, "global_pool", None), "pool_type", "") == "avg"
    return Hierarchy(
        blocks={
            f"{name}.attn": WindowBlock(block, partial(_windows, block), _projection(block))
            for name, block in module.named_modules()
            if type(block).__name__ in ("SwinTransformerBlock", "SwinTransformerV2Block")
        },
        mergings={
            name: Merging(child, child.norm, child.reduction)
            for name, child in module.named_modules()
            if type(child).__name__ == "PatchMerging"
        },
        before_pooling=module.norm,
        classifier=head if averages and isinstance(head, nn.Linear) else None,
    )


def _windows(block: Any, _: Grid) -> Windows:
    return Windows(block.window_size, block.shift_size, roll_first=True)


def _projection(block: Any) -> Projection | None:
    if type(block).__name__ != "SwinTransformerBlock":
        return None
    return Projection(block.norm1, (block.attn.qkv,), block.attn.proj, block.attn.num_heads)


# The stem has a stride of 2; each stage halves the grid once more before it attends.
_MAXVIT_STEM = (2, 2)


def _maxvit(module: Any) -> Hierarchy | None:
    """MaxViT: windows, then the same number of tokens spread over the grid; strided convolutions between stages.

    None for what else the class holds (CoAtNet), which has no windows.
    """
    blocks = {
        f"{name}.attn": WindowBlock(block, partial(_partition, block))
        for name, block in module.named_modules()
        if type(block).__name__ == "PartitionAttentionCl"
    }
    return Hierarchy(blocks, downsampling=[stage.blocks[0].conv for stage in module.stages]) if blocks else None


def _partition(block: Any, _: Grid) -> Windows:
    return Windows(tuple(block.partition_size), dilated=not block.partition_block)


def _plain_layout(module: Any) -> Layout:
    names = []
    if getattr(module, "cls_token", None) is not None:
        names.append("cls")
    if getattr(module, "dist_token", None) is not None:
        names.append("distillation")
    names += [f"register_{i + 1}" for i in range(module.num_prefix_tokens - len(names))]
    return Layout(_patch_size(module.patch_embed), tuple(names), _readout(module), partial_patches=_pads(module))


def _patch_size(embed: Any) -> tuple[int, int]:
    """Pixels of the input for each token: of a hybrid, the stride of its stem as well."""
    ratio: Any = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
    return tuple(ratio) if isinstance(ratio, list | tuple) else (ratio, ratio)


def _pads(module: Any) -> bool:
    """Whether a last patch that the image fills in part is padded."""
    return bool(getattr(module.patch_embed, "dynamic_img_pad", False))


def _readout(module: Any) -> Mapping[str, float]:
    if hasattr(module, "head_dist"):
        return {"cls": 0.5, "distillation": 0.5}
    pool = module.global_pool
    if pool in ("map", "prr"):
        return {"pooling": 1.0}
    if pool == "token":
        return {"cls": 1.0}
    if pool in ("avg", "avgmax", "max"):
        # A maximum reads one patch a channel: as a row over tokens the patches' mean is the nearest there is.
        return {"tokens": 1.0} if getattr(module, "pool_include_prefix", False) else {"patches": 1.0}
    return {"cls": 1.0} if getattr(module, "cls_token", None) is not None else {"patches": 1.0}


def _input_size(module: Any) -> tuple[int, int]:
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return tuple(size) if size else tuple(resolve_model_data_config(module)["input_size"][1:])


def _preprocessing(module: Any, image_size: tuple[int, int] | None) -> tuple[Preprocessing | None, str]:
    """What the module's ``pretrained_cfg`` says; or None, and why that says nothing."""
    facts = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    if not facts.get("mean"):
        return None, "the module has no pretrained_cfg"
    size = image_size or _input_size(module)
    config = resolve_model_data_config(module)
    channels = input_channels(module)
    if len(config["mean"]) != len(config["std"]) or channels not in (None, len(config["mean"])):
        return None, f"its pretrained_cfg is for {len(config['mean'])} channels, and it takes {channels}"
    if config.get("crop_mode") == "border":
        return None, "timm's crop mode 'border' pads the image, which vitscope does not"
    prepared = read_data_config({**config, "input_size": (channels, *size)}, None)
    return replace(prepared, source="timm's pretrained_cfg"), ""


def read_data_config(config: Mapping[str, Any], image_size: tuple[int, int] | None) -> Preprocessing:
    """Return timm's data configuration as a Preprocessing.

    Raises:
        CallError: it pads the image, or lacks mean, std or size.
    """
    missing = [name for name in ("input_size", "mean", "std") if not config.get(name)]
    if missing and (missing != ["input_size"] or image_size is None):
        raise CallError(f"timm's data configuration lacks {', '.join(missing)}: pass one of resolve_model_data_config")
    size = image_size or tuple(config["input_size"][1:])
    squash, crop_pct = config.get("crop_mode") == "squash", config.get("crop_pct") or 0.875
    if config.get("crop_mode") == "border":
        raise CallError("timm's crop mode 'border' pads the image, which vitscope does not: pass mean and std")
    return Preprocessing(
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit="squash" if squash else "crop",
        resize_to=(math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)),
        resample=_RESAMPLE.get(config.get("interpolation", "bicubic"), Image.Resampling.BICUBIC),
        round_half_even=True,
    )


# The subsets of ImageNet that timm has names for, by their number of classes.
_IMAGENETS = {1000: "imagenet-1k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog", 11821: "imagenet-12k"}


def _labels(module: Any, classifier: Any) -> tuple[str, ...] | None:
    """The names of the classes, if they fit the classifier that is there.

    A head that was put in the place of the original one has classes of its own, whatever ``num_classes`` says.
    """
    layers = classifier if isinstance(classifier, tuple) else (classifier,)
    sizes = {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
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


def reset_classifier(module: Any, labels: Sequence[str]) -> nn.Module:
    """The same module with an untrained classifier."""
    module.reset_classifier(len(labels))
    like = next(module.parameters())
    return module.to(like.device, like.dtype)


def get_classifiers(module: Any) -> list[nn.Linear]:
    """The linear layers that give the logits."""
    found = module.get_classifier()
    return [layer for layer in (found if isinstance(found, tuple) else (found,)) if isinstance(layer, nn.Linear)]


def architecture(module: Any) -> Mapping[str, Any]:
    """What :func:`build` needs, as JSON has it: timm's name, and how the module differs from it."""
    if hasattr(timm.models, "get_model_args"):
        options = timm.models.get_model_args(module)
    else:  # timm before 1.0.31 keeps no record
        options = {"num_classes": module.num_classes, "img_size": _input_size(module)}
    return {"name": module.pretrained_cfg.get("architecture", ""), "options": json.loads(json.dumps(options))}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The model without its weights.

    Raises:
        UnknownModelError: timm has no model of this name.
        ModelUnavailableError: an option is none of the model's.
    """
    name = architecture["name"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise UnknownModelError(f"timm has no model {str(name)[:80]!r}")
    return timm.create_model(name, pretrained=False, **known_options(name, architecture["options"]))

"""What people have on their disks: adapters, timm's folders, a Trainer's output, files of weights."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from vitscope.errors import CallError, UnknownModelError, VitscopeError
from vitscope.models.backends.libraries import LIBRARIES, library_module
from vitscope.models.checkpoints.adapter_folder import (
    ADAPTER_CONFIG,
    adapter_classes,
    base_name,
    is_adapter_folder,
    load_adapter,
)
from vitscope.models.checkpoints.paths import model_path
from vitscope.models.checkpoints.serialization import load_folder, manifest_folder
from vitscope.models.checkpoints.timm_folder import is_timm_folder
from vitscope.models.checkpoints.weights_file import SUFFIXES, TORCH_SUFFIXES, is_torchscript
from vitscope.models.vision_model import VisionModel

Size = tuple[int, int]


def load_local(
    path: Path,
    *,
    pretrained: bool,
    image_size: Size | None,
    dtype: torch.dtype | None,
    weights: str | Path | None = None,
) -> VisionModel | None:
    """Load an adapter folder or one of timm's layout; None for what transformers or the hub may know.

    Raises:
        UnknownModelError: a file, or a folder that holds no model itself.
        ModelUnavailableError: files are missing or damaged.
    """
    if path.exists() and not path.is_dir():
        raise UnknownModelError(_about_file(path))
    if not path.is_dir():
        return None
    if is_adapter_folder(path):
        if not pretrained:
            raise CallError(f"{path} is a PEFT adapter: it has weights, pretrained=False is for models without")
        return load_adapter_folder(path, image_size=image_size, dtype=dtype)
    if is_timm_folder(path):
        loaded: VisionModel = library_module("timm").load(
            f"local-dir:{path}", pretrained=pretrained, image_size=image_size, dtype=dtype, weights=weights
        )
        return replace(loaded, name=str(path))
    if not (path / "config.json").exists():
        checkpoints = [child.name for child in path.glob("checkpoint-*") if child.is_dir()]
        if checkpoints:
            ordered = ", ".join(sorted(checkpoints, key=_step))
            raise UnknownModelError(
                f"{path} is a Trainer's output and holds no model itself: pass one of {ordered} in it"
            )
    return None


def load_adapter_folder(folder: Path, *, image_size: Size | None, dtype: torch.dtype | None) -> VisionModel:
    """Load the base model that an adapter folder names, with the adapter.

    Raises:
        UnknownModelError: the folder does not name its base model, or that cannot be loaded.
        ModelUnavailableError: the adapter does not fit its base model.
    """
    hint = f"pass the base model: vs.load(base, adapter={str(folder)!r})"
    name = base_name(folder)
    if not name:
        raise UnknownModelError(f"{folder} is a PEFT adapter that does not say what it was trained on: {hint}")
    classes = adapter_classes(folder)
    try:
        base = _load_base(name, image_size, dtype, None)
        if classes is not None and classes != _class_count(base):
            base = _load_base(name, image_size, dtype, classes)
    except VitscopeError as error:
        raise UnknownModelError(
            f"{folder} is a PEFT adapter, its base model is out of reach ({error}): {hint}"
        ) from None
    return with_adapter(base, folder, image_size=image_size, name=str(folder))


def with_adapter(base: VisionModel, folder: str | Path, *, image_size: Size | None, name: str) -> VisionModel:
    """Return a copy of ``base`` with the adapter; ``base`` stays as it is.

    Raises:
        CallError: the model is of none of the three libraries.
        ModelUnavailableError: the adapter does not fit the model.
    """
    if base.library not in LIBRARIES:
        raise CallError(f"{base.name} is of none of the libraries {', '.join(LIBRARIES)}: load the adapter with peft")
    module = load_adapter(base.module, folder)
    wrapped: VisionModel = library_module(base.library).wrap(module.eval(), image_size=image_size)
    return replace(wrapped, name=name, preprocessing=base.preprocessing, labels=base.labels)


def _load_base(name: str, image_size: Size | None, dtype: torch.dtype | None, classes: int | None) -> VisionModel:
    options = {"pretrained": True, "image_size": image_size, "dtype": dtype, "classes": classes}
    library, colon, rest = name.partition(":")
    if colon and library in LIBRARIES:
        return library_module(library).load(rest, **options)
    path = model_path(name)
    tuned = manifest_folder(path)
    if tuned is not None:
        return load_folder(tuned, image_size=image_size, dtype=dtype)
    if is_adapter_folder(path):
        raise UnknownModelError(f"{name} is an adapter itself")
    if is_timm_folder(path):
        return library_module("timm").load(f"local-dir:{name}", **options)
    return library_module("transformers").load(name, **options)


def _class_count(model: VisionModel) -> int | None:
    heads = library_module(model.library).get_classifiers(model.module)
    return heads[0].out_features if heads else None


def _about_file(path: Path) -> str:
    if not path.is_file():
        return f"{path} is not a regular file: pass a folder or a name"
    if path.suffix == ".onnx":
        return (
            f"{path} is an ONNX file, whose layers vitscope cannot look into: load the model that it was exported from"
        )
    if path.suffix in TORCH_SUFFIXES and is_torchscript(path):
        return f"{path} is a TorchScript program, which vitscope cannot look into: load the model that it was made from"
    if path.suffix in SUFFIXES:
        example = f'vs.load("timm:vit_small_patch16_224", weights="{path.name}")'
        return f"{path} holds weights only: name the architecture, as in {example}"
    if path.name in ("config.json", ADAPTER_CONFIG):
        return f"{path} is one file of a model: pass its folder {path.parent}"
    return f"{path} is a file, not a model: pass a folder, a name, or a file of weights as weights="


def _step(name: str) -> tuple[int, str]:
    number = re.fullmatch(r"checkpoint-(\d{1,18})", name)
    return (int(number.group(1)) if number else 0, name)

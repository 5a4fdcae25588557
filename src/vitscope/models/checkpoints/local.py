"""Local models that are not plain transformers folders: adapters, timm's folders, and helpful errors for the rest."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitscope.errors import CallError, UnknownModelError, VitscopeError
from vitscope.models.backends.libraries import LIBRARIES, backend
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
    """Load an adapter folder or a folder in timm's layout; return None for what transformers or the hub may load.

    Args:
        path: the path that the caller passed as a model.
        pretrained: whether to load pretrained weights; False gives random weights.
        image_size: height and width in pixels; None for the model's own size.
        dtype: precision of the weights; None for that of the files.
        weights: a weights file that is used instead of the folder's.

    Raises:
        UnknownModelError: the path is a file, or a folder that does not contain a model itself.
        ModelUnavailableError: files are missing or damaged.
    """
    if path.exists() and not path.is_dir():
        raise UnknownModelError(_file_refusal(path))
    if not path.is_dir():
        return None
    if is_adapter_folder(path):
        if not pretrained:
            raise CallError(f"{path} is a PEFT adapter: it has weights, so omit pretrained=False")
        return load_adapter_folder(path, image_size=image_size, dtype=dtype)
    if is_timm_folder(path):
        loaded = backend("timm").load(
            f"local-dir:{path}", pretrained=pretrained, image_size=image_size, dtype=dtype, weights=weights
        )
        return replace(loaded, name=str(path))
    if not (path / "config.json").exists():
        checkpoints = [child.name for child in path.glob("checkpoint-*") if child.is_dir()]
        if checkpoints:
            ordered = ", ".join(sorted(checkpoints, key=_step))
            raise UnknownModelError(
                f"{path} is the output folder of a Trainer, not a model: pass one of its subfolders {ordered}"
            )
    return None


def load_adapter_folder(folder: Path, *, image_size: Size | None, dtype: torch.dtype | None) -> VisionModel:
    """Load the base model that an adapter folder names, with the adapter.

    Raises:
        UnknownModelError: the folder does not name its base model, or the base model cannot be loaded.
        ModelUnavailableError: the adapter does not fit its base model.
    """
    hint = f"pass the base model: vs.load(base, adapter={str(folder)!r})"
    name = base_name(folder)
    if not name:
        raise UnknownModelError(f"{folder} is a PEFT adapter that does not name its base model: {hint}")
    classes = adapter_classes(folder)
    try:
        base = _load_base(name, image_size, dtype, None)
        if classes is not None and classes != _class_count(base):
            base = _load_base(name, image_size, dtype, classes)
    except VitscopeError as error:
        raise UnknownModelError(
            f"{folder} is a PEFT adapter whose base model is not available ({error}): {hint}"
        ) from None
    return with_adapter(base, folder, image_size=image_size, name=str(folder))


def with_adapter(base: VisionModel, folder: str | Path, *, image_size: Size | None, name: str) -> VisionModel:
    """Return a copy of ``base`` with the adapter; ``base`` is not changed.

    Args:
        base: the model that the adapter was trained on.
        folder: the adapter folder.
        image_size: height and width in pixels; None for the model's own size.
        name: name of the resulting model.

    Raises:
        CallError: the model does not belong to transformers, timm or torchvision.
        ModelUnavailableError: the adapter does not fit the model.
    """
    if base.library not in LIBRARIES:
        raise CallError(f"{base.name} belongs to none of {', '.join(LIBRARIES)}: load the adapter with peft")
    module = load_adapter(base.module, folder)
    wrapped = backend(base.library).wrap(module.eval(), image_size=image_size)
    return replace(wrapped, name=name, preprocessing=base.preprocessing, labels=base.labels, text=base.text)


def _load_base(name: str, image_size: Size | None, dtype: torch.dtype | None, classes: int | None) -> VisionModel:
    options: dict[str, Any] = {"pretrained": True, "image_size": image_size, "dtype": dtype, "classes": classes}
    library, colon, rest = name.partition(":")
    if colon and library in LIBRARIES:
        return backend(library).load(rest, **options)
    path = model_path(name)
    tuned = manifest_folder(path)
    if tuned is not None:
        return load_folder(tuned, image_size=image_size, dtype=dtype)
    if is_adapter_folder(path):
        raise UnknownModelError(f"{name} is itself an adapter")
    if is_timm_folder(path):
        return backend("timm").load(f"local-dir:{name}", **options)
    return backend("transformers").load(name, **options)


def _class_count(model: VisionModel) -> int | None:
    heads = backend(model.library).get_classifiers(model.module)
    return heads[0].out_features if heads else None


def _file_refusal(path: Path) -> str:
    """Return why a file is not a model, and what to pass instead."""
    if not path.is_file():
        return f"{path} is not a regular file: pass a folder or a name"
    if path.suffix == ".onnx":
        return f"{path} is an ONNX file, whose layers are not accessible: load the model that it was exported from"
    if path.suffix in TORCH_SUFFIXES and is_torchscript(path):
        return f"{path} is a TorchScript program, which is not supported: load the model that it was exported from"
    if path.suffix in SUFFIXES:
        example = f'vs.load("timm:vit_small_patch16_224", weights="{path.name}")'
        return (
            f"{path} holds weights only: name the architecture, as in {example} or "
            f"--model timm:vit_small_patch16_224 --weights {path.name}"
        )
    if path.name in ("config.json", ADAPTER_CONFIG):
        return f"{path} is a single file of a model: pass its folder {path.parent}"
    return f"{path} is a file, not a model: pass a folder, a name, or a weights file as weights="


def _step(name: str) -> tuple[int, str]:
    number = re.fullmatch(r"checkpoint-(\d{1,18})", name)
    return (int(number.group(1)) if number else 0, name)

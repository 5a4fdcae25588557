"""A tuned model as a folder: one file says how to build it, one holds its weights, and nothing is unpickled."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitscope.errors import CallError, ModelUnavailableError, WorkError, first_line
from vitscope.files import atomic_folder
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.adapters import add_adapters
from vitscope.models.backends.libraries import library_module
from vitscope.models.checkpoints.manifest import FORMAT, checked_manifest
from vitscope.models.heads import architecture, build, describe, get_classifiers
from vitscope.models.vision_model import VisionModel

MANIFEST = "vitscope.json"
PLAIN, ADAPTED = "model.safetensors", "adapted.safetensors"
WITHIN = "model"  # where a training run leaves its model


def manifest_folder(path: Path) -> Path | None:
    """The folder with the manifest: this one, or the model of this training run."""
    return next((folder for folder in (path, path / WITHIN) if (folder / MANIFEST).is_file()), None)


def save_folder(
    model: VisionModel, folder: str | Path, *, adapters: Mapping[str, Any] | None = None, about: Mapping[str, Any]
) -> Path:
    """Write a model with classes so that :func:`vitscope.load` takes the folder, whole or not at all.

    One of transformers without adapters is an ordinary transformers folder too. With adapters the weights have another
    name, so that nobody loads the model without them by mistake.

    Args:
        adapters: what :func:`~vitscope.models.adapters.add_adapters` was given.
        about: where the model comes from, for people to read.

    Raises:
        SaveError: it cannot be written; what stood there is still there.
    """
    folder, plain = Path(folder), adapters is None
    built = architecture(model)
    native = plain and model.library == "transformers" and "class" in built
    manifest = {
        "format": FORMAT,
        "name": model.name,
        "library": model.library,
        "architecture": built,
        "adapters": adapters,
        "labels": model.labels,
        "preprocessing": None if model.preprocessing is None else asdict(model.preprocessing),
        "native": native,
        "about": dict(about),
    }
    with atomic_folder(folder) as beside:
        try:
            if native:
                library_module(model.library).write(model.module, beside, model.preprocessing)
            else:
                save_file(_state(model), beside / (PLAIN if plain else ADAPTED))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder


def load_folder(folder: Path, *, image_size: tuple[int, int] | None, dtype: torch.dtype | None) -> VisionModel:
    """What :func:`save_folder` wrote.

    Raises:
        ModelUnavailableError: files are missing or damaged, or do not belong together.
    """
    try:
        manifest = checked_manifest(folder / MANIFEST)
        built = manifest["architecture"]
        if manifest["native"]:
            module = library_module(manifest["library"]).read(folder, built)
        else:
            module = build(manifest["library"], built)
            if manifest["adapters"]:
                add_adapters(module, **manifest["adapters"])
            weights = load_file(folder / (ADAPTED if manifest["adapters"] else PLAIN))
            if _integers(weights) != _integers(module.state_dict()):
                raise ValueError("its weights are not floating-point numbers")
            module.load_state_dict(weights)
        settings = manifest["preprocessing"]
        preprocessing = None if settings is None else _preprocessing(settings)
        if preprocessing is not None and image_size is not None:
            preprocessing = preprocessing.resized(image_size)
        module = module.eval() if dtype is None else module.eval().to(dtype)
        model = describe(manifest["library"], module, manifest["labels"], preprocessing, manifest["name"])
        counts = {head.out_features for head in get_classifiers(model)}
        if counts != {len(manifest["labels"])}:
            raise ValueError(f"its classifier has {counts or 'no'} classes, {len(manifest['labels'])} are named")
    except Exception as error:  # each library fails in its own ways on a damaged description of a model
        if isinstance(error, WorkError | CallError):
            raise
        raise ModelUnavailableError(f"{folder} holds no whole tuned model: {first_line(error)}") from None
    return model


def _integers(state: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in state.items() if not tensor.is_floating_point()}


def _state(model: VisionModel) -> dict[str, torch.Tensor]:
    """Every tensor by itself, also those that are one in the model."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.module.state_dict().items()
    }


def _preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return Preprocessing(**values | {"resample": Image.Resampling(settings["resample"])})


def check_folder(model: VisionModel) -> None:
    """Refuse a model that could not be built again from its folder, before anybody trains it.

    Raises:
        CallError: its library cannot say how it was made.
    """
    refused = (
        f"{model.name} could not be built again from a folder: load it by name, as timm:<name> or torchvision:<name>"
    )
    try:
        built = build(model.library, json.loads(json.dumps(architecture(model)))).to(model.device, model.dtype)
        built.load_state_dict(model.module.state_dict())
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError):
        raise CallError(refused) from None
    assert model.labels is not None
    again = describe(model.library, built.eval(), model.labels, model.preprocessing, model.name)
    if model.preprocessing is None:
        raise CallError(f"{model.name} came without preprocessing: pass image_size to vitscope.load")
    blank = torch.zeros(1, 3, *model.preprocessing.size, device=model.device, dtype=model.dtype)
    with torch.no_grad(), model.running(), again.running():
        first, second = model.answer(blank), again.answer(blank)
    if first is None or second is None or not torch.allclose(first, second, atol=1e-5):
        raise CallError(refused)

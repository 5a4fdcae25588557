"""A fine-tuned model as a folder: a manifest that describes how to build it, and its weights. Nothing is unpickled."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vitscope.errors import CallError, ModelUnavailableError, VitscopeError, first_line
from vitscope.files import atomic_folder
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.adapters import add_adapters
from vitscope.models.backends.libraries import backend
from vitscope.models.checkpoints.manifest import FORMAT, read_manifest
from vitscope.models.heads import architecture, build, describe, get_classifiers
from vitscope.models.vision_model import VisionModel

MANIFEST = "vitscope.json"
PLAIN, ADAPTED = "model.safetensors", "adapted.safetensors"
MODEL_FOLDER = "model"  # the subfolder of a training run that contains its model


def manifest_folder(path: Path) -> Path | None:
    """Return the folder with the manifest: this one or, for a training run, its model; None if there is none."""
    return next((folder for folder in (path, path / MODEL_FOLDER) if (folder / MANIFEST).is_file()), None)


def save_folder(
    model: VisionModel, folder: str | Path, *, adapters: Mapping[str, Any] | None = None, about: Mapping[str, Any]
) -> Path:
    """Write a classifier as a folder that :func:`vitscope.load` accepts, atomically.

    A model of transformers without adapters also becomes an ordinary transformers folder. With adapters, the weights
    file has another name, so that no library loads the model without them by mistake.

    Args:
        model: a model with labels.
        folder: folder to write; an existing one is replaced.
        adapters: arguments of :func:`~vitscope.models.adapters.add_adapters`; None without adapters.
        about: origin of the model, for people to read.

    Returns:
        The folder.

    Raises:
        SaveError: the folder cannot be written; an existing one is unchanged.
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
    with atomic_folder(folder) as temporary:
        try:
            if native:
                backend("transformers").write(model.module, temporary, model.preprocessing)
            else:
                save_file(_separate_tensors(model), temporary / (PLAIN if plain else ADAPTED))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder


def load_folder(folder: Path, *, image_size: tuple[int, int] | None, dtype: torch.dtype | None) -> VisionModel:
    """Load a folder that :func:`save_folder` wrote; the model of a run is named after the folder of the run.

    Args:
        folder: the folder with the manifest.
        image_size: height and width in pixels; None for the saved size.
        dtype: precision of the weights; None for the saved precision.

    Raises:
        ModelUnavailableError: files are missing or damaged, or do not belong together.
    """
    try:
        manifest = read_manifest(folder / MANIFEST)
        built = manifest["architecture"]
        if manifest["native"]:
            if manifest["library"] != "transformers":
                raise ValueError(f"{MANIFEST} marks the folder as native, which is possible only for transformers")
            module = backend("transformers").read(folder, built)
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
        # Runs of the same model and tuning method have the same name in their manifest, but not the same folder.
        run = folder.resolve().parent.name if folder.name == MODEL_FOLDER else ""
        name = run or manifest["name"]
        model = describe(manifest["library"], module, manifest["labels"], preprocessing, name)
        counts = {head.out_features for head in get_classifiers(model)}
        if counts != {len(manifest["labels"])}:
            raise ValueError(f"its classifier has {counts or 'no'} classes, but {len(manifest['labels'])} labels")
    except VitscopeError:
        raise
    except Exception as error:  # each library raises its own errors for a damaged description
        raise ModelUnavailableError(f"{folder} is not a complete fine-tuned model: {first_line(error)}") from None
    return model


def _integers(state: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of the tensors that are not floating-point numbers."""
    return {name for name, tensor in state.items() if not tensor.is_floating_point()}


def _separate_tensors(model: VisionModel) -> dict[str, torch.Tensor]:
    """Return the weights as separate tensors, even those that share memory in the model."""
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
    """Refuse a model that could not be rebuilt from its folder, before it is trained.

    Raises:
        CallError: the model's library cannot describe how to build it, or the model has no preprocessing.
    """
    refusal = f"{model.name} cannot be rebuilt from a folder: load it by name, as timm:<name> or torchvision:<name>"
    try:
        built = build(model.library, json.loads(json.dumps(architecture(model)))).to(model.device, model.dtype)
        built.load_state_dict(model.module.state_dict())
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError):
        raise CallError(refusal) from None
    assert model.labels is not None
    rebuilt = describe(model.library, built.eval(), model.labels, model.preprocessing, model.name)
    if model.preprocessing is None:
        raise CallError(f"{model.name} came without preprocessing: pass image_size to vitscope.load")
    blank = torch.zeros(1, 3, *model.preprocessing.size, device=model.device, dtype=model.dtype)
    with torch.no_grad(), model.running(), rebuilt.running():
        expected, actual = model.logits(blank), rebuilt.logits(blank)
    if expected is None or actual is None or not torch.allclose(expected, actual, atol=1e-5):
        raise CallError(refusal)

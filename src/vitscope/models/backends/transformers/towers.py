"""transformers: the part of a larger model that looks at the image."""

import inspect
from typing import Any

from torch import nn

from vitscope.errors import CallError, UnknownModelError, UnsupportedModelError

# Inputs of models that need more than an image.
_TEXT = ("input_ids", "decoder_input_ids", "bbox", "labels_text")


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the parameters of a module's forward method."""
    return dict(inspect.signature(type(module).forward).parameters)


def names_pixel_values(module: nn.Module) -> bool:
    """Whether the forward method takes ``pixel_values`` by this name."""
    parameters = parameters_of(module)
    return "pixel_values" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def takes_image_alone(module: Any) -> bool:
    """Whether a model of transformers runs on pixel values and nothing else."""
    parameters = parameters_of(module)
    # A tower inherits the main input of the whole model from a base class they share, whatever it takes itself.
    main = "pixel_values" if "pixel_values" in parameters else getattr(module, "main_input_name", "pixel_values")
    if main != "pixel_values" or set(_TEXT) & parameters.keys():
        return False
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return required <= {"self", "pixel_values"} if "pixel_values" in parameters else len(required) == 2


def named_part(module: nn.Module, path: str) -> nn.Module:
    """Return the part of a model at a path.

    Raises:
        CallError: there is none, or it is no model of its own.
    """
    parts = dict(module.named_modules())
    if path not in parts or not hasattr(parts[path], "config"):
        models = [name for name, part in parts.items() if name and hasattr(part, "config") and "." not in name]
        raise CallError(
            f"backbone={path!r} is no model inside {type(module).__name__}: it holds {', '.join(models) or 'none'}"
        )
    return parts[path]


def vision_tower(module: Any, name: str) -> nn.Module:
    """Return the model itself if it runs on an image alone, else the one part of it that does.

    Raises:
        UnknownModelError: nothing in it takes an image.
        UnsupportedModelError: no part of it runs on an image alone, or several do.
    """
    if takes_image_alone(module) and not _is_text_and_image(module):
        return module
    towers = _towers(module)
    if len(towers) == 1:
        return next(iter(towers.values()))
    kind = type(module).__name__
    if towers:
        raise UnsupportedModelError(
            f"{name} is a {kind} with several parts that take an image ({', '.join(towers)}): pass backbone= to choose"
        )
    inputs = {part for child in module.modules() for part in parameters_of(child)}
    if not inputs & {"pixel_values", "pixel_values_videos"}:
        takes = getattr(module, "main_input_name", "other input")
        raise UnknownModelError(f"{name} is a {kind}, which does not look at images: it takes {takes}")
    others = [part for part in parameters_of(module) if part not in ("self", "pixel_values", "kwargs")]
    raise UnsupportedModelError(
        f"{name} is a {kind}, which takes more than an image ({', '.join(others[:4])}), and no part of it runs on "
        "pixel_values alone: pass the module that does"
    )


def _is_text_and_image(module: Any) -> bool:
    return hasattr(module.config, "text_config") and hasattr(module.config, "vision_config")


def _towers(module: Any) -> dict[str, nn.Module]:
    """The outermost parts that take an image alone and hold a stack of blocks, by path."""
    towers: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        if not path or any(path == tower or path.startswith(f"{tower}.") for tower in towers):
            continue
        parameters = parameters_of(child)
        has_blocks = any(isinstance(part, nn.ModuleList) for part in child.modules())
        if "pixel_values" in parameters and has_blocks and hasattr(child, "config") and takes_image_alone(child):
            towers[path] = child
    return towers

"""transformers: the vision tower of a larger model."""

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
    """Return whether the forward method takes ``pixel_values`` by this name."""
    parameters = parameters_of(module)
    return "pixel_values" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def takes_image_alone(module: Any) -> bool:
    """Return whether a model of transformers runs on pixel values alone."""
    parameters = parameters_of(module)
    # A tower inherits the main input of the whole model from their common base class, whatever the tower itself takes.
    main = "pixel_values" if "pixel_values" in parameters else getattr(module, "main_input_name", "pixel_values")
    if main != "pixel_values" or set(_TEXT) & parameters.keys():
        return False
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return required <= {"self", "pixel_values"} if "pixel_values" in parameters else len(required) == 2


def require_submodel(module: nn.Module, path: str) -> nn.Module:
    """Return the model at a path inside a model.

    Raises:
        CallError: there is no module at the path, or it is not a complete model.
    """
    children = dict(module.named_modules())
    if path not in children or not hasattr(children[path], "config"):
        models = [name for name, child in children.items() if name and hasattr(child, "config") and "." not in name]
        raise CallError(
            f"backbone={path!r} is not a model inside {type(module).__name__}: it holds {', '.join(models) or 'none'}"
        )
    return children[path]


def vision_tower(module: Any, name: str) -> nn.Module:
    """Return the model itself if it runs on an image alone, else the only submodule that does.

    Args:
        module: a model of transformers.
        name: name of the model in messages.

    Raises:
        UnknownModelError: no submodule takes an image.
        UnsupportedModelError: no submodule runs on an image alone, or several do.
    """
    if takes_image_alone(module) and not _is_text_and_image(module):
        return module
    towers = _towers(module)
    if len(towers) == 1:
        return next(iter(towers.values()))
    kind = type(module).__name__
    if towers:
        raise UnsupportedModelError(
            f"{name} is a {kind} with several submodules that take an image ({', '.join(towers)}): pass one of them as "
            "backbone="
        )
    inputs = {parameter for child in module.modules() for parameter in parameters_of(child)}
    if not inputs & {"pixel_values", "pixel_values_videos"}:
        main_input = getattr(module, "main_input_name", "other input")
        raise UnknownModelError(f"{name} is a {kind}, which does not take images: its input is {main_input}")
    others = [name for name in parameters_of(module) if name not in ("self", "pixel_values", "kwargs")]
    raise UnsupportedModelError(
        f"{name} is a {kind}, which takes more than an image ({', '.join(others[:4])}), and no submodule runs on "
        "pixel_values alone: pass a module that does"
    )


def _is_text_and_image(module: Any) -> bool:
    return hasattr(module.config, "text_config") and hasattr(module.config, "vision_config")


def _towers(module: Any) -> dict[str, nn.Module]:
    """Return the outermost submodules that take an image alone and contain a stack of blocks, by path."""
    towers: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        if not path or any(path == tower or path.startswith(f"{tower}.") for tower in towers):
            continue
        parameters = parameters_of(child)
        has_blocks = any(isinstance(inner, nn.ModuleList) for inner in child.modules())
        if "pixel_values" in parameters and has_blocks and hasattr(child, "config") and takes_image_alone(child):
            towers[path] = child
    return towers

"""Modules around a vision transformer: wrappers that change nothing, and modules that contain a known model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from vitscope.errors import CallError
from vitscope.models.backends.libraries import LIBRARIES
from vitscope.models.hierarchy import Hierarchy

# Wrappers of torch that pass input and output through, and their attribute that holds the module.
_TRANSPARENT = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers that change neither input nor output.

    These wrappers are those of torch.compile, DataParallel, DistributedDataParallel and PEFT (its adapters live in the
    layers of the base model), and modules such as Lightning's that define no forward pass and hold one model.
    """
    while True:
        inner = _wrapped_module_or_none(module)
        if inner is None:
            return module
        module = inner


def _wrapped_module_or_none(module: Any) -> nn.Module | None:
    """Return the module directly inside a wrapper; None if the module is not a wrapper."""
    names = {cls.__name__ for cls in type(module).__mro__}
    for wrapper, attribute in _TRANSPARENT.items():
        if wrapper in names and isinstance(getattr(module, attribute, None), nn.Module):
            return getattr(module, attribute)
    if "PeftModel" in names and not getattr(module.active_peft_config, "is_prompt_learning", False):
        return module.get_base_model()
    if _has_no_forward(type(module)):
        models = [child for child in module.children() if library_of(child) is not None or len(list(child.children()))]
        return models[0] if len(models) == 1 else None
    return None


def _has_no_forward(cls: type[nn.Module]) -> bool:
    """Return whether a class inherits its forward method from nn.Module or Lightning, which define none."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            return base is nn.Module or base.__module__.startswith(("lightning.", "pytorch_lightning."))
    return True


def library_of(module: Any) -> str | None:
    """Return the library to which a complete model belongs; None for layers and all other modules."""
    for cls in type(module).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in LIBRARIES and _is_model(module, library):
            return library
    return None


def _is_model(module: Any, library: str) -> bool:
    """Return whether a module of the library is a complete model, not a layer."""
    if library == "transformers":
        return hasattr(module, "config") and hasattr(module, "base_model_prefix")
    if library == "timm":
        return hasattr(module, "forward_features") and hasattr(module, "get_classifier")
    return any(cls.__module__.startswith("torchvision.models.") for cls in type(module).__mro__) and (
        any(hasattr(module, name) for name in ("heads", "head", "fc", "classifier"))
    )


def backbone_path(module: nn.Module, path: str | None) -> str | None:
    """Return the path of the only known model inside a module; None if there is none or more than one.

    Args:
        module: the container.
        path: path that the caller passed, which is returned if it exists; None to search.

    Raises:
        CallError: there is no module at the path.
    """
    if path is not None:
        if path not in {name for name, _ in module.named_modules()}:
            children = ", ".join(name for name, _ in module.named_children()) or "no modules"
            raise CallError(f"backbone={path!r} is not in {type(module).__name__}, which contains {children}")
        return path
    paths = known_models(module)
    return paths[0] if len(paths) == 1 else None


def known_models(module: nn.Module) -> list[str]:
    """Return the paths of the outermost models of the three libraries inside a module."""
    paths: list[str] = []
    for path, child in module.named_modules():
        if path and library_of(child) is not None and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def with_path_prefix(hierarchy: Hierarchy, prefix: str) -> Hierarchy:
    """Return the hierarchy with paths that start at the container, which holds the transformer at ``prefix``."""
    renamed: Mapping[str, Any] = {
        name: {f"{prefix}.{path}": layer for path, layer in getattr(hierarchy, name).items()}
        for name in ("blocks", "mergings")
    }
    return replace(hierarchy, **renamed)

"""What stands around a vision transformer: wrappers that change nothing, and modules that contain one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from vitscope.errors import CallError
from vitscope.models.backends.libraries import LIBRARIES
from vitscope.models.hierarchy import Hierarchy

# Wrappers of torch that pass input and output through, and where the module is in them.
_TRANSPARENT = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers that change neither input nor output.

    These are torch.compile's, DataParallel, DistributedDataParallel, PEFT's (its adapters live in the layers of the
    base model), and a module such as Lightning's that defines no forward pass and holds one model.
    """
    while True:
        inner = _inside(module)
        if inner is None:
            return module
        module = inner


def _inside(module: Any) -> nn.Module | None:
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
    """Whether a class inherits its forward method from nn.Module or from Lightning, which define none."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            return base is nn.Module or base.__module__.startswith(("lightning.", "pytorch_lightning."))
    return True


def library_of(module: Any) -> str | None:
    """Return the library that a module is a whole model of; None for layers and for modules of others."""
    for cls in type(module).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in LIBRARIES and _is_model(module, library):
            return library
    return None


def _is_model(module: Any, library: str) -> bool:
    if library == "transformers":
        return hasattr(module, "config") and hasattr(module, "base_model_prefix")
    if library == "timm":
        return hasattr(module, "forward_features") and hasattr(module, "get_classifier")
    return any(cls.__module__.startswith("torchvision.models.") for cls in type(module).__mro__) and (
        any(hasattr(module, name) for name in ("heads", "head", "fc", "classifier"))
    )


def backbone_path(module: nn.Module, wanted: str | None) -> str | None:
    """Return the path of the one known model inside a module; None if there is none, or several.

    Args:
        wanted: the path that the caller names.

    Raises:
        CallError: there is no module at the path.
    """
    if wanted is not None:
        if wanted not in {path for path, _ in module.named_modules()}:
            children = ", ".join(name for name, _ in module.named_children()) or "nothing"
            raise CallError(f"backbone={wanted!r} is not in {type(module).__name__}, which holds {children}")
        return wanted
    paths = known_models(module)
    return paths[0] if len(paths) == 1 else None


def known_models(module: nn.Module) -> list[str]:
    """Return the paths of the outermost models of the three libraries inside a module."""
    paths: list[str] = []
    for path, child in module.named_modules():
        if path and library_of(child) is not None and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def inside(hierarchy: Hierarchy, path: str) -> Hierarchy:
    """Return a hierarchy whose blocks are named from the module that contains it at ``path``."""
    parts: Mapping[str, Any] = {
        name: {f"{path}.{inner}": part for inner, part in getattr(hierarchy, name).items()}
        for name in ("blocks", "mergings")
    }
    return replace(hierarchy, **parts)

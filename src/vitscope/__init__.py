"""See what a vision transformer looks at: exactly, in any library, at any size.

Importing this package loads neither torch nor transformers; they are imported when a name is first used.
``__init__.pyi`` lists the public names.
"""

import importlib
from types import ModuleType
from typing import Any

import lazy_loader

from vitscope.display import register_views

_load_name, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("vitscope")
    if name not in __all__:
        raise AttributeError(f"module 'vitscope' has no attribute {name!r}")
    value = globals()[name] = _load_name(name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _load_views() -> ModuleType:
    from vitscope.views import display

    return display


register_views(_load_views)

"""The three libraries, imported when they are needed: what is missing or does not match is said in one line."""

import importlib
import importlib.util
from types import ModuleType

import torch

from vitscope.errors import ModelUnavailableError

LIBRARIES = ("transformers", "timm", "torchvision")


def library_module(name: str) -> ModuleType:
    """vitscope's own module for a library."""
    # transformers imports torchvision wherever it is installed, so one that does not work breaks it too.
    needed = ("torchvision",) if name == "transformers" and importlib.util.find_spec("torchvision") else ()
    for library in (*needed, name):
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            if error.name not in (None, library):
                raise ModelUnavailableError(f"{library} needs {error.name}: pip install {error.name}") from None
            raise ModelUnavailableError(f"{library} is not installed: pip install 'vitscope[{library}]'") from None
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            # Its compiled operators refuse a torch of another version while they are imported.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelUnavailableError(
                f"{library} does not match torch {torch.__version__} ({reason}): install the {library} made for it, "
                f"or pip uninstall {library}"
            ) from None
    return importlib.import_module(f"vitscope.models.backends.{name}.backend")

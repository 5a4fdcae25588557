"""The backends of the three libraries, imported on first use."""

import importlib
import importlib.util
from typing import Any, Literal, overload

import torch

from vitscope.errors import ModelUnavailableError, first_line
from vitscope.models.backends.protocol import Backend, TimmBackend, TorchvisionBackend, TransformersBackend

LIBRARIES = ("transformers", "timm", "torchvision")


@overload
def backend(name: Literal["transformers"]) -> TransformersBackend: ...
@overload
def backend(name: Literal["timm"]) -> TimmBackend: ...
@overload
def backend(name: Literal["torchvision"]) -> TorchvisionBackend: ...
@overload
def backend(name: str) -> Backend: ...
def backend(name: str) -> Backend:
    """Return the backend of a library.

    Args:
        name: one of :data:`LIBRARIES`.

    Raises:
        ModelUnavailableError: the library or a package that it needs is not installed, or it does not match the
            installed torch.
    """
    # transformers imports an installed torchvision, so a broken torchvision breaks transformers too.
    required = ("torchvision",) if name == "transformers" and importlib.util.find_spec("torchvision") else ()
    for library in (*required, name):
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            if error.name not in (None, library):
                raise ModelUnavailableError(f"{library} needs {error.name}: pip install {error.name}") from None
            raise ModelUnavailableError(f"{library} is not installed: pip install 'vitscope[{library}]'") from None
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            # The import of compiled operators fails if they were built for another version of torch.
            raise ModelUnavailableError(
                f"{library} does not match torch {torch.__version__} ({first_line(error)}): install the {library} "
                f"built for it, or pip uninstall {library}"
            ) from None
    module: Any = importlib.import_module(f"vitscope.models.backends.{name}.backend")
    return module

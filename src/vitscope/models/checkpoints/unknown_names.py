"""Names that are no hub id or folder, but what users have: names without their library's prefix, and weights files."""

from pathlib import Path

from vitscope.errors import ModelUnavailableError
from vitscope.models.backends.libraries import backend
from vitscope.models.checkpoints.weights_file import SUFFIXES

TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # what timm.create_model takes before the name of a repository


def suggestion_or_none(name: str) -> str | None:
    """Return the one-line refusal of a name that leads to no model, if it is clear what was meant, otherwise None.

    Only names are looked up: nothing is loaded from the network. The libraries are imported, which takes seconds.
    """
    if name.startswith(TIMM_SOURCES):
        return f"unknown model {name!r}: for a repository or folder of timm, pass 'timm:{name}'"
    if Path(name).suffix in SUFFIXES:
        return (
            f"{name} does not exist; a file of weights needs an architecture too: vs.load('timm:<name>', "
            "weights=file), or --model timm:<name> --weights file"
        )
    prefixed = [f"'{library}:{name}'" for library in ("timm", "torchvision") if _has_model(library, name)]
    return f"unknown model {name!r}: did you mean {' or '.join(prefixed)}?" if prefixed else None


def _has_model(library: str, name: str) -> bool:
    try:
        return backend(library).has_model(name)
    except ModelUnavailableError:  # the library is not installed
        return False

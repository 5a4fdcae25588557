"""Weights files: safetensors, or torch's format with nothing but tensors. No other objects are unpickled."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitscope.errors import ModelUnavailableError, first_line
from vitscope.validation import short_repr

SAFE_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (SAFE_SUFFIX, *TORCH_SUFFIXES)
SAVE_HINT = "save its state_dict with safetensors"

# Maximum nesting of the weights in a training checkpoint: {"model": {"state_dict": …}}.
_DEPTH = 3


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    In a training checkpoint, they may be nested under ``state_dict``, ``model``, ``model_ema`` or any other name, if
    there is only one set of weights.

    Args:
        path: a file that ends in ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``.

    Raises:
        ModelUnavailableError: there is no such file, or it contains no weights, several sets of weights, or objects
            that would have to be unpickled.

    Examples:
        >>> from vitscope.models import bundled_path
        >>> len(read_weights(bundled_path("vit-nano") / "model.safetensors")) > 50
        True
    """
    file = regular_file(path)
    if file.suffix == SAFE_SUFFIX:
        content: Any = _read_safetensors(file)
    elif file.suffix in TORCH_SUFFIXES:
        content = _read_torch(file)
    else:
        raise ModelUnavailableError(
            f"{file} is not a weights file that vitscope reads: pass one that ends in {', '.join(SUFFIXES)}"
        )
    if isinstance(content, Mapping) and content and _are_tensors(content):
        return dict(content)
    states = dict(_states(content))
    if len(states) > 1:
        raise ModelUnavailableError(
            f"{file} holds several sets of weights ({', '.join(states)}): save one of them with safetensors"
        )
    if not states:
        raise ModelUnavailableError(f"{file} does not hold a state dict, a mapping of names to tensors: {SAVE_HINT}")
    return dict(next(iter(states.values())))


def regular_file(path: str | Path) -> Path:
    """Return the path of a regular file that is not empty.

    Raises:
        ModelUnavailableError: there is no such file at this path.
    """
    file = Path(path)
    if not str(path).isprintable():
        raise ModelUnavailableError(
            f"{short_repr(str(path), 80)} cannot be opened: pass a name without control characters"
        )
    try:
        if file.is_dir():
            raise ModelUnavailableError(f"{file} is a folder: pass a weights file ({', '.join(SUFFIXES)})")
        if not file.exists():
            raise ModelUnavailableError(f"{file} does not exist: pass a weights file ({', '.join(SUFFIXES)})")
        if not file.is_file():
            raise ModelUnavailableError(f"{file} is not a regular file: pass a weights file")
        if not file.stat().st_size:
            raise ModelUnavailableError(f"{file} is empty: pass a weights file")
    except (OSError, ValueError) as error:  # the name is too long for the system or contains NUL
        raise ModelUnavailableError(f"{short_repr(str(path), 80)} cannot be opened: {first_line(error)}") from None
    return file


def is_torchscript(file: Path) -> bool:
    """Return whether a file is an archive with a program (TorchScript), not weights alone."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelUnavailableError(f"{file} is damaged or truncated: {first_line(error)}") from None


def _read_torch(file: Path) -> Any:
    if is_torchscript(file):
        raise ModelUnavailableError(f"{file} is a TorchScript program, which is not supported: {SAVE_HINT}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error):
            raise ModelUnavailableError(
                f"{file} holds more than weights, and vitscope never runs code from a file: {SAVE_HINT}"
            ) from None
        raise ModelUnavailableError(
            f"{file} is damaged or was not written by torch.save: {first_line(error)}"
        ) from None
    except Exception as error:  # zip, tar and pickle readers raise many kinds of errors for a damaged file
        raise ModelUnavailableError(f"{file} is damaged or truncated: {first_line(error)}") from None


def _is_state(content: Any) -> bool:
    """Return whether content maps names to tensors, at least one of which has two or more axes."""
    if not isinstance(content, Mapping) or not _are_tensors(content):
        return False
    return any(tensor.ndim > 1 for tensor in content.values())


def _are_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _states(content: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield each state dict inside a training checkpoint, except those of optimizers."""
    if not isinstance(content, Mapping) or not depth:
        return
    for key, value in content.items():
        if not isinstance(key, str) or "optim" in key.lower():
            continue
        name = f"{path}{key}"
        if _is_state(value):
            yield name, value
        else:
            yield from _states(value, f"{name}.", depth - 1)

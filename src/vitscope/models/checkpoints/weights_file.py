"""Files of weights: safetensors, or torch's format without anything but tensors in it. Nothing is unpickled."""

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

SAFE_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (SAFE_SUFFIX, *TORCH_SUFFIXES)
SAVE_HINT = "save its state_dict with safetensors"

# How deep inside a training checkpoint the weights may lie: {"model": {"state_dict": …}}.
_DEPTH = 3


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    A training checkpoint may hold them inside, under ``state_dict``, ``model``, ``model_ema`` or any other name, if
    there is only one such set.

    Args:
        path: a file that ends in ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``.

    Raises:
        ModelUnavailableError: there is no such file, or it holds no weights, more than one set of them, or objects
            that would have to be unpickled.

    Example:
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
            f"{file} is no file of weights that vitscope reads: pass one that ends in {', '.join(SUFFIXES)}"
        )
    if isinstance(content, Mapping) and content and _are_tensors(content):
        return dict(content)
    states = dict(_states(content))
    if len(states) > 1:
        raise ModelUnavailableError(
            f"{file} holds several sets of weights ({', '.join(states)}): save the one you mean with safetensors"
        )
    if not states:
        raise ModelUnavailableError(f"{file} holds no state dict, a mapping of names to tensors: {SAVE_HINT}")
    return dict(next(iter(states.values())))


def regular_file(path: str | Path) -> Path:
    """Return the path of a regular file that is not empty.

    Raises:
        ModelUnavailableError: there is none at this path.
    """
    file = Path(path)
    if not str(path).isprintable():
        raise ModelUnavailableError(f"{str(path)[:80]!r} cannot be opened: pass a name without control characters")
    try:
        if file.is_dir():
            raise ModelUnavailableError(f"{file} is a folder: pass a file of weights ({', '.join(SUFFIXES)})")
        if not file.exists():
            raise ModelUnavailableError(f"{file} does not exist: pass a file of weights ({', '.join(SUFFIXES)})")
        if not file.is_file():
            raise ModelUnavailableError(f"{file} is not a regular file: pass a file of weights")
        if not file.stat().st_size:
            raise ModelUnavailableError(f"{file} is empty: it holds no weights")
    except (OSError, ValueError) as error:  # a name too long for the system, or with NUL in it
        raise ModelUnavailableError(f"{str(path)[:80]!r} cannot be opened: {first_line(error)}") from None
    return file


def is_torchscript(file: Path) -> bool:
    """True for an archive that holds a program (TorchScript), not weights alone."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelUnavailableError(f"{file} is damaged or cut off: {first_line(error)}") from None


def _read_torch(file: Path) -> Any:
    if is_torchscript(file):
        raise ModelUnavailableError(f"{file} is a TorchScript program, which vitscope cannot look into: {SAVE_HINT}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error) or "weights_only" in str(error):
            raise ModelUnavailableError(
                f"{file} holds more than weights, and vitscope runs no code of a file: {SAVE_HINT}"
            ) from None
        raise ModelUnavailableError(f"{file} is damaged or no file of torch.save: {first_line(error)}") from None
    except Exception as error:  # zip, tar and pickle readers have many ways to fail on a damaged file
        raise ModelUnavailableError(f"{file} is damaged or cut off: {first_line(error)}") from None


def _is_state(content: Any) -> bool:
    """True for names with tensors, of which at least one is a matrix or larger."""
    if not isinstance(content, Mapping) or not _are_tensors(content):
        return False
    return any(tensor.ndim > 1 for tensor in content.values())


def _are_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _states(content: Any, path: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield each state dict inside a training checkpoint; what optimizers keep is none."""
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

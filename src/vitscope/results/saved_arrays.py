"""Files of a saved result: its tensors, and its metadata as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitscope.files import atomic_write
from vitscope.validation import require_mapping

METADATA = "about"  # key of the metadata


def write_arrays(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata as ``.npz`` or ``.safetensors``, as the suffix says.

    Raises:
        SaveError: the file cannot be written; an older file at ``path`` is unchanged.
    """
    text = json.dumps(metadata)
    with atomic_write(path) as temporary:
        if path.suffix == ".npz":
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            np.savez(temporary, allow_pickle=False, **{METADATA: np.array(text)}, **arrays)
            return
        try:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {METADATA: text}
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_arrays(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a ``.safetensors`` file.

    Raises:
        FileNotFoundError, OSError, SafetensorError: the file cannot be read.
        KeyError, TypeError, ValueError, RecursionError: it has no such metadata.
    """
    with torch.device("cpu"), safe_open(str(path), framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = json.loads((file.metadata() or {})[METADATA])
    return tensors, require_mapping(metadata, METADATA)

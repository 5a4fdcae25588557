"""A tiny data set that can be learned, noise with a tint for each class, and tiny models for it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.families import TINY
from vitscope.tune.data import Data, LabeledImages

TINTS = {"red": (60, 0, 0), "green": (0, 60, 0), "blue": (0, 0, 60)}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 4}


def noise(count: int, classes: int = 3, seed: int = 0, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return (image, side, side, 3) bytes and the class of each image, the classes in turn."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = generator.integers(40, 160, (count, side, side, 3)) + np.asarray(list(TINTS.values()))[labels, None, None]
    return images.astype(np.uint8), labels.astype(np.int64)


def coloured(train: int = 24, test: int = 12, classes: int = 3) -> Data:
    """Return a data set in memory."""
    images, labels = noise(train + test, classes)
    splits = np.arange(train), np.arange(train, train + test)
    return Data(
        "coloured", tuple(TINTS)[:classes], *(LabeledImages(list(images), index, labels[index]) for index in splits)
    )


def coloured_folder(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write one folder of PNG files per class."""
    generator = np.random.default_rng(seed)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            image = generator.integers(40, 160, (32, 32, 3)) + np.asarray(TINTS.get(label, (0, 0, 0)))
            Image.fromarray(image.astype(np.uint8)).save(folder / label / f"{i}.png")
    return folder


def small_vit(seed: int = 0, dropout: float = 0.0) -> vs.VisionModel:
    """Return a seeded ViT of transformers for images of 32 pixels."""
    import transformers

    torch.manual_seed(seed)
    size = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "hidden_dropout_prob": dropout}
    config = transformers.ViTConfig(**(TINY | size))
    return vs.load(transformers.ViTForImageClassification(config).eval())


def small_swin() -> vs.VisionModel:
    """Return a seeded Swin of timm for images of 32 pixels."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=32, num_classes=7, **SWIN)
    return vs.load(module.eval())


@contextmanager
def light_garbage() -> Iterator[None]:
    """Exclude what the libraries hold from garbage collection, which every run starts twice."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

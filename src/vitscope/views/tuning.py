"""Scenes of data sets, training runs and comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from vitscope.display import counted
from vitscope.images.image import InputImage
from vitscope.tune.baselines import describe_baselines
from vitscope.tune.comparison_result import BASE, Comparison
from vitscope.tune.leakage import DataCheck
from vitscope.tune.run_folder import Tuned
from vitscope.views.scene import AnyPanel, Curves, Dots, Matrix, Panel, Row, Scene, rows_of

MAX_CLASSES = 40  # mean images in a figure
MOST_PAIRS = 6  # pairs of duplicates in a figure
WIDE, HALF = 8.6, 4.2  # inches
ACCURACY_TITLES = ("test accuracy", "validation accuracy")  # without and with held-out images


def data_scene(check: DataCheck) -> Scene:
    """Return the mean image and the counts of each class, and some images that are in train and in test."""
    data = check.data
    counts = data.counts()
    means = [
        Panel(
            _input_image(mean),
            title=_short_label(label),
            lines=(f"{counts[label][0]:,} for training", f"{counts[label][1]:,} for testing"),
        )
        for label, mean in list(zip(data.labels, check.means, strict=True))[:MAX_CLASSES]
        if np.isfinite(mean).all()
    ]
    rows = [Row(row.panels, row.columns, 1.5) for row in rows_of(means, min(len(means), 7))]
    duplicates = _duplicate_panels(check)
    if duplicates:
        rows += [Row(row.panels, row.columns, 1.2) for row in rows_of(duplicates, min(len(duplicates), 8))]
        verb = "is" if len(check.leaking) == 1 else "are"
        leaks = f"{counted(len(check.leaking), 'training image')} {verb} also in the test set (see below)"
    else:
        leaks = "no training image is in the test set"
    return Scene(
        rows=rows,
        title=f"{data.name}: the mean image of each class",
        note=f"{counted(len(data.train), 'training image')}, {counted(len(data.test), 'test image')}; {leaks}",
        caption="",
    )


def run_scene(tuned: Tuned) -> Scene:
    """Return loss and accuracy over the epochs, and the confusion matrix."""
    record = tuned.record
    accuracy_title = ACCURACY_TITLES[bool(record["recipe"]["validation"])]
    accuracies = _accuracy_curves({"": [record["history"]]}, accuracy_title)
    losses = _loss_curves(record["history"], accuracy_title.split()[0])
    low, high = record["interval"]
    return Scene(
        rows=[
            Row([losses, accuracies], 2, HALF),
            Row(
                [_confusion_matrix(np.asarray(record["confusion"]), record["labels"], "confusion matrix, test images")],
                1,
                WIDE / 1.6,
            ),
        ],
        title=f"{short_name(record['model'])}, tuned on {record['data']} ({record['tuning']})",
        note=(
            f"test accuracy {record['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
            f"macro F1 {record['macro_f1']:.3f}; without tuning: {describe_baselines(record)}"
        ),
        caption="" if tuned.warning is None else f"Warning: {tuned.warning}.",
    )


def accuracy_scene(comparison: Comparison) -> Scene:
    """Return accuracies, gains and interactions with their intervals."""
    summaries = sorted(comparison.summaries(), key=lambda summary: comparison.tunings.index(summary.tuning))
    accuracies = Dots(
        [f"{short_name(summary.model)}, {summary.tuning}" for summary in summaries],
        [summary.accuracy for summary in summaries],
        [summary.interval for summary in summaries],
        [comparison.models.index(summary.model) for summary in summaries],
        title="accuracy on the test images, 95 % intervals",
    )
    rows = [Row([accuracies], 1, WIDE)]
    with_gain = [summary for summary in summaries if summary.gain is not None]
    if with_gain:
        gains = Dots(
            [f"{short_name(summary.model)}, {summary.tuning}" for summary in with_gain],
            [summary.gain[0] for summary in with_gain if summary.gain],
            [summary.gain[1] for summary in with_gain if summary.gain],
            [comparison.models.index(summary.model) for summary in with_gain],
            title=f"gain over {BASE} in percentage points, 95 % intervals",
            signed=True,
        )
        rows.append(Row([gains], 1, WIDE))
    interactions = comparison.interactions()
    if interactions:
        differences = Dots(
            [f"{short_name(entry.first)} over {short_name(entry.second)}, {entry.tuning}" for entry in interactions],
            [entry.value for entry in interactions],
            [entry.interval for entry in interactions],
            [len(comparison.models)] * len(interactions),
            title="interaction: gain of the first minus gain of the second, in percentage points",
            signed=True,
        )
        rows.append(Row([differences], 1, WIDE))
    return Scene(
        rows=rows,
        title=f"Fine-tuning on {comparison.data}",
        note=f"{_describe_seeds(comparison)}, {len(comparison.cells[0].correct):,} test images",
        caption="",
    )


def curves_scene(comparison: Comparison) -> Scene:
    """Return for each model the accuracy over the epochs, and how much tuning changed the attention of each layer."""
    accuracies: list[AnyPanel] = []
    distances: list[AnyPanel] = []
    largest = max((max(summary.distances) for summary in comparison.summaries() if summary.distances), default=0.0)
    accuracy_title = ACCURACY_TITLES[bool(comparison.recipe.get("validation"))]
    for model in comparison.models:
        histories = {
            tuning: [cell.record["history"] for cell in comparison.of(model, tuning)] for tuning in comparison.tunings
        }
        accuracies.append(_accuracy_curves(histories, f"{short_name(model)}: {accuracy_title} by epoch"))
        by_tuning = {
            summary.tuning: summary.distances
            for summary in comparison.summaries()
            if summary.model == model and summary.distances
        }
        names = [name for name in by_tuning if name != BASE]
        if names:
            distances.append(
                Curves(
                    [""] * len(names),  # the legend of the accuracies also holds for these curves
                    [list(range(1, len(by_tuning[name]) + 1)) for name in names],
                    [list(by_tuning[name]) for name in names],
                    title=f"{short_name(model)}: change of attention by layer",
                    x_axis="layer, counted from 1",
                    counted=True,
                    limits=(0.0, 1.05 * largest) if largest else None,  # the same for all models
                    series=[comparison.tunings.index(name) for name in names],
                )
            )
    groups = [[*accuracies, *distances]] if len(accuracies) == 1 else [accuracies, distances]
    rows = [Row(row.panels, row.columns, HALF) for group in groups for row in rows_of(group, 2)]
    return Scene(
        rows=rows,
        title=f"Fine-tuning on {comparison.data}, by epoch and by layer",
        note=(
            f"{_describe_seeds(comparison)}; change: total variation between a query's attention before and after "
            "tuning (0: identical); colours: tuning methods"
        ),
        caption="",
    )


def confusion_scene(comparison: Comparison) -> Scene:
    """Return a confusion matrix per model and tuning method, summed over seeds."""
    matrices: list[AnyPanel] = [
        _confusion_matrix(summary.confusion, comparison.labels, f"{short_name(summary.model)}, {summary.tuning}")
        for summary in comparison.summaries()
    ]
    return Scene(
        rows=[Row(row.panels, row.columns, 3.9) for row in rows_of(matrices, min(len(matrices), 3))],
        title=f"Confusion matrices: {comparison.data}",
        note=f"test images, {_describe_seeds(comparison, 'sum')}; shades: share of each row",
        caption="",
    )


def attention_scene(comparison: Comparison, model: str, count: int = 4) -> Scene | None:
    """Return the rollouts of the first test images before and after tuning; None if the model has no rollouts."""
    tunings = [tuning for tuning in comparison.tunings if tuning != BASE] or list(comparison.tunings)
    changes = {tuning: comparison.attention(model, tuning) for tuning in tunings}
    first = changes[tunings[0]]
    if first.before is None:
        return None
    rows = []
    for i, image in enumerate(map(_on_white_square, comparison.images[model][:count])):
        panels = [Panel(image), Panel(image, first.before[i])]
        panels += [Panel(image, after[i]) for change in changes.values() if (after := change.after) is not None]
        rows.append(Row(panels, len(panels)))
    return Scene(
        rows=rows,
        title=f"Rollouts of {short_name(model)} before and after tuning",
        note=f"test images of {comparison.data}, first seed",
        column_names=["image", "before", *tunings],
    )


def short_name(model: str) -> str:
    """Return the last level of a path; other names do not change."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def _duplicate_panels(check: DataCheck) -> list[AnyPanel]:
    """Return a panel for each image of some pairs of duplicates, the training image first."""
    data, panels = check.data, list[AnyPanel]()
    pairs = [*check.exact[: MOST_PAIRS // 2], *check.near[: MOST_PAIRS - min(len(check.exact), MOST_PAIRS // 2)]]
    for train, test in pairs:
        similarity = "identical" if (train, test) in check.exact else "nearly identical"
        for name, split, index in (("train", data.train, train), ("test", data.test, test)):
            photo = split.read(index).resize((128, 128))
            label = _short_label(data.labels[split.classes[index]])
            panels.append(Panel(_uncropped(photo), lines=(label, f"in {name}, {similarity}")))
    return panels


def _describe_seeds(comparison: Comparison, statistic: str = "mean") -> str:
    count = len({cell.seed for cell in comparison.cells})
    return "1 seed" if count == 1 else f"{statistic} of {count} seeds"


def _accuracy_curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], title: str) -> Curves:
    """Return the mean over seeds, up to the epoch in which the first of them stopped."""
    points = {}
    for name, seeds in histories.items():
        rows = [
            [(row["epoch"], row["eval_accuracy"]) for row in history if "eval_accuracy" in row] for history in seeds
        ]
        points[name] = [(epoch[0][0], fmean(accuracy for _, accuracy in epoch)) for epoch in zip(*rows, strict=False)]
    return _curves_by_epoch(points, title, percent=True)


def _loss_curves(history: Sequence[Mapping[str, Any]], evaluated: str) -> Curves:
    """Return the training loss and the loss on the evaluated images."""
    keys = {"training": "loss", evaluated: "eval_loss"}
    points = {name: [(row["epoch"], row[key]) for row in history if key in row] for name, key in keys.items()}
    return _curves_by_epoch(points, "loss", percent=False)


def _curves_by_epoch(points: Mapping[str, Sequence[tuple[float, float]]], title: str, *, percent: bool) -> Curves:
    return Curves(
        list(points),
        [[epoch for epoch, _ in curve] for curve in points.values()],
        [[value for _, value in curve] for curve in points.values()],
        title=title,
        x_axis="epoch",
        percent=percent,
        counted=True,
    )


def _confusion_matrix(counts: np.ndarray, labels: Sequence[str], title: str) -> Matrix:
    return Matrix(counts, [_short_label(label) for label in labels], title, "true", "predicted")


def _input_image(pixels: np.ndarray) -> InputImage:
    return _uncropped(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)))


def _uncropped(photo: Image.Image) -> InputImage:
    return InputImage(photo, (0.0, 0.0, float(photo.width), float(photo.height)))


def _on_white_square(image: InputImage) -> InputImage:
    """Return the photo on a white square, so that photos of all proportions fit one grid."""
    photo = image.photo
    side = max(photo.size)
    left, top = (side - photo.width) // 2, (side - photo.height) // 2
    square = Image.new("RGB", (side, side), "white")
    square.paste(photo, (left, top))
    box = (image.box[0] + left, image.box[1] + top, image.box[2] + left, image.box[3] + top)
    return InputImage(square, box, image.name)


def _short_label(label: str) -> str:
    """Return the first synonym of a label, cut if it is long."""
    label = label.split(",")[0].replace("_", " ")
    return label if len(label) <= 18 else f"{label[:17]}…"

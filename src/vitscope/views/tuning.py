"""Scenes of data sets, training runs and comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from vitscope.images.image import InputImage
from vitscope.tune.comparison import BASE, Comparison
from vitscope.tune.leakage import DataCheck, counted
from vitscope.tune.run_folder import Tuned
from vitscope.views.scene import Curves, Dots, Matrix, Panel, Row, Scene, Shown, wrapped

MOST_CLASSES = 40  # mean images on a page
PAIRS = 6  # duplicates shown
WIDE, HALF = 8.6, 4.2  # inches
WATCHED = ("test accuracy", "validation accuracy")  # without and with images that are held out for it


def data_scene(inspection: DataCheck) -> Scene:
    """The mean image of each class with its counts, and some images that are in train and in test."""
    data = inspection.data
    counts = data.counts()
    means = [
        Panel(
            _image(mean),
            title=_short(label),
            lines=(f"{counts[label][0]:,} to train", f"{counts[label][1]:,} to test"),
        )
        for label, mean in list(zip(data.labels, inspection.means, strict=True))[:MOST_CLASSES]
        if np.isfinite(mean).all()
    ]
    rows = [Row(row.panels, row.columns, 1.5) for row in wrapped(means, min(len(means), 7))]
    pairs = [*inspection.exact[: PAIRS // 2], *inspection.near[: PAIRS - min(len(inspection.exact), PAIRS // 2)]]
    twins: list[Shown] = []
    for train, test in pairs:
        alike = "the same" if (train, test) in inspection.exact else "nearly"
        for split, at in ((data.train, train), (data.test, test)):
            name = "train" if split is data.train else "test"
            photo = split.read(at).resize((128, 128))
            label = _short(data.labels[split.classes[at]])
            twins.append(Panel(_whole(photo), lines=(label, f"in {name}, {alike}")))
    if twins:
        rows += [Row(row.panels, row.columns, 1.2) for row in wrapped(twins, min(len(twins), 8))]
    return Scene(
        rows=rows,
        title=f"{data.name}: the mean image of each class",
        note=(
            f"{counted(len(data.train), 'image')} to train, {len(data.test):,} to test; "
            + (
                f"{len(inspection.leaking):,} of those to train in the test set too, see below"
                if twins
                else "none in both"
            )
        ),
        caption="",
    )


def run_scene(tuned: Tuned) -> Scene:
    """Loss and accuracy over the epochs, and the confusion matrix."""
    about = tuned.about
    watched = WATCHED[bool(about["recipe"]["validation"])]
    curves = _accuracy_curves({"": [about["history"]]}, watched)
    losses = _losses(about["history"], watched.split()[0])
    low, high = about["interval"]
    return Scene(
        rows=[
            Row([losses, curves], 2, HALF),
            Row([_matrix(np.asarray(about["confusion"]), about["labels"], "test images")], 1, WIDE / 1.6),
        ],
        title=f"{short_name(about['model'])}, {about['tuning']}, on {about['data']}",
        note=f"test accuracy {about['accuracy']:.1%} ({low:.1%} to {high:.1%}), macro F1 {about['macro_f1']:.3f}",
        caption="",
    )


def accuracy_scene(comparison: Comparison) -> Scene:
    """Accuracies and gains with their intervals, and whether one model gains more than the other."""
    found = sorted(comparison.summaries(), key=lambda one: comparison.tunings.index(one.tuning))
    accuracies = Dots(
        [f"{short_name(one.model)}, {one.tuning}" for one in found],
        [one.accuracy for one in found],
        [one.interval for one in found],
        [comparison.models.index(one.model) for one in found],
        title="accuracy on the test images, 95 % intervals",
    )
    rows = [Row([accuracies], 1, WIDE)]
    gained = [one for one in found if one.gain is not None]
    if gained:
        gains = Dots(
            [f"{short_name(one.model)}, {one.tuning}" for one in gained],
            [one.gain[0] for one in gained if one.gain],
            [one.gain[1] for one in gained if one.gain],
            [comparison.models.index(one.model) for one in gained],
            title=f"gain over {BASE}, percentage points",
            signed=True,
        )
        rows.append(Row([gains], 1, WIDE))
    between = comparison.interactions()
    if between:
        more = Dots(
            [f"{short_name(one.first)} over {short_name(one.second)}, {one.tuning}" for one in between],
            [one.value for one in between],
            [one.interval for one in between],
            [len(comparison.models)] * len(between),
            title="interaction: how much more the first gains than the second, percentage points",
            signed=True,
        )
        rows.append(Row([more], 1, WIDE))
    return Scene(
        rows=rows,
        title=f"Tuning on {comparison.data}",
        note=f"{_seeds(comparison)}, {len(comparison.cells[0].right):,} test images",
        caption="",
    )


def curves_scene(comparison: Comparison) -> Scene:
    """For each model the accuracy over the epochs, and how far tuning moved the attention of each layer."""
    accuracies: list[Shown] = []
    distances: list[Shown] = []
    farthest = max((max(one.distances) for one in comparison.summaries() if one.distances), default=0.0)
    held_out = bool(comparison.recipe.get("validation"))
    for model in comparison.models:
        histories = {
            tuning: [cell.about["history"] for cell in comparison.of(model, tuning)] for tuning in comparison.tunings
        }
        accuracies.append(_accuracy_curves(histories, f"{short_name(model)}: {WATCHED[held_out]} by epoch"))
        moved = {one.tuning: one.distances for one in comparison.summaries() if one.model == model and one.distances}
        names = [name for name in moved if name != BASE]
        if names:
            distances.append(
                Curves(
                    [""] * len(names),  # the legend of the accuracies holds here too
                    [list(range(len(moved[name]))) for name in names],
                    [list(moved[name]) for name in names],
                    title=f"{short_name(model)}: how far attention moved, by layer",
                    x_axis="layer",
                    counted=True,
                    limits=(0.0, 1.05 * farthest) if farthest else None,  # the same for all models
                    series=[comparison.tunings.index(name) for name in names],
                )
            )
    parts = [[*accuracies, *distances]] if len(accuracies) == 1 else [accuracies, distances]
    rows = [Row(row.panels, row.columns, HALF) for part in parts for row in wrapped(part, 2)]
    return Scene(
        rows=rows,
        title=f"Tuning on {comparison.data}, over time and by layer",
        note=(
            f"{_seeds(comparison)}; moved: total variation between a query's attention before and after, 0 the same; "
            "each tuning has one colour"
        ),
        caption="",
    )


def confusion_scene(comparison: Comparison) -> Scene:
    """A confusion matrix for each model and tuning, seeds together."""
    matrices: list[Shown] = [
        _matrix(one.confusion, comparison.labels, f"{short_name(one.model)}, {one.tuning}")
        for one in comparison.summaries()
    ]
    return Scene(
        rows=[Row(row.panels, row.columns, 3.9) for row in wrapped(matrices, min(len(matrices), 3))],
        title=f"What is taken for what: {comparison.data}",
        note=f"test images, {_seeds(comparison, 'sum')}; shades: the share of each row",
        caption="",
    )


def attention_scene(comparison: Comparison, model: str, images: int = 4) -> Scene | None:
    """Rollouts of test images before tuning and after each tuning; None where the model has none."""
    tunings = [tuning for tuning in comparison.tunings if tuning != BASE] or list(comparison.tunings)
    changes = {tuning: comparison.attention(model, tuning) for tuning in tunings}
    first = changes[tunings[0]]
    if first.before is None:
        return None
    rows = []
    for at, image in enumerate(map(_squared, comparison.images[model][:images])):
        shown = [Panel(image), Panel(image, first.before[at])]
        shown += [Panel(image, after[at]) for change in changes.values() if (after := change.after) is not None]
        rows.append(Row(shown, len(shown)))
    return Scene(
        rows=rows,
        title=f"Rollouts of {short_name(model)} before and after tuning",
        note=f"test images of {comparison.data}, first seed",
        column_names=["image", "before", *tunings],
    )


def short_name(model: str) -> str:
    """The last part of a path; other names as they are."""
    return Path(model).name if model.startswith(("/", ".", "~")) else model


def _seeds(comparison: Comparison, of_several: str = "mean") -> str:
    count = len({cell.seed for cell in comparison.cells})
    return "1 seed" if count == 1 else f"{of_several} of {count} seeds"


def _accuracy_curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], title: str) -> Curves:
    """The mean over seeds, up to where the first of them stopped."""
    known = {}
    for name, seeds in histories.items():
        rows = [[(row["epoch"], row["eval_accuracy"]) for row in one if "eval_accuracy" in row] for one in seeds]
        known[name] = [(at[0][0], fmean(accuracy for _, accuracy in at)) for at in zip(*rows, strict=False)]
    return Curves(
        list(known),
        [[epoch for epoch, _ in rows] for rows in known.values()],
        [[accuracy for _, accuracy in rows] for rows in known.values()],
        title=title,
        x_axis="epoch",
        percent=True,
        counted=True,
    )


def _losses(history: Sequence[Mapping[str, Any]], watched: str) -> Curves:
    lines = {"training": "loss", watched: "eval_loss"}
    known = {name: [(row["epoch"], row[key]) for row in history if key in row] for name, key in lines.items()}
    return Curves(
        list(known),
        [[epoch for epoch, _ in rows] for rows in known.values()],
        [[loss for _, loss in rows] for rows in known.values()],
        title="loss",
        x_axis="epoch",
        counted=True,
    )


def _matrix(counts: np.ndarray, labels: Sequence[str], title: str) -> Matrix:
    return Matrix(counts, [_short(label) for label in labels], title, "true", "said")


def _image(pixels: np.ndarray) -> InputImage:
    return _whole(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)))


def _whole(photo: Image.Image) -> InputImage:
    return InputImage(photo, (0.0, 0.0, float(photo.width), float(photo.height)))


def _squared(image: InputImage) -> InputImage:
    """The photo on a white square, so that photos of all proportions stand in one grid."""
    photo = image.photo
    side = max(photo.size)
    left, top = (side - photo.width) // 2, (side - photo.height) // 2
    square = Image.new("RGB", (side, side), "white")
    square.paste(photo, (left, top))
    box = (image.box[0] + left, image.box[1] + top, image.box[2] + left, image.box[3] + top)
    return InputImage(square, box, image.name)


def _short(label: str) -> str:
    label = label.split(",")[0].replace("_", " ")
    return label if len(label) <= 18 else f"{label[:17]}…"

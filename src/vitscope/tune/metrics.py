"""Accuracy, F1 and confusion matrix of predictions on a test set, with confidence intervals."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest

from vitscope.errors import CallError

RESAMPLES = 2000

Correct = Bool[np.ndarray, "_seed image"]  # models may have different numbers of seeds


def confusion_matrix(
    labels: Int[np.ndarray, " image"], predictions: Int[np.ndarray, " image"], num_classes: int
) -> np.ndarray:
    """Return the (class, class) counts; rows are true classes, columns predicted ones."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def macro_f1(matrix: np.ndarray) -> float:
    """Return the mean over classes of 2·TP / (2·TP + FP + FN); a class without labels and predictions counts as 0."""
    true_positives = np.diag(matrix)
    totals = matrix.sum(0) + matrix.sum(1)
    return float(np.where(totals > 0, 2 * true_positives / np.maximum(totals, 1), 0.0).mean())


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    if not 0 <= correct <= total or total < 1:
        raise CallError(f"{correct} of {total} is not a share: pass 0 to {total} correct of at least 1")
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def accuracy_interval(correct: Correct, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean accuracy: Wilson's for one seed, else a bootstrap over images and seeds."""
    if len(correct) == 1:
        return wilson_interval(int(correct.sum()), correct.size)
    return _percentiles(_bootstrap([correct], seed)[0])


def gain(tuned: Correct, base: Correct, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Return the accuracy of ``tuned`` minus that of ``base`` on the same images, and its 95 % interval."""
    accuracies = _bootstrap([tuned, base], seed)
    return float(tuned.mean() - base.mean()), _percentiles(accuracies[0] - accuracies[1])


def interaction(
    first: tuple[Correct, Correct], second: tuple[Correct, Correct], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the gain of the first model minus that of the second, and its 95 % interval.

    The interval is a bootstrap over test images, which are the same for all four arrays, and over the seeds of each.

    Args:
        first, second: the correct predictions of the tuned and of the base version of each model.
    """
    value = (first[0].mean() - first[1].mean()) - (second[0].mean() - second[1].mean())
    accuracies = _bootstrap([*first, *second], seed)
    return float(value), _percentiles(accuracies[0] - accuracies[1] - accuracies[2] + accuracies[3])


def _bootstrap(cells: Sequence[Correct], seed: int) -> Float[np.ndarray, "cell resample"]:
    """Return the mean accuracy of each cell in each resample of the images (shared) and the seeds (per cell)."""
    if len({cell.shape[1] for cell in cells}) > 1:
        raise CallError("cannot compare accuracies on different test images: use the same test set for all")
    generator = np.random.default_rng(seed)
    num_images = cells[0].shape[1]
    accuracies = np.empty((len(cells), RESAMPLES))
    for resample in range(RESAMPLES):
        counts = np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)
        for i, cell in enumerate(cells):
            rows = generator.integers(0, len(cell), len(cell))
            accuracies[i, resample] = (cell[rows] @ counts).mean() / num_images
    return accuracies


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the central 95 % of the values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

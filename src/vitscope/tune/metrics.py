"""What a classifier is worth on a test set, with intervals."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from vitscope.errors import CallError

NORMAL = 1.959963984540054  # of a 95 % interval
RESAMPLES = 2000


def confusion(truth: Int[np.ndarray, " image"], said: Int[np.ndarray, " image"], classes: int) -> np.ndarray:
    """(class, class) counts: row the true class, column what was said."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (truth, said), 1)
    return table


def macro_f1(table: np.ndarray) -> float:
    """The mean over classes of 2·TP / (2·TP + FP + FN); a class that is neither there nor said counts as 0."""
    right = np.diag(table)
    both = table.sum(0) + table.sum(1)
    return float(np.where(both > 0, 2 * right / np.maximum(both, 1), 0.0).mean())


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    if not 0 <= right <= total or total < 1:
        raise CallError(f"{right} of {total} is no share")
    share, z2 = right / total, NORMAL**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


Right = Bool[np.ndarray, "_seed image"]  # models may have different numbers of seeds


def accuracy_interval(right: Right, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean accuracy over seeds: Wilson's for one seed, else a bootstrap over both axes."""
    if len(right) == 1:
        return wilson(int(right.sum()), right.size)
    return _percentiles(_resampled([right], seed)[0])


def gain(tuned: Right, base: Right, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """How much more accurate ``tuned`` is than ``base`` on the same images, with its 95 % interval."""
    sampled = _resampled([tuned, base], seed)
    return float(tuned.mean() - base.mean()), _percentiles(sampled[0] - sampled[1])


def interaction(
    first: tuple[Right, Right], second: tuple[Right, Right], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """How much more the first model gains than the second, (tuned, base) each, with its 95 % interval.

    The interval is a bootstrap over test images, the same for all four, and over each one's seeds.
    """
    value = (first[0].mean() - first[1].mean()) - (second[0].mean() - second[1].mean())
    sampled = _resampled([*first, *second], seed)
    return float(value), _percentiles(sampled[0] - sampled[1] - sampled[2] + sampled[3])


def _resampled(cells: Sequence[Right], seed: int) -> Float[np.ndarray, "cell resample"]:
    """The mean accuracy of each cell over drawn images, the same for all, and drawn seeds of its own."""
    if len({cell.shape[1] for cell in cells}) > 1:
        raise CallError("accuracies are compared on the same test images: these are of different ones")
    generator = np.random.default_rng(seed)
    images = cells[0].shape[1]
    found = np.empty((len(cells), RESAMPLES))
    for at in range(RESAMPLES):
        weights = np.bincount(generator.integers(0, images, images), minlength=images)
        for i, cell in enumerate(cells):
            rows = generator.integers(0, len(cell), len(cell))
            found[i, at] = (cell[rows] @ weights).mean() / images
    return found


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

"""RISE by Petsiuk et al. (2018): the sum of output times mask, one pixel at a time."""

from collections.abc import Sequence

import numpy as np


def bilinear(coarse: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a coarse grid upsampled bilinearly from the four nearest cell centres, with the edge repeated."""
    upsampled = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            y = (row + 0.5) / size[0] * coarse.shape[0] - 0.5
            x = (column + 0.5) / size[1] * coarse.shape[1] - 0.5
            above, before = int(np.floor(y)), int(np.floor(x))
            for i, down in ((above, 1 - (y - above)), (above + 1, y - above)):
                for j, across in ((before, 1 - (x - before)), (before + 1, x - before)):
                    cell = coarse[min(max(i, 0), coarse.shape[0] - 1), min(max(j, 0), coarse.shape[1] - 1)]
                    upsampled[row, column] += down * across * cell
    return upsampled


def masks(tossed: np.ndarray, shifts: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Return upsampled grids of coin tosses, one cell larger per side than the image, shifted by less than a cell."""
    results = []
    for toss, shift in zip(tossed, shifts, strict=True):
        cells = len(toss)
        cell = [int(np.ceil(side / cells)) for side in size]
        upsampled = bilinear(toss.astype(float), ((cells + 1) * cell[0], (cells + 1) * cell[1]))
        top, left = int(shift[0] * cell[0]), int(shift[1] * cell[1])
        results.append(upsampled[top : top + size[0], left : left + size[1]])
    return results


def rise(answers: Sequence[float], masks: Sequence[np.ndarray], probability: float) -> np.ndarray:
    """Return Σ answer · mask / (samples · E[mask]); ``probability`` is E[mask]."""
    height, width = masks[0].shape
    values = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            for answer, mask in zip(answers, masks, strict=True):
                values[row, column] += float(answer) * float(mask[row, column])
    return values / (len(answers) * probability)

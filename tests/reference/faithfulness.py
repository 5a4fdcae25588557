"""Deletion and insertion by Petsiuk et al. (2018): one image and one patch at a time, in float64."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

GREY = 128
Answer = Callable[[np.ndarray], np.ndarray]  # the probabilities of an 8-bit image


def ranked(values: np.ndarray, cells: tuple[int, int]) -> list[int]:
    """Return the cells by decreasing mean of the map; ties keep their order."""
    down, across = (side // count for side, count in zip(values.shape, cells, strict=True))
    means = []
    for row in range(cells[0]):
        for column in range(cells[1]):
            cell = values[row * down : (row + 1) * down, column * across : (column + 1) * across]
            means.append(sum(map(float, cell.ravel())) / cell.size)
    return sorted(range(len(means)), key=lambda cell: (-means[cell], cell))


def blurred(photo: np.ndarray) -> np.ndarray:
    """Blur with a Gaussian of 5/224 of the shorter side, truncated after four deviations, with the edge repeated.

    Fractions are truncated.
    """
    sigma = 5 / 224 * min(photo.shape[:2])
    reach = int(4 * sigma + 0.5)
    kernel = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-reach, reach + 1)]
    result = photo.astype(np.float64)
    for axis in (0, 1):
        length, before = result.shape[axis], result
        result = np.zeros_like(before)
        for position in range(length):
            sources = [min(max(position + step, 0), length - 1) for step in range(-reach, reach + 1)]
            lines = [
                before.take(source, axis) * share / sum(kernel) for source, share in zip(sources, kernel, strict=True)
            ]
            result[(slice(None),) * axis + (position,)] = sum(lines)
    return result.astype(np.uint8)


def pasted(onto: np.ndarray, source: np.ndarray, taken: Sequence[int], cells: tuple[int, int]) -> np.ndarray:
    """Return ``onto`` with some cells replaced by those of ``source``."""
    result = onto.copy()
    down, across = (side // count for side, count in zip(onto.shape[:2], cells, strict=True))
    for cell in taken:
        row, column = divmod(cell, cells[1])
        region = slice(row * down, (row + 1) * down), slice(column * across, (column + 1) * across)
        result[region] = source[region]
    return result


def area(curve: Sequence[float]) -> float:
    """Return the area under the polyline, over a base of length one."""
    return sum((first + second) / 2 for first, second in pairwise(curve)) / (len(curve) - 1)


def areas(
    answer: Answer, photo: np.ndarray, order: Sequence[int], cells: tuple[int, int], column: int, steps: int
) -> tuple[float, float]:
    """Return the areas of deletion and insertion of the cells in this order."""
    steps = min(steps, len(order))
    counts = [round(step * len(order) / steps) for step in range(steps + 1)]
    grey, blur = np.full_like(photo, GREY), blurred(photo)
    deleted = [float(answer(pasted(photo, grey, order[:count], cells))[column]) for count in counts]
    inserted = [float(answer(pasted(blur, photo, order[:count], cells))[column]) for count in counts]
    return area(deleted), area(inserted)

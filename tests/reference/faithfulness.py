"""Deletion and insertion as Petsiuk et al. (2018) describe them: image by image, patch by patch, in float64."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

GREY = 128
Answer = Callable[[np.ndarray], np.ndarray]  # the probabilities of an image of bytes


def ranked(values: np.ndarray, cells: tuple[int, int]) -> list[int]:
    """Cells from the highest mean of the map to the lowest, the first of equals first."""
    down, across = (side // count for side, count in zip(values.shape, cells, strict=True))
    means = []
    for row in range(cells[0]):
        for column in range(cells[1]):
            part = values[row * down : (row + 1) * down, column * across : (column + 1) * across]
            means.append(sum(map(float, part.ravel())) / part.size)
    return sorted(range(len(means)), key=lambda cell: (-means[cell], cell))


def blurred(photo: np.ndarray) -> np.ndarray:
    """Gaussian of 5/224 of the shorter side, cut off after four deviations, the edge going on; fractions cut off."""
    sigma = 5 / 224 * min(photo.shape[:2])
    reach = int(4 * sigma + 0.5)
    kernel = [math.exp(-0.5 * (at / sigma) ** 2) for at in range(-reach, reach + 1)]
    made = photo.astype(np.float64)
    for axis in (0, 1):
        length, before = made.shape[axis], made
        made = np.zeros_like(before)
        for at in range(length):
            places = [min(max(at + step, 0), length - 1) for step in range(-reach, reach + 1)]
            lines = [
                before.take(place, axis) * share / sum(kernel) for place, share in zip(places, kernel, strict=True)
            ]
            made[(slice(None),) * axis + (at,)] = sum(lines)
    return made.astype(np.uint8)


def pasted(onto: np.ndarray, source: np.ndarray, taken: Sequence[int], cells: tuple[int, int]) -> np.ndarray:
    """``onto`` with some cells of ``source``."""
    made = onto.copy()
    down, across = (side // count for side, count in zip(onto.shape[:2], cells, strict=True))
    for cell in taken:
        row, column = divmod(cell, cells[1])
        place = slice(row * down, (row + 1) * down), slice(column * across, (column + 1) * across)
        made[place] = source[place]
    return made


def area(curve: Sequence[float]) -> float:
    """Under straight lines from point to point, over a base of one."""
    return sum((first + second) / 2 for first, second in pairwise(curve)) / (len(curve) - 1)


def areas(
    answer: Answer, photo: np.ndarray, order: Sequence[int], cells: tuple[int, int], column: int, steps: int
) -> tuple[float, float]:
    """Deletion and insertion of the cells in this order."""
    steps = min(steps, len(order))
    counts = [round(step * len(order) / steps) for step in range(steps + 1)]
    grey, blur = np.full_like(photo, GREY), blurred(photo)
    deleted = [float(answer(pasted(photo, grey, order[:count], cells))[column]) for count in counts]
    inserted = [float(answer(pasted(blur, photo, order[:count], cells))[column]) for count in counts]
    return area(deleted), area(inserted)

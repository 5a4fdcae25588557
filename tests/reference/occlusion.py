"""Occlusion as Zeiler & Fergus (2014) describe it: a window slides over the image, and the answer falls."""

from collections.abc import Callable

import numpy as np


def places(side: int, window: int, stride: int) -> list[int]:
    """Where a window begins along one side; the last one ends at the edge."""
    found, at = [], 0
    while at + window <= side:
        found.append(at)
        at += stride
    return found if found[-1] + window == side else [*found, side - window]


def occlusion(answer: Callable[[np.ndarray], float], height: int, width: int, window: int, stride: int) -> np.ndarray:
    """The mean fall of the answer over the windows that cover each cell; ``answer`` takes which cells are hidden."""
    whole = answer(np.zeros((height, width), dtype=bool))
    falls, covered = np.zeros((height, width)), np.zeros((height, width))
    for top in places(height, window, stride):
        for left in places(width, window, stride):
            hidden = np.zeros((height, width), dtype=bool)
            for row in range(top, top + window):
                for column in range(left, left + window):
                    hidden[row, column] = True
            falls += hidden * (whole - answer(hidden))
            covered += hidden
    return falls / covered

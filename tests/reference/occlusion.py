"""Occlusion by Zeiler & Fergus (2014): the drop of the output while a window slides over the image."""

from collections.abc import Callable

import numpy as np


def places(side: int, window: int, stride: int) -> list[int]:
    """Return the starts of a window along one side; the last window ends at the edge."""
    starts, start = [], 0
    while start + window <= side:
        starts.append(start)
        start += stride
    return starts if starts[-1] + window == side else [*starts, side - window]


def occlusion(answer: Callable[[np.ndarray], float], height: int, width: int, window: int, stride: int) -> np.ndarray:
    """Return the mean drop over the windows that cover each cell; ``answer`` takes a mask of hidden cells."""
    unoccluded = answer(np.zeros((height, width), dtype=bool))
    drops, covered = np.zeros((height, width)), np.zeros((height, width))
    for top in places(height, window, stride):
        for left in places(width, window, stride):
            hidden = np.zeros((height, width), dtype=bool)
            for row in range(top, top + window):
                for column in range(left, left + window):
                    hidden[row, column] = True
            drops += hidden * (unoccluded - answer(hidden))
            covered += hidden
    return drops / covered

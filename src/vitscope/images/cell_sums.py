"""Sums of pixels over the cells of a grid, whose borders may lie inside pixels."""

from typing import Any

import numpy as np
from jaxtyping import Float


def cell_sums(pixels: Any, rows: Any, columns: Any) -> Float[np.ndarray, "height width"]:
    """Return the exact sums of pixels over the cells of a grid; a pixel on a border is divided between its cells.

    Args:
        pixels: (pixel height, pixel width).
        rows, columns: the ascending borders of the cells, in pixels from the top and from the left. What lies beyond
            the pixels counts as zero.

    Examples:
        >>> cell_sums([[1.0, 2.0, 4.0]], [0, 1], [-1, 1.5, 3]).tolist()
        [[2.0, 5.0]]
    """
    # Between the borders of pixels, the integral of the pixels is linear.
    integral = np.pad(np.asarray(pixels, dtype=np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    for axis, borders in enumerate((rows, columns)):
        length = integral.shape[axis] - 1
        borders = np.clip(np.asarray(borders, dtype=np.float64), 0, length)
        before = np.minimum(np.floor(borders).astype(int), length - 1)
        fraction = np.expand_dims(borders - before, 1 - axis)
        integral = integral.take(before, axis) * (1 - fraction) + integral.take(before + 1, axis) * fraction
    return np.diff(np.diff(integral, axis=0), axis=1)

"""Shares of regions, pixel by pixel in float64: every pixel of a fine raster takes the value of its patch."""

import math
from collections.abc import Sequence

import numpy as np

FINE = 12  # points of the raster along a pixel: borders of patches have to lie on it


def points(
    values: np.ndarray, box: Sequence[float], size: tuple[int, int], dropped: np.ndarray | None = None
) -> np.ndarray:
    """Return the density of a map at every point of the photo's raster; NaN where the model sees nothing.

    Args:
        values: one per patch.
        box: (left, top, right, bottom) of what the model sees, in pixels.
        size: (height, width) of the photo.
        dropped: True for patches without a value.
    """
    left, top, right, bottom = box
    raster = np.full((size[0] * FINE, size[1] * FINE), math.nan)
    for y in range(raster.shape[0]):
        for x in range(raster.shape[1]):
            row = ((y + 0.5) / FINE - top) / (bottom - top) * values.shape[0]
            column = ((x + 0.5) / FINE - left) / (right - left) * values.shape[1]
            if 0 <= row < values.shape[0] and 0 <= column < values.shape[1]:
                cell = int(row), int(column)
                if dropped is None or not dropped[cell]:
                    raster[y, x] = values[cell]
    return raster


def share_and_area(raster: np.ndarray, mask: np.ndarray, sign: int = 0) -> tuple[float, float]:
    """Return the share of a map in a region, and the share of the area; of one sign only if ``sign`` is 1 or −1."""
    inside = total = covered = seen = 0.0
    for y, x in np.ndindex(raster.shape):
        value = raster[y, x]
        if math.isnan(value):
            continue
        amount = max(sign * value, 0.0) if sign else value
        belongs = bool(mask[y // FINE, x // FINE])
        inside += amount * belongs
        total += amount
        covered += belongs
        seen += 1
    return (inside / total if total else math.nan), covered / seen


def random_map(values: np.ndarray, upside_down: int, sideways: int, down: int, right: int) -> np.ndarray:
    """Return a map that is mirrored, and then shifted around the edges."""
    height, width = values.shape
    result = np.zeros_like(values)
    for row in range(height):
        for column in range(width):
            source = height - 1 - row if upside_down else row, width - 1 - column if sideways else column
            result[(row + down) % height, (column + right) % width] = values[source]
    return result

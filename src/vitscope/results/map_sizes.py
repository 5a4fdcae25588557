"""Maps of different sizes in one tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitscope.grid import Grid
from vitscope.typing import Maps

Size = tuple[int, int]


def common_size(sizes: Sequence[Size]) -> Size:
    """Return the largest height and the largest width."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def enlarged(values: Tensor, size: Size) -> Tensor:
    """Return maps (batch, height, width) enlarged to ``size`` by repeating rows and columns; nothing is interpolated.

    :func:`restored` is the inverse.
    """
    for axis, length in enumerate(size, 1):
        old = values.shape[axis]
        if old != length:
            rows = torch.arange(length, device=values.device) * old // length
            values = values.index_select(axis, rows)
    return values


def restored(values: Tensor, size: Size) -> Tensor:
    """Return the maps (batch, height, width) of ``size`` that :func:`enlarged` turned into ``values``."""
    for axis, length in enumerate(size, 1):
        enlarged_length = values.shape[axis]
        if enlarged_length != length:
            # The first repetition of each row.
            rows = -(-torch.arange(length, device=values.device) * enlarged_length // length)
            values = values.index_select(axis, rows)
    return values


def parse_sizes(sizes: Any, values: Maps, grid: Grid) -> list[Size] | None:
    """Return the sizes of the maps of a saved result.

    Raises:
        ValueError: they do not fit the values.
    """
    if sizes is None:
        return None
    if not isinstance(sizes, list) or len(sizes) != len(values):
        raise ValueError(f"it does not list the sizes of {len(values)} maps")
    pairs = [tuple(size) if isinstance(size, list) else () for size in sizes]
    if not all(len(pair) == 2 and all(type(side) is int and side >= 1 for side in pair) for pair in pairs):
        raise ValueError("the size of a map is not two whole numbers")
    if common_size(pairs) != (grid.height, grid.width):
        raise ValueError("the largest sizes of its maps are not those of its grid")
    for size, image in zip(pairs, values, strict=True):
        if not torch.equal(enlarged(restored(image[None], size), (grid.height, grid.width))[0], image):
            raise ValueError("a map is not an enlarged one of its size")
    return pairs

"""The grid of a location test: the places of an object, and the outputs there as a map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.compositing.stage import EditedImage
from vitscope.grid import Grid


@dataclass(frozen=True, eq=False)
class LocationGrid:
    """The places of an object in a location test: a cell around the centre of the object at each place.

    Attributes:
        places: (row, column) of each edited image.
        grid: number of rows and columns.
        box: (left, top, right, bottom) of all cells, in pixels of the photo. The outer cells end half a step beyond the
            outermost centres.
    """

    places: Sequence[tuple[int, int]]
    grid: Grid
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, images: Sequence[EditedImage], size: tuple[float, float]) -> "LocationGrid":
        """Return the grid of edited images with a place.

        Args:
            images: the images, at least one.
            size: (width, height) of the object in pixels of the photo: that of a cell in a single column or row.
        """
        places = [image.place for image in images if image.place is not None]
        centres = np.array([image.show[-1].centre for image in images], dtype=float)
        grid = Grid(*(max(place[axis] for place in places) + 1 for axis in (0, 1)))
        (left, top), (right, bottom) = centres.min(0), centres.max(0)
        half_x = (right - left) / (2 * (grid.width - 1)) if grid.width > 1 else size[0] / 2
        half_y = (bottom - top) / (2 * (grid.height - 1)) if grid.height > 1 else size[1] / 2
        return cls(places, grid, (left - half_x, top - half_y, right + half_x, bottom + half_y))

    def map(self, outputs: Float[np.ndarray, " image"]) -> Float[Tensor, "1 height width"]:
        """Return the outputs of the images at their places."""
        values = torch.zeros(1, self.grid.height, self.grid.width, dtype=torch.float32, device="cpu")
        for (row, column), output in zip(self.places, outputs, strict=True):
            values[0, row, column] = output
        return values

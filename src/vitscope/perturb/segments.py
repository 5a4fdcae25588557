"""Segments: the parts of an image that are hidden or shown as one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from skimage.segmentation import quickshift, slic

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.images.image import InputImage, nearest_pixels, three_channels

SegmentsName = Literal["quickshift", "slic", "patches"]

# Beyond this many pixels a photo is cut on a smaller copy: quickshift takes seconds for a megapixel, and cuts it into
# more segments than anyone asks about.
MAX_SEGMENTED_PIXELS = 400_000

# The regression inverts a matrix of segments × segments.
MOST_SEGMENTS = 4_000

# A patch is sampled at this many points a side to see which segments it lies in.
POINTS = 8


@dataclass(frozen=True, eq=False)
class Segments:
    """Labels of an image's pixels, whatever numbers they are, and the same counted from 0.

    Attributes:
        labels: (pixel height, pixel width), as they came.
        index: the place of each pixel's label among the sorted labels; −1 for pixels that are never hidden.
        count: how many segments there are.
        name: how they were made.
    """

    labels: Int[np.ndarray, "pixel_height pixel_width"]
    index: Int[np.ndarray, "pixel_height pixel_width"]
    count: int
    name: str

    def at(self, size: tuple[int, int]) -> "Segments":
        """The same segments for a copy of the image with ``size`` = (height, width) pixels."""
        if self.index.shape == size:
            return self
        labels, index = (nearest_pixels(part, size) for part in (self.labels, self.index))
        return Segments(labels, index, self.count, self.name)

    @property
    def sizes(self) -> Int[np.ndarray, " segment"]:
        """Pixels of each segment."""
        return np.bincount(self.index[self.index >= 0], minlength=self.count)

    def coverage(self, points: Int[np.ndarray, "patch point"]) -> Float[np.ndarray, "patch segment"]:
        """The share of each patch, sampled at ``points``, that lies in each segment."""
        found = self.index.ravel()[points]
        return np.stack([np.bincount(row[row >= 0], minlength=self.count) for row in found]) / points.shape[1]


def segment(photo: np.ndarray, how: Any, view: InputImage, cells: Grid | None) -> Segments:
    """The segments of a photo (pixel height, pixel width, 3) in 0 … 255.

    Args:
        how: ``"quickshift"`` (Vedaldi & Soatto, 2008; kernel 4, distance 200, ratio 0.2), ``"slic"`` (Achanta et al.,
            2012; about 100), ``"patches"`` (the model's own, see :func:`cell_labels`), an array of whole numbers as
            large as the photo, or a function of the photo that returns one.
        view: what of the photo the model sees.
        cells: the grid of patches; None where it is unknown.

    Raises:
        CallError: no such way, or the array is not as large as the photo.
    """
    if isinstance(how, str):
        if how not in get_args(SegmentsName):
            raise CallError(
                f"unknown segments {how!r}: choose {', '.join(get_args(SegmentsName))}, or pass an array of labels "
                "as large as the image"
            )
        if how == "patches":
            if cells is None:
                raise CallError("the patches of this model are unknown: pass patch_size to vitscope.load")
            index = cell_labels(photo.shape[:2], view, cells)
            _check_cells(photo.shape[:2], view, cells)
            return Segments(index, index, cells.num_patches, how)
        return _counted(_grown(photo, how), how).at(photo.shape[:2])
    labels, name = (how(photo), getattr(how, "__name__", "function")) if callable(how) else (how, "labels")
    return _counted(_checked(labels, photo.shape[:2]), name)


def _counted(labels: np.ndarray, name: str) -> Segments:
    unique, index = np.unique(labels, return_inverse=True)
    if len(unique) < 2:
        raise CallError(
            f"the image has one segment only ({name}), so there is nothing to compare: pass segments='patches', "
            "or labels of your own"
        )
    if len(unique) > MOST_SEGMENTS:
        raise CallError(
            f"the image has {len(unique):,} segments ({name}), more than the {MOST_SEGMENTS:,} that can be told "
            "apart: pass labels of larger ones"
        )
    return Segments(labels, index.reshape(labels.shape), len(unique), name)


def _check_cells(size: tuple[int, int], view: InputImage, cells: Grid) -> None:
    """A patch of a pixel or less cannot be hidden in its own mean."""
    left, top, right, bottom = view.box
    high = (bottom - top) / cells.height * size[0] / view.photo.height
    wide = (right - left) / cells.width * size[1] / view.photo.width
    if min(high, wide) < 2:
        raise CallError(
            f"the image has {size[0]}×{size[1]} pixels (height×width), fewer than two a side for each of the model's "
            f"{cells.height}×{cells.width} patches: enlarge it first"
        )


def _checked(labels: Any, size: tuple[int, int]) -> np.ndarray:
    try:
        array = np.asarray(labels)
    except ValueError:
        raise CallError("the segment labels are rows of different length: pass one label a pixel") from None
    if array.shape != size:
        raise CallError(
            f"the segment labels are {'×'.join(map(str, array.shape)) or 'one number'} where the image is "
            f"{size[0]}×{size[1]} (height×width): pass one label a pixel"
        )
    whole = np.issubdtype(array.dtype, np.integer)
    if not whole and not (np.issubdtype(array.dtype, np.floating) and np.array_equal(array, np.rint(array))):
        raise CallError(f"the segment labels are {array.dtype}, whole numbers are expected")
    return array.astype(np.int64)


def _grown(photo: np.ndarray, how: str) -> np.ndarray:
    """Segments that follow the image; of a large one those of a smaller copy."""
    height, width = photo.shape[:2]
    photo = photo if photo.shape[-1] == 3 else three_channels(photo, -1)
    eight_bits = photo if photo.dtype == np.uint8 else photo.round().clip(0, 255).astype(np.uint8)
    shrink = (MAX_SEGMENTED_PIXELS / (height * width)) ** 0.5
    if shrink < 1:
        small = (max(round(width * shrink), 1), max(round(height * shrink), 1))
        eight_bits = np.asarray(Image.fromarray(eight_bits).resize(small, Image.Resampling.BOX))
    grow: Callable[..., np.ndarray] = quickshift if how == "quickshift" else slic
    options = {"kernel_size": 4, "max_dist": 200, "ratio": 0.2} if how == "quickshift" else {"start_label": 0}
    return grow(eight_bits, **options)


def cell_labels(size: tuple[int, int], view: InputImage, cells: Grid) -> Int[np.ndarray, "pixel_height pixel_width"]:
    """The cell of ``cells`` that each pixel of the photo lies in, row by row; −1 where the model does not look.

    ``view.photo`` may have another size than ``size``: the box counts in its pixels.
    """
    left, top, right, bottom = view.box
    rows = _cell_of(size[0], view.photo.height, (top, bottom), cells.height)
    columns = _cell_of(size[1], view.photo.width, (left, right), cells.width)
    inside = (rows >= 0)[:, None] & (columns >= 0)
    return np.where(inside, rows[:, None] * cells.width + columns, -1)


def _cell_of(pixels: int, photo: int, span: tuple[float, float], cells: int) -> np.ndarray:
    centres = (np.arange(pixels) + 0.5) * photo / pixels
    cell = np.floor((centres - span[0]) / (span[1] - span[0]) * cells).astype(np.int64)
    return np.where((cell >= 0) & (cell < cells), cell, -1)


def patch_points(size: tuple[int, int], view: InputImage, grid: Grid) -> Int[np.ndarray, "patch point"]:
    """Pixels of the photo, counted row by row, spread evenly over each patch of the model's grid."""
    left, top, right, bottom = view.box
    rows = _points(size[0] / view.photo.height, (top, bottom), grid.height, size[0])
    columns = _points(size[1] / view.photo.width, (left, right), grid.width, size[1])
    # (row, point, column, point) → (row, column, point, point)
    flat = (rows[:, :, None, None] * size[1] + columns[None, None]).transpose(0, 2, 1, 3)
    return flat.reshape(grid.num_patches, -1)


def _points(scale: float, span: tuple[float, float], cells: int, pixels: int) -> np.ndarray:
    places = span[0] + (np.arange(cells * POINTS) + 0.5) / (cells * POINTS) * (span[1] - span[0])
    return np.floor(places * scale).astype(np.int64).clip(0, pixels - 1).reshape(cells, POINTS)

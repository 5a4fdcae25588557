"""Segments: regions of an image that are hidden or visible as a unit."""

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

# Beyond this number of pixels a photo is segmented on a smaller copy: quickshift takes seconds for a megapixel, and
# returns more segments than anyone can interpret.
MAX_SEGMENTED_PIXELS = 400_000

# The regression inverts a matrix of segments × segments.
MAX_SEGMENTS = 4_000

# A patch is sampled at this number of points per side to find the segments that it lies in.
POINTS = 8


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of an image: a label for each pixel, as given and as an index from 0.

    Attributes:
        labels: (pixel height, pixel width), any integers.
        index: the position of each pixel's label among the sorted labels; −1 for pixels that are never hidden.
        count: number of segments.
        name: the method that produced them.
    """

    labels: Int[np.ndarray, "pixel_height pixel_width"]
    index: Int[np.ndarray, "pixel_height pixel_width"]
    count: int
    name: str

    def resized(self, size: tuple[int, int]) -> "Segments":
        """Return the segments for a copy of the image with ``size`` = (height, width) pixels."""
        if self.index.shape == size:
            return self
        labels, index = (nearest_pixels(pixels, size) for pixels in (self.labels, self.index))
        return Segments(labels, index, self.count, self.name)

    @property
    def sizes(self) -> Int[np.ndarray, " segment"]:
        """Number of pixels of each segment."""
        return np.bincount(self.index[self.index >= 0], minlength=self.count)

    def coverage(self, points: Int[np.ndarray, "patch point"]) -> Float[np.ndarray, "patch segment"]:
        """Return the share of each patch, sampled at ``points``, that lies in each segment."""
        sampled = self.index.ravel()[points]
        return np.stack([np.bincount(row[row >= 0], minlength=self.count) for row in sampled]) / points.shape[1]


def segment(photo: np.ndarray, segmentation: Any, view: InputImage, cells: Grid | None) -> Segments:
    """Divide a photo into segments.

    Args:
        photo: (pixel height, pixel width, channel) in 0 … 255.
        segmentation: ``"quickshift"`` (Vedaldi & Soatto, 2008; kernel 4, distance 200, ratio 0.2), ``"slic"``
            (Achanta et al., 2012; about 100 segments), ``"patches"`` (the model's own, see :func:`cell_labels`), an
            array of whole numbers as large as the photo, or a function of the photo that returns such an array.
        view: the part of the photo that the model sees.
        cells: the grid of patches; None if it is unknown.

    Raises:
        CallError: the segmentation is unknown, its labels do not fit the photo, or it has one segment or too many.
    """
    size = photo.shape[:2]
    if isinstance(segmentation, str):
        if segmentation not in get_args(SegmentsName):
            raise CallError(
                f"unknown segments {segmentation!r}: choose {', '.join(get_args(SegmentsName))}, or pass an array of "
                "labels as large as the image"
            )
        if segmentation == "patches":
            if cells is None:
                raise CallError("the patches of this model are unknown: pass patch_size to vitscope.load")
            index = cell_labels(size, view, cells)
            _check_patch_size(size, view, cells)
            return Segments(index, index, cells.num_patches, segmentation)
        return _indexed(_computed_labels(photo, segmentation), segmentation).resized(size)
    if callable(segmentation):
        labels, name = segmentation(photo), getattr(segmentation, "__name__", "function")
    else:
        labels, name = segmentation, "labels"
    return _indexed(_require_labels(labels, size), name)


def _indexed(labels: np.ndarray, name: str) -> Segments:
    """Count the segments and index them from 0."""
    unique, index = np.unique(labels, return_inverse=True)
    if len(unique) < 2:
        raise CallError(
            f"the image has one segment only ({name}), so there is nothing to compare: pass segments='patches', "
            "or labels of your own"
        )
    if len(unique) > MAX_SEGMENTS:
        raise CallError(
            f"the image has {len(unique):,} segments ({name}), at most {MAX_SEGMENTS:,} are supported: pass labels "
            "of larger segments"
        )
    return Segments(labels, index.reshape(labels.shape), len(unique), name)


def _check_patch_size(size: tuple[int, int], view: InputImage, cells: Grid) -> None:
    """Refuse patches less than two pixels wide or high, because replacing a pixel by its mean changes nothing."""
    left, top, right, bottom = view.box
    patch_height = (bottom - top) / cells.height * size[0] / view.photo.height
    patch_width = (right - left) / cells.width * size[1] / view.photo.width
    if min(patch_height, patch_width) < 2:
        raise CallError(
            f"the image has {size[0]}×{size[1]} pixels (height×width), fewer than two per side for each of the "
            f"model's {cells.height}×{cells.width} patches: enlarge it first"
        )


def _require_labels(labels: Any, size: tuple[int, int]) -> np.ndarray:
    """Return labels as an integer array of the image's size."""
    try:
        array = np.asarray(labels)
    except ValueError:
        raise CallError("the segment labels are rows of different lengths: pass one label per pixel") from None
    if array.shape != size:
        raise CallError(
            f"the segment labels are {'×'.join(map(str, array.shape)) or 'one number'}, but the image is "
            f"{size[0]}×{size[1]} (height×width): pass one label per pixel"
        )
    is_integer = np.issubdtype(array.dtype, np.integer)
    if not is_integer and not (np.issubdtype(array.dtype, np.floating) and np.array_equal(array, np.rint(array))):
        raise CallError(f"the segment labels are {array.dtype}, whole numbers are expected")
    return array.astype(np.int64)


def _computed_labels(photo: np.ndarray, algorithm: str) -> np.ndarray:
    """Return the labels of quickshift or slic; for a large photo those of a smaller copy."""
    height, width = photo.shape[:2]
    photo = photo if photo.shape[-1] == 3 else three_channels(photo, -1)
    eight_bits = photo if photo.dtype == np.uint8 else photo.round().clip(0, 255).astype(np.uint8)
    shrink = (MAX_SEGMENTED_PIXELS / (height * width)) ** 0.5
    if shrink < 1:
        small = (max(round(width * shrink), 1), max(round(height * shrink), 1))
        eight_bits = np.asarray(Image.fromarray(eight_bits).resize(small, Image.Resampling.BOX))
    compute: Callable[..., np.ndarray] = quickshift if algorithm == "quickshift" else slic
    options = {"kernel_size": 4, "max_dist": 200, "ratio": 0.2} if algorithm == "quickshift" else {"start_label": 0}
    return compute(eight_bits, **options)


def cell_labels(size: tuple[int, int], view: InputImage, cells: Grid) -> Int[np.ndarray, "pixel_height pixel_width"]:
    """Return the cell of ``cells`` that each pixel of the photo lies in, row by row; −1 outside the model's view.

    ``size`` may differ from the size of ``view.photo``, in whose pixels the box is given.
    """
    left, top, right, bottom = view.box
    rows = _cell_of(size[0], view.photo.height, (top, bottom), cells.height)
    columns = _cell_of(size[1], view.photo.width, (left, right), cells.width)
    inside = (rows >= 0)[:, None] & (columns >= 0)
    return np.where(inside, rows[:, None] * cells.width + columns, -1)


def _cell_of(pixels: int, photo: int, span: tuple[float, float], cells: int) -> np.ndarray:
    """Return the cell of each of ``pixels`` along one side; −1 outside ``span``."""
    centres = (np.arange(pixels) + 0.5) * photo / pixels
    cell = np.floor((centres - span[0]) / (span[1] - span[0]) * cells).astype(np.int64)
    return np.where((cell >= 0) & (cell < cells), cell, -1)


def patch_points(size: tuple[int, int], view: InputImage, grid: Grid) -> Int[np.ndarray, "patch point"]:
    """Return pixels of the photo, counted row by row, spread evenly over each patch of the model's grid."""
    left, top, right, bottom = view.box
    rows = _points(size[0] / view.photo.height, (top, bottom), grid.height, size[0])
    columns = _points(size[1] / view.photo.width, (left, right), grid.width, size[1])
    # (row, point, column, point) → (row, column, point, point)
    flat = (rows[:, :, None, None] * size[1] + columns[None, None]).transpose(0, 2, 1, 3)
    return flat.reshape(grid.num_patches, -1)


def _points(scale: float, span: tuple[float, float], cells: int, pixels: int) -> np.ndarray:
    """Return the sampled pixels of each cell along one side."""
    positions = span[0] + (np.arange(cells * POINTS) + 0.5) / (cells * POINTS) * (span[1] - span[0])
    return np.floor(positions * scale).astype(np.int64).clip(0, pixels - 1).reshape(cells, POINTS)

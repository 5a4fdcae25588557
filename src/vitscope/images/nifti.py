"""NIfTI volumes: a slice as 8-bit pixels, upright by the orientation that the file states."""

import gzip
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitscope.errors import ImageError
from vitscope.images.arrays import check_size
from vitscope.images.grey_window import (
    HOW_TO_SLICE,
    HOW_TO_WINDOW,
    GreyWindow,
    check_no_nan,
    require_slice,
    windowed,
)

_DIRECTIONS = {
    "R": "left to right",
    "L": "right to left",
    "A": "posterior to anterior",
    "P": "anterior to posterior",
    "S": "inferior to superior",
    "I": "superior to inferior",
}
_SECOND_VERSION = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # the size of the header, 540 bytes, in both byte orders
_GZIP = b"\x1f\x8b"


def read_nifti(
    file: Any, name: str, max_pixels: int, window: GreyWindow | None = None, index: int | None = None
) -> tuple[np.ndarray, bool]:
    """Return a slice of a NIfTI volume along its last axis.

    The slice is turned and mirrored as the axes in the file say, to the view of DICOM: the patient's right is on the
    left and anterior is up in an axial slice; superior is up in a coronal and a sagittal slice, in which anterior is on
    the left. An oblique volume is turned to the nearest of these; it is never interpolated.

    Args:
        file: the open binary file, at its start; it may be compressed by gzip.
        name: name of the file, for messages.
        max_pixels: maximum number of pixels of a slice.
        window: the scaled values of black and white. By default ``cal_min`` and ``cal_max`` of the header, or 0 to 255
            for unscaled uint8.
        index: index of the slice, from 0; None if there is only one.

    Returns:
        uint8 (H, W); and whether the file states its orientation.

    Raises:
        CallError: there is no such slice.
        ImageError: nibabel is not installed, a slice or a window has to be chosen, or the volume is damaged, a series,
            or not of grey values.
    """
    try:
        import nibabel
    except ModuleNotFoundError:
        raise ImageError(f'{name} is a NIfTI file: pip install "vitscope[medical]" to read it') from None
    prefix = file.read(2)
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if prefix == _GZIP else file
    size_of_header = stream.read(4)
    stream.seek(0)
    volume = (nibabel.Nifti2Image if size_of_header in _SECOND_VERSION else nibabel.Nifti1Image).from_stream(stream)
    shape = tuple(int(length) for length in volume.shape)
    dtype = volume.get_data_dtype()
    if dtype.kind not in "uif":
        raise ImageError(f"{name} holds values of type {dtype}: only grey values are supported")
    if len(shape) < 2 or math.prod(shape[3:]) > 1:
        sizes = "×".join(map(str, shape))
        raise ImageError(f"{name} holds {sizes} values: save one volume of it, with two or three axes, and pass that")
    check_size(shape[0], shape[1], name, max_pixels)
    count = shape[2] if len(shape) > 2 else 1
    codes = nibabel.aff2axcodes(volume.affine)
    if index is None and count > 1:
        direction = f" from {_DIRECTIONS[codes[2]]}" if codes[2] in _DIRECTIONS else ""
        raise ImageError(
            f"{name} is a volume of {count} slices: choose one, 0 to {count - 1}{direction}, with {HOW_TO_SLICE}"
        )
    position = 0 if index is None else require_slice(index, count, name, "slices" if count > 1 else "slice")
    values = np.asarray(volume.dataobj[(slice(None), slice(None), position, *(0 for _ in shape[3:]))[: len(shape)]])
    grey = windowed(values, window or _range_of_header(volume, values, dtype, name), name)
    is_oriented = bool(volume.header["qform_code"] or volume.header["sform_code"])
    return _upright(grey, codes, name), is_oriented


def _range_of_header(volume: Any, values: np.ndarray, dtype: Any, name: str) -> GreyWindow:
    """Return the values of black and white that the file states.

    Raises:
        ImageError: it states none.
    """
    low, high = float(volume.header["cal_min"]), float(volume.header["cal_max"])
    if math.isfinite(low) and math.isfinite(high) and low < high:
        return low, high
    if dtype == np.uint8 and (volume.dataobj.slope, volume.dataobj.inter) == (1, 0):
        return 0.0, 255.0
    check_no_nan(values, name)
    raise ImageError(
        f"{name} holds {dtype} values of unknown range, in this slice {values.min():g} to {values.max():g}: "
        f"{HOW_TO_WINDOW}"
    )


def _upright(pixels: np.ndarray, codes: Sequence[str | None], name: str) -> np.ndarray:
    """Return a slice with axes towards left, posterior and inferior: the lower one across, the higher one down.

    Args:
        pixels: (first axis, second axis).
        codes: direction in which each axis of the volume increases, such as ("R", "A", "S").
        name: name of the volume, for messages.

    Raises:
        ImageError: an axis has no direction.
    """
    axes = []
    for axis, code in enumerate(codes[:2]):
        if code is None:
            raise ImageError(f"{name} is damaged: its orientation is not invertible")
        axes.append(next(number for number, pair in enumerate(("LR", "PA", "IS")) if code in pair))
        if code in "RAS":
            pixels = np.flip(pixels, axis)
    return np.ascontiguousarray(pixels.T if axes[0] < axes[1] else pixels)

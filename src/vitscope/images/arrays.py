"""Arrays as images, in memory and in numpy's files (.npy), and the limit on the number of pixels."""

import io
from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import CallError, ImageError

MAX_PIXELS = 100_000_000
MAX_PIXELS_VARIABLE = "VITSCOPE_MAX_PIXELS"


def image_of_array(array: np.ndarray) -> Image.Image:
    """Return an array as a PIL image.

    Args:
        array: uint8 or uint16, (H, W) or (H, W, C) with one to four channels; only the upper 8 of 16 bits are used.

    Raises:
        CallError: its shape or dtype is not that of an image.
    """
    check_array(array.shape, array.dtype, "the array")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def read_npy(file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int) -> np.ndarray:
    """Return the array in a file in numpy's format (.npy).

    The header is checked before any memory is allocated for the array.

    Raises:
        CallError: the shape or dtype of the array is not that of an image.
        ImageError: it has more than ``max_pixels`` pixels.
    """
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    check_array(shape, dtype, name)
    check_size(shape[1], shape[0], name, max_pixels)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """Refuse an array that is not an image.

    Raises:
        CallError: its shape or dtype is not that of an image.
    """
    if dtype.hasobject:
        raise CallError(f"{name} holds objects, not pixels: pass a list of images, or uint8 (H, W, 3) from 0 to 255")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 2, 3, 4)) or 0 in shape:
        raise CallError(f"an array of shape {shape} is not an image: pass (H, W), (H, W, 3) or (H, W, 4)")
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise CallError(
            f"an array of {dtype} has no defined range: pass uint8 from 0 to 255, "
            "or a tensor (batch, 3, height, width) that is already preprocessed"
        )


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Refuse an image with too many pixels.

    Raises:
        ImageError: it has more than ``max_pixels`` pixels.
    """
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}×{height} pixels, more than the limit of {max_pixels:,}: make it smaller, or raise "
            f"the limit with the environment variable {MAX_PIXELS_VARIABLE}"
        )

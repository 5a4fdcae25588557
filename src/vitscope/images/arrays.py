"""Arrays as images, in memory and in numpy's files (.npy), and the limit on the number of pixels."""

import io
from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import CallError, ImageError
from vitscope.images.grey_window import HOW_TO_WINDOW, GreyWindow, warn_if_narrow, windowed

MAX_PIXELS = 100_000_000
MAX_PIXELS_VARIABLE = "VITSCOPE_MAX_PIXELS"


def image_of_array(array: np.ndarray, name: str = "the array", window: GreyWindow | None = None) -> Image.Image:
    """Return an array as a PIL image.

    Args:
        array: uint8 or uint16, (H, W) or (H, W, C) with one to four channels; only the upper 8 of 16 bits are used.
            With a window, grey (H, W) or (H, W, 1) of any integers or floating-point numbers.
        name: name of the array, for messages.
        window: the values of black and white.

    Raises:
        CallError: its shape or dtype is not that of an image.
    """
    check_array(array.shape, array.dtype, name, window)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if window is not None:
        return Image.fromarray(windowed(array, window, name))
    if array.dtype.itemsize == 2:
        warn_if_narrow(array, (0.0, 65535.0), name)
        array = (array >> 8).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def read_npy(
    file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int, window: GreyWindow | None = None
) -> np.ndarray:
    """Return the array in a file in numpy's format (.npy).

    The header is checked before any memory is allocated for the array.

    Raises:
        CallError: the shape or dtype of the array is not that of an image.
        ImageError: it has more than ``max_pixels`` pixels.
    """
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    check_array(shape, dtype, name, window)
    check_size(shape[1], shape[0], name, max_pixels)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any], name: str, window: GreyWindow | None = None) -> None:
    """Refuse an array that is not an image. With a window it may hold any real numbers, but only grey.

    Raises:
        CallError: its shape or dtype is not that of an image.
    """
    if dtype.hasobject:
        raise CallError(f"{name} holds objects, not pixels: pass a list of images, or uint8 (H, W, 3) from 0 to 255")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 2, 3, 4)) or 0 in shape:
        raise CallError(f"an array of shape {shape} is not an image: pass (H, W), (H, W, 3) or (H, W, 4)")
    if window is not None and len(shape) == 3 and shape[2] > 1:
        raise CallError(f"window is for grey pixels, and {name} has {shape[2]} channels: leave it out")
    if dtype.kind not in ("u" if window is None else "uif") or (window is None and dtype.itemsize > 2):
        raise CallError(
            f"an array of {dtype} has no defined range: pass uint8 from 0 to 255, a tensor (batch, 3, height, width) "
            f"that is already preprocessed, or for grey values {HOW_TO_WINDOW.removeprefix('pass ')}"
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

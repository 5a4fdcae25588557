"""Arrays as images, in memory and in numpy's files; and the limit on pixels."""

import io
from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import CallError, ImageError

MAX_PIXELS = 100_000_000
MAX_PIXELS_VARIABLE = "VITSCOPE_MAX_PIXELS"


def check_size(width: int, height: int, name: str, limit: int) -> None:
    if width * height > limit:
        raise ImageError(
            f"{name} has {width}×{height} pixels, more than the limit of {limit:,}: make it smaller, or raise "
            f"the limit with the environment variable {MAX_PIXELS_VARIABLE}"
        )


def read_npy(file: io.BytesIO | io.BufferedReader, name: str, limit: int) -> np.ndarray:
    """An array in numpy's format; its header is checked before room is made for what it claims to hold."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    check_array(shape, dtype, name)
    check_size(shape[1], shape[0], name, limit)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    if dtype.hasobject:
        raise CallError(f"{name} holds objects, not pixels: pass a list of images, or uint8 (H, W, 3) from 0 to 255")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 2, 3, 4)) or 0 in shape:
        raise CallError(f"an array of shape {shape} is no image: (H, W), (H, W, 3) or (H, W, 4) is")
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise CallError(
            f"an array of {dtype} has no agreed range: pass uint8 from 0 to 255, "
            "or a tensor (batch, 3, height, width) that is already preprocessed"
        )


def image_of_array(array: np.ndarray) -> Image.Image:
    check_array(array.shape, array.dtype, "the array")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))

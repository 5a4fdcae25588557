"""Reading of images from paths, PIL images, arrays, bytes and open files, as upright RGB."""

import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitscope.errors import CallError, ImageError, VitscopeError, first_line
from vitscope.images.arrays import MAX_PIXELS, MAX_PIXELS_VARIABLE, check_size, image_of_array, read_npy
from vitscope.images.image import on_white
from vitscope.images.pixel_depth import check_depth, eight_bits, transparent_colour
from vitscope.images.png_data import rows_missing
from vitscope.images.sources import (
    NPY,
    PREFIX,
    check_decoder,
    check_format,
    quoted_path,
    read_binary_file,
    require_regular_file,
)

_EXPECTED = (
    "pass a path, a PIL image, a uint8 array (H, W, 3), the bytes of an image file, an open binary file, "
    "a list of these, or a tensor (batch, 3, height, width) that is already preprocessed"
)

# Pillow keeps its limit on pixels, and Python its warning filters, in global variables. They are changed only while a
# header or EXIF is read, under this lock.
_pillow_state = threading.Lock()


def photos(images: Any) -> list[Any]:
    """Return the images that a public function was given, as a list of single images for :func:`read_photo`.

    Args:
        images: a path, PIL image, array (H, W[, C]), bytes or an open binary file; a sequence of these; or an array
            (N, H, W, C).

    Raises:
        CallError: the sequence or array is empty.
    """
    single = isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Sequence)
    if isinstance(images, np.ndarray):
        single = images.ndim != 4
    sources = [images] if single else list(images)
    if not sources:
        raise CallError("no image was given")
    return sources


def read_photo(source: Any, *, max_pixels: int | None = None, alpha: bool = False) -> tuple[Image.Image, str]:
    """Read an image as upright RGB.

    EXIF orientation is applied, 16 bits become 8, transparent pixels become white, grey and CMYK become RGB.

    Args:
        source: a path, PIL image, array (H, W[, C]) of uint8 or uint16, the bytes of an image file, or an open binary
            file. Files and bytes hold an image in one of :func:`~vitscope.images.sources.formats`, or an array in
            numpy's format (.npy).
        max_pixels: maximum number of pixels; larger images are refused before they are decoded. By default the
            environment variable ``VITSCOPE_MAX_PIXELS``, or 100,000,000.
        alpha: return RGBA if the image has transparency.

    Returns:
        the photo, and its path or ``""``.

    Raises:
        ImageNotFoundError: the path leads to no regular file.
        ImageError: the file is not a complete image, or the image is too large or too small.
        CallError: ``source`` is of another type, or an array of another shape or dtype.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(source if isinstance(source, str) else Path(source), max_pixels, alpha), str(source)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "")
        if source.format == "EPS":  # loading it would run Ghostscript
            check_decoder("EPS", name or "the image")
        with _errors_in_one_line(name or "the image"):
            return _to_rgb(source, name or "the image", alpha), name
    if isinstance(source, np.ndarray):
        return _to_rgb(image_of_array(source), "the array", alpha), ""
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(io.BytesIO(bytes(source)), "the data", max_pixels, alpha, in_memory=True), ""
    if callable(getattr(source, "read", None)):
        return _decoded(io.BytesIO(read_binary_file(source)), "the data", max_pixels, alpha, in_memory=True), ""
    hint = ""
    if isinstance(source, list | tuple):
        hint = "; nested lists are not supported: pass a flat list of images, or an array made with numpy.asarray"
    raise CallError(f"cannot read an image from {type(source).__name__}: {_EXPECTED}{hint}")


def _read_file(path: str | Path, max_pixels: int | None, alpha: bool) -> Image.Image:
    name = quoted_path(path)
    with _errors_in_one_line(name), require_regular_file(path).open("rb") as file:
        return _decoded(file, name, max_pixels, alpha)


def _decoded(
    file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int | None, alpha: bool, *, in_memory: bool = False
) -> Image.Image:
    limit = max_pixels if max_pixels is not None else _limit_from_environment()
    prefix = file.read(PREFIX)
    file.seek(0)
    with _errors_in_one_line(name):
        if prefix.startswith(NPY):
            return _to_rgb(image_of_array(read_npy(file, name, limit)), name, alpha)
        check_format(prefix, name, CallError if in_memory else ImageError, f": {_EXPECTED}" if in_memory else "")
        with _open_header(file) as image:
            check_decoder(image.format, name)
            check_size(image.width, image.height, name, limit)
            photo = _to_rgb(image, name, alpha)
            if rows_missing(image, file):
                raise ImageError(f"{name} is damaged: its data end before the last row")
            return photo


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Turn the errors of decoders, which may be of any class, into an ImageError whose message is one line."""
    try:
        yield
    except (VitscopeError, Warning):
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is damaged, or of a kind that Pillow does not decode: save it as PNG or JPEG"
        ) from None
    except PermissionError:
        raise ImageError(f"{name} cannot be read: permission denied") from None
    except Exception as error:
        reason = first_line(error) if str(error) else "it ends early"
        raise ImageError(f"{name} is damaged: {reason}") from None


def _limit_from_environment() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if not text:
        return MAX_PIXELS
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise CallError(f"{MAX_PIXELS_VARIABLE} is {text!r}, not a number of pixels") from None


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Suspend Pillow's warnings about damaged metadata, and its limit on pixels, which vitscope's limit replaces."""
    with _pillow_state, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open_header(file: io.BytesIO | io.BufferedReader) -> Image.Image:
    with _quiet_pillow():
        return Image.open(file)


def _to_rgb(image: Image.Image, name: str, alpha: bool = False) -> Image.Image:
    if min(image.size) < 2:
        raise ImageError(f"{name} has {image.width}×{image.height} pixels: at least 2×2 are needed")
    if image.mode == "LAB":
        raise ImageError(f"{name} holds colours in CIELAB: convert it to RGB")
    is_tiff = image.format == "TIFF"  # Pillow reads its metadata again while it loads the pixels
    with _quiet_pillow() if is_tiff else nullcontext():
        check_depth(image, name)
        transparent = transparent_colour(image)
        image.load()
    photo = _upright(image)
    if transparent is not None:
        photo.info["transparency"] = transparent
    if photo.mode.startswith("I"):
        with _quiet_pillow():
            photo = eight_bits(photo, image, name)
    if photo.mode == "La":
        photo = photo.convert("LA")
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = photo if alpha else on_white(photo)
    elif photo.mode != "RGB":
        photo = photo.convert("RGB")
    photo.info = {}
    return photo


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy rotated by its EXIF orientation, or unrotated if the EXIF block is damaged."""
    with _quiet_pillow(), suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()

"""Paths, PIL images, arrays, bytes and open files as upright RGB, or one line that says what is wrong."""

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

from vitscope.errors import CallError, ImageError, VitscopeError
from vitscope.images.arrays import MAX_PIXELS, MAX_PIXELS_VARIABLE, check_size, image_of_array, read_npy
from vitscope.images.image import on_white
from vitscope.images.pixel_depth import check_depth, eight_bits, transparent_colour
from vitscope.images.png_data import rows_missing
from vitscope.images.sources import (
    NPY,
    PREFIX,
    check_decoder,
    check_format,
    quoted,
    read_binary_file,
    require_regular_file,
)

# Pillow keeps its limit, and Python its warning filters, in module variables: they are changed only while a header or
# EXIF is read, under this lock.
_pillow_state = threading.Lock()


def photos(images: Any) -> list[Any]:
    """Return the single sources, for :func:`read_photo`, of whatever the public API takes as images.

    Args:
        images: a path, PIL image, array (H, W[, C]), bytes or an open binary file; a sequence of these; or an array
            (N, H, W, C).

    Raises:
        CallError: there are none.
    """
    single = isinstance(images, str | bytes | bytearray | memoryview) or not isinstance(images, Sequence)
    if isinstance(images, np.ndarray):
        single = images.ndim != 4
    sources = [images] if single else list(images)
    if not sources:
        raise CallError("no image was given")
    return sources


def read_photo(source: Any, *, max_pixels: int | None = None, alpha: bool = False) -> tuple[Image.Image, str]:
    """One source as an upright RGB photo, with a name for it.

    EXIF orientation is applied, 16 bits become 8, transparency is laid on white, grey and CMYK become RGB.

    Args:
        source: a path, PIL image, array (H, W[, C]) of uint8 or uint16, the bytes of an image file, or an open binary
            file. Files and bytes hold an image (see :func:`~vitscope.images.sources.formats`), or an array in numpy's
            format (.npy).
        max_pixels: refuse larger images before they are decoded; by default ``VITSCOPE_MAX_PIXELS`` from the
            environment, else 100,000,000.
        alpha: return a photo that has transparency as RGBA.

    Raises:
        ImageNotFoundError: no regular file at the path.
        ImageError: the file holds no whole image, or one that is too large or too small.
        CallError: none of these sources.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(source if isinstance(source, str) else Path(source), max_pixels, alpha), str(source)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "")
        if source.format == "EPS":  # to load it is to run Ghostscript
            check_decoder("EPS", name or "the image")
        with _damage_reported(name or "the image"):
            return _to_rgb(source, name or "the image", alpha), name
    if isinstance(source, np.ndarray):
        return _to_rgb(image_of_array(source), "the array", alpha), ""
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(io.BytesIO(bytes(source)), "the data", max_pixels, alpha, in_memory=True), ""
    if callable(getattr(source, "read", None)):
        return _decoded(io.BytesIO(read_binary_file(source)), "the data", max_pixels, alpha, in_memory=True), ""
    hint = ""
    if isinstance(source, list | tuple):
        hint = "; nested lists are not read: make one flat list of images, or an array with numpy.asarray"
    raise CallError(f"cannot read an image from {type(source).__name__}: {_EXPECTED}{hint}")


_EXPECTED = (
    "pass a path, a PIL image, a uint8 array (H, W, 3), the bytes of an image file, an open binary file, "
    "a list of these, or a tensor (batch, 3, height, width) that is already preprocessed"
)


def check_file(path: str | Path) -> None:
    """Refuse a path that leads to no regular file.

    Raises:
        ImageNotFoundError: nothing is there, or a folder, pipe, socket or device.
    """
    require_regular_file(path)


def _read_file(path: str | Path, max_pixels: int | None, alpha: bool) -> Image.Image:
    name = quoted(path)
    with _damage_reported(name), require_regular_file(path).open("rb") as file:
        return _decoded(file, name, max_pixels, alpha)


def _decoded(
    file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int | None, alpha: bool, *, in_memory: bool = False
) -> Image.Image:
    limit = max_pixels if max_pixels is not None else _limit_from_environment()
    prefix = file.read(PREFIX)
    file.seek(0)
    with _damage_reported(name):
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
def _damage_reported(name: str) -> Iterator[None]:
    """Decoders differ in what they raise for broken data; the first line says it."""
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
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
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
    """Without Pillow's warnings of odd metadata; its limit on pixels is replaced by vitscope's."""
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
        raise ImageError(f"{name} has {image.width}×{image.height} pixels: there is nothing to look at")
    if image.mode == "LAB":
        raise ImageError(f"{name} holds colours in CIELAB: convert it to RGB")
    tiff = image.format == "TIFF"  # whose metadata Pillow reads again while it loads
    with _quiet_pillow() if tiff else nullcontext():
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
    """A copy, turned as EXIF says; one whose EXIF block is damaged is as it is stored."""
    with _quiet_pillow(), suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()

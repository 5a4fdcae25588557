"""Reading of images from paths, PIL images, arrays, bytes and open files, as upright RGB."""

import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitscope.errors import CallError, ImageError, VitscopeError, first_line, warn
from vitscope.images.arrays import MAX_PIXELS, MAX_PIXELS_VARIABLE, check_size, image_of_array, read_npy
from vitscope.images.dicom import read_dicom
from vitscope.images.grey_window import GreyWindow, ImageFile, describe_choice, require_window, warn_if_narrow
from vitscope.images.image import on_white
from vitscope.images.nifti import read_nifti
from vitscope.images.pixel_depth import check_depth, depth_of, eight_bits, transparent_colour
from vitscope.images.png_data import rows_missing
from vitscope.images.sources import (
    NPY,
    PREFIX,
    check_decoder,
    check_format,
    medical_format_or_none,
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


def read_image(source: Any, *, window: Any = None, slice: int | None = None) -> Image.Image:
    """Read an image with a grey window, or one slice of a volume, as an image that every function takes.

    Plain photos need no such call: every function reads them itself. This one is for images whose pixels are not 8-bit
    grey levels, such as CT and MRI, and for a look at what a model gets.

    Args:
        source: a path, PIL image, array (H, W[, C]), the bytes of an image file, or an open binary file.
        window: (low, high), the grey values that become black and white, in the units of the file (Hounsfield units for
            CT); values outside are clipped. By default the window in a DICOM or NIfTI file, or else the full range of
            the file's bits.
        slice: index of the frame of a DICOM file, or of the slice of a NIfTI volume along its last axis, from 0.

    Returns:
        RGB, upright, or RGBA if the image has transparency. Its attribute ``filename`` is the path, the slice and the
        window, which results show as the image's name.

    Raises:
        CallError: the window is not two increasing numbers, the pixels are not grey, or there is no such slice.
        ImageNotFoundError: the path leads to no regular file.
        ImageError: the file is not a complete image, or a window or a slice has to be chosen.

    Examples:
        >>> import numpy as np, vitscope as vs
        >>> twelve_bits = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
        >>> image = vs.read_image(twelve_bits, window=(0, 4095))
        >>> image.size, image.getextrema()[0], image.filename
        ((64, 64), (0, 255), '(window 0 to 4095)')
    """
    image, name = read_photo(source, alpha=True, window=window, slice=slice)
    image.filename = name  # type: ignore[attr-defined]
    return image


def read_photo(
    source: Any,
    *,
    max_pixels: int | None = None,
    alpha: bool = False,
    window: Any = None,
    slice: int | None = None,
) -> tuple[Image.Image, str]:
    """Read an image as upright RGB.

    EXIF orientation is applied, 16 bits become 8, transparent pixels become white, grey and CMYK become RGB.

    Args:
        source: a path, PIL image, array (H, W[, C]) of uint8 or uint16, the bytes of an image file, or an open binary
            file. Files and bytes hold an image in one of :func:`~vitscope.images.sources.formats`, or an array in
            numpy's format (.npy).
        max_pixels: maximum number of pixels; larger images are refused before they are decoded. By default the
            environment variable ``VITSCOPE_MAX_PIXELS``, or 100,000,000.
        alpha: return RGBA if the image has transparency.
        window, slice: see :func:`read_image`; by default those of an :class:`~vitscope.images.grey_window.ImageFile`.

    Returns:
        the photo, and its name: the path or ``""``, then the slice and the window if they were chosen.

    Raises:
        ImageNotFoundError: the path leads to no regular file.
        ImageError: the file is not a complete image, or the image is too large or too small.
        CallError: ``source`` is of another type, or an array of another shape or dtype.
    """
    if isinstance(source, ImageFile):
        window, slice = source.window if window is None else window, source.slice if slice is None else slice
    choice = _Choice(
        _limit_from_environment() if max_pixels is None else max_pixels, alpha, require_window(window), slice
    )
    photo, name = _read(source, choice)
    return photo, " ".join(filter(None, (name, describe_choice(choice.window, slice))))


@dataclass(frozen=True)
class _Choice:
    """How an image is read, see :func:`read_photo`."""

    max_pixels: int
    alpha: bool
    window: GreyWindow | None
    slice: int | None

    def unwindowed(self) -> "_Choice":
        """Return the same choice for pixels to which the window was applied."""
        return replace(self, window=None)

    def check_single(self, name: str) -> None:
        """Refuse a slice of an image that has no slices."""
        if self.slice is not None:
            raise CallError(f"slice is {self.slice}, but {name} is a single image: leave it out")


def _read(source: Any, choice: _Choice) -> tuple[Image.Image, str]:
    if isinstance(source, str | os.PathLike):
        return _read_file(source if isinstance(source, str) else Path(source), choice), str(source)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "")
        choice.check_single(name or "the image")
        if source.format == "EPS":  # loading it would run Ghostscript
            check_decoder("EPS", name or "the image")
        with _errors_in_one_line(name or "the image"):
            return _to_rgb(source, name or "the image", choice), name
    if isinstance(source, np.ndarray):
        choice.check_single("the array")
        return _to_rgb(image_of_array(source, window=choice.window), "the array", choice.unwindowed()), ""
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(io.BytesIO(bytes(source)), "the data", choice, in_memory=True), ""
    if callable(getattr(source, "read", None)):
        return _decoded(io.BytesIO(read_binary_file(source)), "the data", choice, in_memory=True), ""
    hint = ""
    if isinstance(source, list | tuple):
        hint = "; nested lists are not supported: pass a flat list of images, or an array made with numpy.asarray"
    raise CallError(f"cannot read an image from {type(source).__name__}: {_EXPECTED}{hint}")


def _read_file(path: str | Path, choice: _Choice) -> Image.Image:
    name = quoted_path(path)
    with _errors_in_one_line(name), require_regular_file(path).open("rb") as file:
        return _decoded(file, name, choice)


def _decoded(
    file: io.BytesIO | io.BufferedReader, name: str, choice: _Choice, *, in_memory: bool = False
) -> Image.Image:
    prefix = file.read(PREFIX)
    file.seek(0)
    with _errors_in_one_line(name):
        medical_format = medical_format_or_none(prefix)
        if medical_format is not None:
            return _decoded_medical(file, name, choice, medical_format)
        if prefix.startswith(NPY):
            choice.check_single(name)
            array = read_npy(file, name, choice.max_pixels, choice.window)
            return _to_rgb(image_of_array(array, name, choice.window), name, choice.unwindowed())
        check_format(prefix, name, CallError if in_memory else ImageError, f": {_EXPECTED}" if in_memory else "")
        choice.check_single(name)
        with _open_header(file) as image:
            check_decoder(image.format, name)
            check_size(image.width, image.height, name, choice.max_pixels)
            photo = _to_rgb(image, name, choice)
            if rows_missing(image, file):
                raise ImageError(f"{name} is damaged: its data end before the last row")
            return photo


def _decoded_medical(
    file: io.BytesIO | io.BufferedReader, name: str, choice: _Choice, medical_format: str
) -> Image.Image:
    """Return a frame of a DICOM file or a slice of a NIfTI volume."""
    unused_range, is_oriented = None, True
    with _quiet_pillow():  # pydicom and nibabel, too, warn of details that the decoded pixels do not depend on
        if medical_format == "DICOM":
            pixels, unused_range = read_dicom(file, name, choice.max_pixels, choice.window, choice.slice)
        else:
            pixels, is_oriented = read_nifti(file, name, choice.max_pixels, choice.window, choice.slice)
    if unused_range is not None:
        warn_if_narrow(*unused_range, name)
    if not is_oriented:
        warn(f"{name} does not state its orientation: left and right may be swapped")
    return _to_rgb(Image.fromarray(pixels), name, choice.unwindowed())


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


def _to_rgb(image: Image.Image, name: str, choice: _Choice) -> Image.Image:
    if min(image.size) < 2:
        raise ImageError(f"{name} has {image.width}×{image.height} pixels: at least 2×2 are needed")
    if image.mode == "LAB":
        raise ImageError(f"{name} holds colours in CIELAB: convert it to RGB")
    is_tiff = image.format == "TIFF"  # Pillow reads its metadata again while it loads the pixels
    with _quiet_pillow() if is_tiff else nullcontext():
        check_depth(image, name, choice.window)
        transparent = transparent_colour(image)
        image.load()
    photo = _upright(image)
    if transparent is not None:
        photo.info["transparency"] = transparent
    if photo.mode.startswith("I") or choice.window is not None:
        with _quiet_pillow():
            depth = depth_of(image)
        photo = eight_bits(photo, name, depth, in_memory=image.format is None, window=choice.window)
    if photo.mode == "La":
        photo = photo.convert("LA")
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = photo if choice.alpha else on_white(photo)
    elif photo.mode != "RGB":
        photo = photo.convert("RGB")
    photo.info = {}
    return photo


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy rotated by its EXIF orientation, or unrotated if the EXIF block is damaged."""
    with _quiet_pillow(), suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()

"""Photos in, model input out, and the way back from the model's view to the photo."""

import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitscope.channel_settings import require_finite, require_sides
from vitscope.errors import CallError, PictureError, VitscopeError
from vitscope.image_arrays import MAX_PIXELS, MAX_PIXELS_VARIABLE, check_size, image_of_array, read_npy
from vitscope.image_files import (
    NPY,
    PREFIX,
    check_decoder,
    check_format,
    quoted,
    read_binary_file,
    require_regular_file,
)
from vitscope.photo_view import Picture as Picture
from vitscope.photo_view import nearest_pixels as nearest_pixels
from vitscope.photo_view import on_white as on_white
from vitscope.photo_view import picture_of_unit as picture_of_unit
from vitscope.photo_view import three_channels as three_channels
from vitscope.pixel_depth import check_depth, eight_bits, transparent_colour
from vitscope.png_data import rows_missing

MAX_SIDE = 2**14  # of a model's input

# The mode of a photo as a model of so many channels takes it.
PHOTO_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# Pillow keeps its limit, and Python its warning filters, in module variables: they are changed only while a header or
# EXIF is read, under this lock.
_pillow_state = threading.Lock()

Fit = Literal["squash", "crop"]


@dataclass(frozen=True)
class Preprocessing:
    """What a model wants of a picture: one geometry for all three libraries, with Pillow's own resize.

    The length of ``mean`` and ``std`` is the number of channels. A photo fits 3 channels (RGB), 1 (grey), and where it
    has transparency 4 (RGBA) or 2 (grey and transparency); a model of any other number takes tensors only.

    ``fit`` is ``"squash"`` (resized to ``size``, proportions lost) or ``"crop"`` (resized to cover
    ``size`` / ``crop_ratio``, then the centre is cut out). ``round_half_even`` holds for libraries that round
    the crop's corner where others cut off the half pixel.
    """

    size: tuple[int, int]  # (height, width) of the model's input
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fit: Fit = "squash"
    resize_to: tuple[int, int] | None = None  # what is covered (crop) or filled (squash) before the centre is cut out
    resample: Image.Resampling = Image.Resampling.BILINEAR
    round_half_even: bool = False
    source: str = field(default="", compare=False)  # where these settings came from, as a human reads it

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # as for every frozen dataclass
        set_(self, "size", require_sides(self.size, "size", MAX_SIDE))
        if self.resize_to is not None:
            set_(self, "resize_to", require_sides(self.resize_to, "resize_to", 2 * MAX_SIDE))
        set_(self, "mean", require_finite(self.mean, "mean"))
        set_(self, "std", require_finite(self.std, "std"))
        if len(self.mean) != len(self.std):
            raise CallError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}: one for each channel is expected in both"
            )
        if 0 in self.std:
            raise CallError(f"std is {self.std}: the input is divided by it, so no number may be 0")
        if self.fit not in get_args(Fit):
            raise CallError(f"fit is {self.fit!r}: choose {' or '.join(get_args(Fit))}")
        try:
            set_(self, "resample", Image.Resampling(self.resample))
        except ValueError:
            names = ", ".join(f"{filter_.value} ({filter_.name.lower()})" for filter_ in Image.Resampling)
            raise CallError(f"resample is {self.resample!r}: choose one of Pillow's filters, {names}") from None

    @property
    def channels(self) -> int:
        """The number of channels of the model's input."""
        return len(self.mean)

    @property
    def takes_transparency(self) -> bool:
        """Whether the last channel of a photo is its transparency."""
        return self.channels in (2, 4)

    def read(self, source: Any) -> tuple[Tensor, Picture]:
        """Return the input of one source, as :func:`read_photo` reads it, and the picture that knows the way back."""
        return self(*read_photo(source, alpha=self.takes_transparency))

    def as_json(self) -> dict[str, Any]:
        """What a result remembers of its preprocessing: where it came from, and its settings."""
        settings = {"size": list(self.size), "mean": list(self.mean), "std": list(self.std), "fit": self.fit}
        return {"source": self.source, **settings, "resample": self.resample.name.lower()}

    def resized(self, size: tuple[int, int]) -> "Preprocessing":
        """The same recipe for another input size; what is cut off stays in proportion."""
        target = self.resize_to or self.size
        resize_to = (round(target[0] * size[0] / self.size[0]), round(target[1] * size[1] / self.size[1]))
        return replace(self, size=size, resize_to=resize_to)

    def __call__(self, photo: Image.Image, name: str = "") -> tuple[Tensor, Picture]:
        """The photo as (channel, height, width) float32, and the picture that knows the way back."""
        cut, picture = self.cut(photo, name)
        return self.normalized(torch.from_numpy(cut).permute(2, 0, 1)), picture

    def normalized(self, cut: Tensor) -> Tensor:
        """Bytes (…, channel, height, width) as float32 input, on their device."""
        mean, std = (self._channels(values).to(cut.device) for values in (self.mean, self.std))
        return (cut.float() / 255 - mean) / std

    def cut(self, photo: Image.Image, name: str = "") -> tuple[np.ndarray, Picture]:
        """The photo's bytes as the model sees them, (height, width, channel), and the picture that knows the way back.

        Raises:
            CallError: a photo has no such number of channels.
            PictureError: a strip too thin for the crop.
        """
        height, width = self.size
        shown, photo = on_white(photo), self._in_channels(photo)
        fill_height, fill_width = self._filled(photo.width, photo.height)
        if fill_height * fill_width > MAX_PIXELS:
            raise PictureError(
                f"{name or 'the picture'} is {photo.width}×{photo.height} pixels, too thin a strip for a crop of "
                f"{height}×{width}: cut out the part that matters first"
            )
        resized = (
            photo if photo.size == (fill_width, fill_height) else photo.resize((fill_width, fill_height), self.resample)
        )
        top, left = self._corner(fill_height - height), self._corner(fill_width - width)
        cut = np.array(resized.crop((left, top, left + width, top + height)))
        scale_x, scale_y = photo.width / fill_width, photo.height / fill_height
        box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
        return cut.reshape(height, width, self.channels), Picture(shown, box, name)

    def _in_channels(self, photo: Image.Image) -> Image.Image:
        """The photo in the mode that the model takes; the grey of a photo that was grey is what it was."""
        mode = PHOTO_MODES.get(self.channels)
        has_alpha = photo.mode in ("LA", "RGBA")
        if mode is None:
            raise CallError(
                f"this model takes {self.channels} channels, a photo has 3: pass a tensor "
                f"(batch, {self.channels}, height, width)"
            )
        if self.takes_transparency and not has_alpha:
            raise CallError(
                f"this model takes {self.channels} channels ({mode}), the photo has no transparency: pass one "
                f"that has, or a tensor (batch, {self.channels}, height, width)"
            )
        if has_alpha and not self.takes_transparency:
            photo = on_white(photo)
        return photo if photo.mode == mode else photo.convert(mode)

    def _filled(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that a photo is resized to before the centre is cut out."""
        fill_height, fill_width = self.resize_to or self.size
        if self.fit == "crop":
            # The libraries cut off the fraction of the longer side; timm rounds it where the input is no square.
            whole = round if self.round_half_even and fill_height != fill_width else int
            if height * fill_width >= width * fill_height:
                fill_height = whole(fill_width * height / width)
            else:
                fill_width = whole(fill_height * width / height)
        return fill_height, fill_width

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and offset of each channel: input = byte · factor + offset."""
        mean, std = self._channels(self.mean).flatten(), self._channels(self.std).flatten()
        return 1 / (255 * std), -mean / std

    def corner_of_uncut(self, width: int, height: int) -> tuple[int, int] | None:
        """(top, left) of the input in a photo of this size whose pixels are taken as they are, else None."""
        fill_height, fill_width = self._filled(width, height)
        if (fill_height, fill_width) != (height, width):
            return None
        return self._corner(height - self.size[0]), self._corner(width - self.size[1])

    def _corner(self, room: int) -> int:
        """Where the cut begins when ``room`` pixels are cut off; below zero the picture is padded with black."""
        if self.round_half_even:
            return round(room / 2) if room > 0 else -(-room // 2)
        return room // 2

    def picture_of(self, pixels: Tensor, name: str = "") -> Picture:
        """A picture to show for (channel, height, width) input that came without a photo."""
        shown = pixels.detach().float().cpu() * self._channels(self.std) + self._channels(self.mean)
        return picture_of_unit(shown, name)

    @staticmethod
    def _channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)


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
        raise CallError("no picture was given")
    return sources


def read_photo(source: Any, *, max_pixels: int | None = None, alpha: bool = False) -> tuple[Image.Image, str]:
    """One source as an upright RGB photo, with a name for it.

    EXIF orientation is applied, 16 bits become 8, transparency is laid on white, grey and CMYK become RGB.

    Args:
        source: a path, PIL image, array (H, W[, C]) of uint8 or uint16, the bytes of an image file, or an open binary
            file. Files and bytes hold an image (see :func:`~vitscope.image_files.formats`), or an array in numpy's
            format (.npy).
        max_pixels: refuse larger pictures before they are decoded; by default ``VITSCOPE_MAX_PIXELS`` from the
            environment, else 100,000,000.
        alpha: return a photo that has transparency as RGBA.

    Raises:
        PictureNotFoundError: no regular file at the path.
        PictureError: the file holds no whole picture, or one that is too large or too small.
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
    raise CallError(f"cannot read a picture from {type(source).__name__}: {_EXPECTED}{hint}")


_EXPECTED = (
    "pass a path, a PIL image, a uint8 array (H, W, 3), the bytes of an image file, an open binary file, "
    "a list of these, or a tensor (batch, 3, height, width) that is already preprocessed"
)


def check_file(path: str | Path) -> None:
    """Refuse a path that leads to no regular file.

    Raises:
        PictureNotFoundError: nothing is there, or a folder, pipe, socket or device.
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
        check_format(prefix, name, CallError if in_memory else PictureError, f": {_EXPECTED}" if in_memory else "")
        with _open_header(file) as image:
            check_decoder(image.format, name)
            check_size(image.width, image.height, name, limit)
            photo = _to_rgb(image, name, alpha)
            if rows_missing(image, file):
                raise PictureError(f"{name} is damaged: its data end before the last row")
            return photo


@contextmanager
def _damage_reported(name: str) -> Iterator[None]:
    """Decoders differ in what they raise for broken data; the first line says it."""
    try:
        yield
    except (VitscopeError, Warning):
        raise
    except UnidentifiedImageError:
        raise PictureError(
            f"{name} is damaged, or of a kind that Pillow does not decode: save it as PNG or JPEG"
        ) from None
    except PermissionError:
        raise PictureError(f"{name} cannot be read: permission denied") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise PictureError(f"{name} is damaged: {reason}") from None


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
        raise PictureError(f"{name} has {image.width}×{image.height} pixels: there is nothing to look at")
    if image.mode == "LAB":
        raise PictureError(f"{name} holds colours in CIELAB: convert it to RGB")
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

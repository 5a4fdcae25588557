"""Photos in, model input out, and the way back from the model's view to the photo."""

import os
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitscope.errors import CallError, PictureError, PictureNotFoundError, VitscopeError

MAX_PIXELS = 100_000_000
MAX_PIXELS_VARIABLE = "VITSCOPE_MAX_PIXELS"

# Pillow keeps its own limit in a module variable: it is lifted only while a header is read, under this lock.
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """One photo and the part of it that the model saw.

    ``photo`` is upright RGB at its own size; ``box`` is the region (left, top, right, bottom), in the photo's
    pixels, that became the model's input: the whole photo where the model squashes it, less where it crops.
    """

    photo: Image.Image
    box: tuple[float, float, float, float]
    name: str = ""

    def top_left(self, height_share: float, width_share: float) -> "Picture":
        """The same photo, seen only in the top left part of its box: patches need not fill the model's input."""
        left, top, right, bottom = self.box
        box = (left, top, left + (right - left) * width_share, top + (bottom - top) * height_share)
        return Picture(self.photo, box, self.name)

    def paint(self, values: Any, size: tuple[int, int] | None = None, *, smooth: bool = True) -> np.ndarray:
        """A map on the token grid, laid over the photo where it belongs.

        Args:
            values: (height, width) of the token grid.
            size: (width, height) of the result; the photo's own by default.
            smooth: bicubic between patch centres, within the map's range; otherwise every patch is one flat block.

        Returns:
            float32 (size height, size width); NaN where the model did not look.
        """
        width, height = size or self.photo.size
        scale_x, scale_y = width / self.photo.width, height / self.photo.height
        left, top = round(self.box[0] * scale_x), round(self.box[1] * scale_y)
        right, bottom = round(self.box[2] * scale_x), round(self.box[3] * scale_y)
        # A box that reaches beyond the photo is a crop that was padded: what lies there has no pixel.
        beyond_left, beyond_top = max(-left, 0), max(-top, 0)
        values = np.asarray(values, dtype=np.float32)
        method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        resized = Image.fromarray(values).resize((max(right - left, 1), max(bottom - top, 1)), method)
        canvas = np.full((height, width), np.nan, dtype=np.float32)
        shown = np.asarray(resized).clip(values.min(), values.max())
        place = canvas[max(top, 0) : bottom, max(left, 0) : right]
        place[:] = shown[beyond_top : beyond_top + place.shape[0], beyond_left : beyond_left + place.shape[1]]
        return canvas


@dataclass(frozen=True)
class Preprocessing:
    """What a model wants of a picture: one geometry for all three libraries, with Pillow's own resize.

    ``fit`` is ``"squash"`` (resized to ``size``, proportions lost) or ``"crop"`` (resized to cover
    ``size`` / ``crop_ratio``, then the centre is cut out). ``round_half_even`` holds for libraries that round
    the crop's corner where others cut off the half pixel.
    """

    size: tuple[int, int]  # (height, width) of the model's input
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fit: Literal["squash", "crop"] = "squash"
    resize_to: tuple[int, int] | None = None  # what is covered (crop) or filled (squash) before the centre is cut out
    resample: Image.Resampling = Image.Resampling.BILINEAR
    round_half_even: bool = False
    source: str = field(default="", compare=False)  # where these settings came from, as a human reads it

    def resized(self, size: tuple[int, int]) -> "Preprocessing":
        """The same recipe for another input size; what is cut off stays in proportion."""
        target = self.resize_to or self.size
        resize_to = (round(target[0] * size[0] / self.size[0]), round(target[1] * size[1] / self.size[1]))
        return replace(self, size=size, resize_to=resize_to)

    def __call__(self, photo: Image.Image, name: str = "") -> tuple[Tensor, Picture]:
        """The photo as (3, height, width) float32, and the picture that knows the way back."""
        cut, picture = self.cut(photo, name)
        return self.normalized(torch.from_numpy(cut).permute(2, 0, 1)), picture

    def normalized(self, cut: Tensor) -> Tensor:
        """Bytes (…, 3, height, width) as float32 input, on their device."""
        mean, std = (self._channels(values).to(cut.device) for values in (self.mean, self.std))
        return (cut.float() / 255 - mean) / std

    def cut(self, photo: Image.Image, name: str = "") -> tuple[np.ndarray, Picture]:
        """The photo's bytes as the model sees them, (height, width, 3), and the picture that knows the way back."""
        height, width = self.size
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
        cut = resized.crop((left, top, left + width, top + height))
        scale_x, scale_y = photo.width / fill_width, photo.height / fill_height
        box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
        return np.array(cut), Picture(photo, box, name)

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
        std = torch.tensor(self.std)
        return 1 / (255 * std), -torch.tensor(self.mean) / std

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
        """A picture to show for (3, height, width) input that came without a photo."""
        shown = pixels.detach().float().cpu() * self._channels(self.std) + self._channels(self.mean)
        return picture_of_unit(shown, name)

    @staticmethod
    def _channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def nearest_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A copy of (height, width) pixels at another ``size``, each the nearest there is: labels stay labels."""
    return pixels[np.ix_(*(np.arange(side) * of // side for side, of in zip(size, pixels.shape, strict=True)))]


def picture_of_unit(shown: Tensor, name: str = "") -> Picture:
    """A picture of a (3, height, width) tensor whose values lie in [0, 1]."""
    array = (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Picture(Image.fromarray(array), (0.0, 0.0, float(array.shape[1]), float(array.shape[0])), name)


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


def read_photo(source: Any, *, max_pixels: int | None = None) -> tuple[Image.Image, str]:
    """A path, PIL image or (H, W[, C]) array as an upright RGB photo, with a name for it.

    EXIF orientation is applied, 16 bits become 8, transparency is laid on white, grey and CMYK become RGB.

    Args:
        max_pixels: refuse larger pictures before they are decoded; by default ``VITSCOPE_MAX_PIXELS`` from the
            environment, else 100,000,000.

    Raises:
        PictureNotFoundError: no file at the path.
        PictureError: the file holds no whole picture, or one that is too large or too small.
        CallError: not a path, image or array.
    """
    if isinstance(source, str | Path):
        return _read_file(Path(source), max_pixels), str(source)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "")
        with _damage_reported(name or "the image"):
            return _to_rgb(source, name or "the image"), name
    if isinstance(source, np.ndarray):
        return _to_rgb(_image_of_array(source), "the array"), ""
    raise CallError(
        f"cannot read a picture from {type(source).__name__}: pass a path, a PIL image, a uint8 array (H, W, 3), "
        "a list of these, or a tensor (batch, 3, height, width) that is already preprocessed"
    )


def check_file(path: Path) -> None:
    """Refuse a path that leads to no file.

    Raises:
        PictureNotFoundError: nothing is there, or a folder.
    """
    try:
        folder, there = path.is_dir(), path.exists()
    except OSError as error:
        raise PictureNotFoundError(f"{path} cannot be reached: {error.strerror or error}") from None
    if folder:
        raise PictureNotFoundError(f"{path} is a folder: pass the pictures in it")
    if not there:
        raise PictureNotFoundError(f"{path} does not exist")


def _read_file(path: Path, max_pixels: int | None) -> Image.Image:
    check_file(path)
    limit = max_pixels if max_pixels is not None else _limit_from_environment()
    with _damage_reported(str(path)), _open_header(path) as image:
        width, height = image.size
        if width * height > limit:
            raise PictureError(
                f"{path} has {width}×{height} pixels, more than the limit of {limit:,}: make it smaller, or raise "
                f"the limit with the environment variable {MAX_PIXELS_VARIABLE}"
            )
        return _to_rgb(image, str(path))


@contextmanager
def _damage_reported(name: str) -> Iterator[None]:
    """Decoders differ in what they raise for broken data; the first line says it."""
    try:
        yield
    except (VitscopeError, Warning):
        raise
    except UnidentifiedImageError:
        empty = Path(name).stat().st_size == 0
        what = "is an empty file" if empty else "is not a picture in any format that Pillow reads"
        raise PictureError(f"{name} {what}") from None
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


def _open_header(path: Path) -> Image.Image:
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _image_of_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (2, 3, 4)) or 0 in array.shape:
        raise CallError(f"an array of shape {array.shape} is no picture: (H, W), (H, W, 3) or (H, W, 4) is")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise CallError(
            f"an array of {array.dtype} has no agreed range: pass uint8 from 0 to 255, "
            "or a tensor (batch, 3, height, width) that is already preprocessed"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < 2:
        raise PictureError(f"{name} has {image.width}×{image.height} pixels: there is nothing to look at")
    image.load()
    with suppress(SyntaxError, ValueError, struct.error, TypeError, KeyError, ZeroDivisionError):
        # A photo whose EXIF block is damaged is shown as it is stored.
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise PictureError(f"{name} holds floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.max() > 65535 or values.min() < 0:
            raise PictureError(f"{name} holds 32-bit pixels of unknown range: convert it to 8 or 16 bits")
        # Mode "I" may hold 8 bits; 16-bit files say so.
        shift = 0 if image.mode == "I" and values.max() <= 255 else 8
        image = Image.fromarray((values >> shift).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "RGB":
        image.load()
        return image if image.getexif() == {} else image.copy()
    return image.convert("RGB")

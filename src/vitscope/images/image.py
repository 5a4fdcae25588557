"""A photo with the region that the model saw, and the display of tensors as images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor, uint8


@dataclass(frozen=True)
class InputImage:
    """A photo and the region of it that became the model's input.

    Attributes:
        photo: the original image, upright and in RGB, at its original size.
        box: (left, top, right, bottom) of the region, in pixels of the photo. It is the whole photo if the model
            resizes without cropping, and reaches beyond the photo if the crop was padded.
        name: path of the photo; ``""`` if it was not read from a file.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        >>> result = vs.rollout(trace)
        >>> image = result.images[0]
        >>> image.photo.size, image.paint(result.values[0]).shape
        ((451, 300), (300, 451))
    """

    photo: Image.Image
    box: tuple[float, float, float, float]
    name: str = ""

    @classmethod
    def from_photo(cls, photo: Image.Image, name: str = "") -> "InputImage":
        """Return an image whose region is the whole photo.

        Args:
            photo: upright RGB.
            name: path of the photo, by default ``""``.
        """
        return cls(photo, (0.0, 0.0, float(photo.width), float(photo.height)), name)

    def uncropped(self) -> "InputImage":
        """Return the same photo with the whole photo as its region."""
        return InputImage.from_photo(self.photo, self.name)

    def top_left(self, height_fraction: float, width_fraction: float) -> "InputImage":
        """Return the same photo with only the top left part of its region.

        Patches may not fill the model's input; this is the part that they cover.

        Args:
            height_fraction: height of the part, as a fraction of the region's height.
            width_fraction: width of the part, as a fraction of the region's width.
        """
        left, top, right, bottom = self.box
        box = (left, top, left + (right - left) * width_fraction, top + (bottom - top) * height_fraction)
        return InputImage(self.photo, box, self.name)

    def paint(
        self, values: Any, size: tuple[int, int] | None = None, *, smooth: bool = True, dropped: Any = None
    ) -> np.ndarray:
        """Return a map on the token grid, enlarged and placed on the photo.

        Args:
            values: one value per patch, (height, width).
            size: (width, height) of the result in pixels; by default that of the photo.
            smooth: interpolate between the patch centres (bicubic, within the range of the map). If False, each patch
                is a block of one value.
            dropped: bool (height, width), True for patches without a value; None if all have one. Interpolation does
                not see them.

        Returns:
            float32 (height, width) of ``size``; NaN on dropped patches and outside the region that the model saw.
        """
        if dropped is not None and np.any(np.asarray(dropped)):
            # Interpolation would mix a dropped patch into its neighbours, so it takes the value of the nearest one.
            rows, columns = distance_transform_edt(dropped, return_distances=False, return_indices=True)
            painted = self.paint(np.asarray(values)[rows, columns], size, smooth=smooth)
            painted[self.paint(dropped, size, smooth=False) > 0.5] = np.nan
            return painted
        width, height = size or self.photo.size
        scale_x, scale_y = width / self.photo.width, height / self.photo.height
        left, top = round(self.box[0] * scale_x), round(self.box[1] * scale_y)
        right, bottom = round(self.box[2] * scale_x), round(self.box[3] * scale_y)
        # A box that reaches beyond the photo is a padded crop: values on the padding are not on the photo.
        padding_left, padding_top = max(-left, 0), max(-top, 0)
        values = np.asarray(values, dtype=np.float32)
        method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        resized = Image.fromarray(values).resize((max(right - left, 1), max(bottom - top, 1)), method)
        painted = np.asarray(resized).clip(values.min(), values.max())
        canvas = np.full((height, width), np.nan, dtype=np.float32)
        region = canvas[max(top, 0) : bottom, max(left, 0) : right]
        region[:] = painted[padding_top : padding_top + region.shape[0], padding_left : padding_left + region.shape[1]]
        return canvas


def repeats_patches(values: np.ndarray) -> bool:
    """Return whether a map has one value for every two by two patches, as that of a block after patch merging.

    Interpolation would make it look more precise than it is.
    """
    rows, columns = (np.arange(side) // 2 * 2 for side in values.shape)
    return np.array_equal(values, values[np.ix_(rows, columns)])


def nearest_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return (height, width) pixels resized to ``size`` without interpolation, so that labels are not mixed."""
    return pixels[np.ix_(*(np.arange(new) * old // new for new, old in zip(size, pixels.shape, strict=True)))]


def image_of_unit(values: Tensor, name: str = "") -> InputImage:
    """Return a (channel, height, width) tensor with values in [0, 1] as an image; see :func:`three_channels`."""
    array = (three_channels(values, 0).clamp(0, 1) * 255).round().to(uint8).permute(1, 2, 0).numpy()
    return InputImage.from_photo(Image.fromarray(array), name)


def three_channels(values: Any, axis: int) -> Any:
    """Return an array or tensor with any number of channels as one with three channels, for display.

    Three channels are returned unchanged, and of four channels the first three. A single channel becomes grey. Any
    other number of channels becomes grey by their mean.
    """
    count = values.shape[axis]
    if count in (3, 4):
        return values.take(range(3), axis) if isinstance(values, np.ndarray) else values.narrow(axis, 0, 3)
    if isinstance(values, np.ndarray):
        return values.mean(axis, keepdims=True, dtype=np.float64).astype(values.dtype).repeat(3, axis)
    return values.mean(axis, keepdim=True).repeat_interleave(3, axis)


def on_white(photo: Image.Image) -> Image.Image:
    """Return a photo as RGB, with transparent pixels on white."""
    if photo.mode in ("LA", "RGBA"):
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo if photo.mode == "RGB" else photo.convert("RGB")

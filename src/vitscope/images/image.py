"""One photo and the part of it that a model saw; and tensors as images to show."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, uint8


@dataclass(frozen=True)
class InputImage:
    """One photo and the part of it that the model saw.

    ``photo`` is upright RGB at its own size; ``box`` is the region (left, top, right, bottom), in the photo's
    pixels, that became the model's input: the whole photo where the model squashes it, less where it crops.
    """

    photo: Image.Image
    box: tuple[float, float, float, float]
    name: str = ""

    def top_left(self, height_share: float, width_share: float) -> "InputImage":
        """The same photo, seen only in the top left part of its box: patches need not fill the model's input."""
        left, top, right, bottom = self.box
        box = (left, top, left + (right - left) * width_share, top + (bottom - top) * height_share)
        return InputImage(self.photo, box, self.name)

    def uncropped(self) -> "InputImage":
        """Return the photo with all of it in view, for results that also cover what the model crops away."""
        return InputImage(self.photo, (0.0, 0.0, float(self.photo.width), float(self.photo.height)), self.name)

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


def nearest_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A copy of (height, width) pixels at another ``size``, each the nearest there is: labels stay labels."""
    return pixels[np.ix_(*(np.arange(side) * of // side for side, of in zip(size, pixels.shape, strict=True)))]


def image_of_unit(shown: Tensor, name: str = "") -> InputImage:
    """An image of a (channel, height, width) tensor whose values lie in [0, 1]; see :func:`three_channels`."""
    array = (three_channels(shown, 0).clamp(0, 1) * 255).round().to(uint8).permute(1, 2, 0).numpy()
    return InputImage(Image.fromarray(array), (0.0, 0.0, float(array.shape[1]), float(array.shape[0])), name)


def three_channels(values: Any, axis: int) -> Any:
    """Return an array or tensor of any number of channels as one to show.

    Three channels are shown as they are, of four the first three, one as grey, the mean of any other number as grey.
    """
    count = values.shape[axis]
    if count in (3, 4):
        return values.take(range(3), axis) if isinstance(values, np.ndarray) else values.narrow(axis, 0, 3)
    if isinstance(values, np.ndarray):
        return values.mean(axis, keepdims=True, dtype=np.float64).astype(values.dtype).repeat(3, axis)
    return values.mean(axis, keepdim=True).repeat_interleave(3, axis)


def on_white(photo: Image.Image) -> Image.Image:
    """Return a photo as RGB; what is transparent is laid on white."""
    if photo.mode in ("LA", "RGBA"):
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    return photo if photo.mode == "RGB" else photo.convert("RGB")

"""Conversion of photos to model input, with the same geometry as in each library, and of input back to an image."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitscope.errors import CallError, ImageError
from vitscope.images.arrays import MAX_PIXELS
from vitscope.images.channel_settings import require_finite, require_sides
from vitscope.images.image import InputImage, image_of_unit, on_white
from vitscope.images.reading import read_photo

MAX_SIDE = 2**14  # pixels of a model's input

# Pillow's mode of a photo by the model's number of channels.
PHOTO_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

Fit = Literal["squash", "crop"]


@dataclass(frozen=True)
class Preprocessing:
    """The conversion of a photo to a model's input, resized by Pillow as in transformers, timm and torchvision.

    The length of ``mean`` and ``std`` is the number of channels. Any photo fits a model with 3 channels (RGB) or 1
    (grey). A photo with transparency also fits 4 (RGBA) or 2 (grey and transparency). Models with any other number
    of channels take tensors only.

    Attributes:
        size: (height, width) of the model's input, in pixels.
        mean: mean of each channel, on the scale from 0 to 1.
        std: standard deviation of each channel, on the same scale.
        fit: ``"squash"`` resizes to ``resize_to`` without keeping the proportions; ``"crop"`` keeps them and covers
            ``resize_to``. In both cases a region of ``size`` is then cut out of the centre.
        resize_to: (height, width) before the centre is cut out, in pixels; None for ``size``.
        resample: Pillow's resampling filter.
        round_half_even: round the crop's corner to the nearest pixel, halves to even, as timm and torchvision do. If
            False, round down.
        source: where these settings come from, for display; ignored in comparisons.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    fit: Fit = "squash"
    resize_to: tuple[int, int] | None = None
    resample: Image.Resampling = Image.Resampling.BILINEAR
    round_half_even: bool = False
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # because the dataclass is frozen
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
            filters = ", ".join(f"{resample.value} ({resample.name.lower()})" for resample in Image.Resampling)
            raise CallError(f"resample is {self.resample!r}: choose one of Pillow's filters, {filters}") from None

    @property
    def channels(self) -> int:
        """The number of channels of the model's input."""
        return len(self.mean)

    @property
    def takes_transparency(self) -> bool:
        """Whether the last channel of the input is a photo's transparency."""
        return self.channels in (2, 4)

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and offset of each channel: input = byte · factor + offset."""
        mean, std = self._per_channel(self.mean).flatten(), self._per_channel(self.std).flatten()
        return 1 / (255 * std), -mean / std

    def as_json(self) -> dict[str, Any]:
        """Return the settings and their origin, as saved in the provenance of a result."""
        settings = {"size": list(self.size), "mean": list(self.mean), "std": list(self.std), "fit": self.fit}
        return {"source": self.source, **settings, "resample": self.resample.name.lower()}

    def resized(self, size: tuple[int, int]) -> "Preprocessing":
        """Return the same settings for another input size, (height, width); the crop keeps the same fraction."""
        target = self.resize_to or self.size
        resize_to = (round(target[0] * size[0] / self.size[0]), round(target[1] * size[1] / self.size[1]))
        return replace(self, size=size, resize_to=resize_to)

    def read(self, source: Any) -> tuple[Tensor, InputImage]:
        """Read an image with :func:`~vitscope.images.reading.read_photo` and return it as :meth:`__call__` does."""
        return self(*read_photo(source, alpha=self.takes_transparency))

    def read_batch(self, sources: Sequence[Any]) -> tuple[Tensor, list[InputImage]]:
        """Read images with :meth:`read` and return them as one batch, (batch, channel, height, width)."""
        pixels, images = zip(*(self.read(source) for source in sources), strict=True)
        return torch.stack(pixels), list(images)

    def __call__(self, photo: Image.Image, name: str = "") -> tuple[Tensor, InputImage]:
        """Return a photo as model input.

        Args:
            photo: upright RGB, or RGBA if it has transparency.
            name: path of the photo, for messages and the result.

        Returns:
            float32 (channel, height, width), and the photo with the region that became the input.

        Raises:
            CallError, ImageError: see :meth:`resize_and_crop`.
        """
        cut, image = self.resize_and_crop(photo, name)
        return self.normalized(torch.from_numpy(cut).permute(2, 0, 1)), image

    def resize_and_crop(self, photo: Image.Image, name: str = "") -> tuple[np.ndarray, InputImage]:
        """Resize and crop a photo, without normalization.

        Returns:
            uint8 (height, width, channel), and the photo with the region that became the input.

        Raises:
            CallError: the photo does not fit the number of channels.
            ImageError: the photo is too thin a strip for the crop.
        """
        height, width = self.size
        rgb, photo = on_white(photo), self._in_channels(photo)
        full_height, full_width = self._size_before_crop(photo.width, photo.height)
        if full_height * full_width > MAX_PIXELS:
            raise ImageError(
                f"{name or 'the image'} is {photo.width}×{photo.height} pixels, too thin a strip for a crop of "
                f"{height}×{width}: cut out the important region first"
            )
        resized = (
            photo if photo.size == (full_width, full_height) else photo.resize((full_width, full_height), self.resample)
        )
        top, left = self._crop_start(full_height - height), self._crop_start(full_width - width)
        cut = np.array(resized.crop((left, top, left + width, top + height)))
        scale_x, scale_y = photo.width / full_width, photo.height / full_height
        box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
        return cut.reshape(height, width, self.channels), InputImage(rgb, box, name)

    def normalized(self, cut: Tensor) -> Tensor:
        """Return bytes, (…, channel, height, width), as normalized float32 on the same device."""
        mean, std = (self._per_channel(values).to(cut.device) for values in (self.mean, self.std))
        return (cut.float() / 255 - mean) / std

    def image_of(self, pixels: Tensor, name: str = "") -> InputImage:
        """Return model input, (channel, height, width), as an image, for input that was not made from a photo."""
        unit = pixels.detach().float().cpu() * self._per_channel(self.std) + self._per_channel(self.mean)
        return image_of_unit(unit, name)

    def crop_corner_or_none(self, width: int, height: int) -> tuple[int, int] | None:
        """Return (top, left) of the crop in a photo of this size if it is not resized, otherwise None."""
        full_height, full_width = self._size_before_crop(width, height)
        if (full_height, full_width) != (height, width):
            return None
        return self._crop_start(height - self.size[0]), self._crop_start(width - self.size[1])

    def _in_channels(self, photo: Image.Image) -> Image.Image:
        """Return the photo in the mode of the model's channels; grey pixels keep their values."""
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

    def _size_before_crop(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) to which a photo of this size is resized before the centre is cut out."""
        full_height, full_width = self.resize_to or self.size
        if self.fit == "crop":
            # The libraries round the longer side down, but timm rounds it to the nearest if the input is not square.
            to_integer = round if self.round_half_even and full_height != full_width else int
            if height * full_width >= width * full_height:
                full_height = to_integer(full_width * height / width)
            else:
                full_width = to_integer(full_height * width / height)
        return full_height, full_width

    def _crop_start(self, excess: int) -> int:
        """Return where the crop starts if ``excess`` pixels are cut off; if negative, black padding is added."""
        if self.round_half_even:
            return round(excess / 2) if excess > 0 else -(-excess // 2)
        return excess // 2

    @staticmethod
    def _per_channel(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)

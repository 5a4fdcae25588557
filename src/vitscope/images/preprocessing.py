"""Photos to model input: one geometry for every library, and the way back from the model's view to the photo."""

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

MAX_SIDE = 2**14  # of a model's input

# The mode of a photo as a model of so many channels takes it.
PHOTO_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

Fit = Literal["squash", "crop"]


@dataclass(frozen=True)
class Preprocessing:
    """What a model wants of an image: one geometry for all three libraries, with Pillow's own resize.

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

    def read(self, source: Any) -> tuple[Tensor, InputImage]:
        """Return the input of one source, as :func:`read_photo` reads it, and the image that knows the way back."""
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

    def __call__(self, photo: Image.Image, name: str = "") -> tuple[Tensor, InputImage]:
        """The photo as (channel, height, width) float32, and the image that knows the way back."""
        cut, image = self.cut(photo, name)
        return self.normalized(torch.from_numpy(cut).permute(2, 0, 1)), image

    def normalized(self, cut: Tensor) -> Tensor:
        """Bytes (…, channel, height, width) as float32 input, on their device."""
        mean, std = (self._channels(values).to(cut.device) for values in (self.mean, self.std))
        return (cut.float() / 255 - mean) / std

    def cut(self, photo: Image.Image, name: str = "") -> tuple[np.ndarray, InputImage]:
        """The photo's bytes as the model sees them, (height, width, channel), and the image that knows the way back.

        Raises:
            CallError: a photo has no such number of channels.
            ImageError: a strip too thin for the crop.
        """
        height, width = self.size
        shown, photo = on_white(photo), self._in_channels(photo)
        fill_height, fill_width = self._filled(photo.width, photo.height)
        if fill_height * fill_width > MAX_PIXELS:
            raise ImageError(
                f"{name or 'the image'} is {photo.width}×{photo.height} pixels, too thin a strip for a crop of "
                f"{height}×{width}: cut out the part that matters first"
            )
        resized = (
            photo if photo.size == (fill_width, fill_height) else photo.resize((fill_width, fill_height), self.resample)
        )
        top, left = self._corner(fill_height - height), self._corner(fill_width - width)
        cut = np.array(resized.crop((left, top, left + width, top + height)))
        scale_x, scale_y = photo.width / fill_width, photo.height / fill_height
        box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
        return cut.reshape(height, width, self.channels), InputImage(shown, box, name)

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
        """Where the cut begins when ``room`` pixels are cut off; below zero the image is padded with black."""
        if self.round_half_even:
            return round(room / 2) if room > 0 else -(-room // 2)
        return room // 2

    def image_of(self, pixels: Tensor, name: str = "") -> InputImage:
        """An image to show for (channel, height, width) input that came without a photo."""
        shown = pixels.detach().float().cpu() * self._channels(self.std) + self._channels(self.mean)
        return image_of_unit(shown, name)

    @staticmethod
    def _channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)

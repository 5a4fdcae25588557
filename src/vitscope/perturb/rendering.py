"""Rendering of an image with hidden parts as a model's input."""

import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitscope.errors import CallError
from vitscope.images.image import InputImage, on_white
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import photos, read_photo
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import BASELINES, HideName, fill
from vitscope.perturb.masks import Masks
from vitscope.perturb.segments import Segments

# Photos with more pixels than this, and than twice the model's input, are perturbed on a smaller copy: the model would
# not see more detail anyway.
MAX_PERTURBED_PIXELS = 400_000


@dataclass(frozen=True, eq=False)
class Subject:
    """An image to perturb, and the model's input for the original.

    Attributes:
        values: (pixel height, pixel width, channel) in 0 … 255. A photo is RGB in bytes (RGBA for a model that takes
            transparency), whatever the channels of the input. A tensor has its own channels, in floating point.
        view: the photo, with the part that the model sees.
        pixels: the model's input for the original, (1, channel, height, width).
        scaling: (factor, offset) of each channel: ``values · factor + offset`` is the tensor. None for a photo.
    """

    values: np.ndarray
    view: InputImage
    pixels: Tensor
    scaling: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of :attr:`values`."""
        return self.values.shape[0], self.values.shape[1]


def subjects(model: VisionModel, images: Any) -> list[Subject]:
    """Return a subject for each image; ``images`` may be anything that :meth:`VisionModel.prepare` takes."""
    if isinstance(images, Tensor):
        pixels, views = model.prepare(images.detach())
        return [_subject_of_tensor(model, image, view) for image, view in zip(pixels, views, strict=True)]
    return [_subject_of_photo(model, source) for source in photos(images)]


def _subject_of_photo(model: VisionModel, source: Any) -> Subject:
    photo, name = read_photo(source, alpha=model.preprocessing is not None and model.preprocessing.takes_transparency)
    sides = (0, 0) if model.preprocessing is None else model.preprocessing.size
    max_pixels = max(MAX_PERTURBED_PIXELS, 2 * sides[0] * sides[1])
    copy, shrink = photo, (max_pixels / (photo.width * photo.height)) ** 0.5
    if shrink < 1:
        copy = photo.resize((round(photo.width * shrink), round(photo.height * shrink)), Image.Resampling.LANCZOS)
    pixels, (image,) = model.prepare(copy)
    across, down = photo.width / copy.width, photo.height / copy.height
    left, top, right, bottom = image.box
    view = InputImage(on_white(photo), (left * across, top * down, right * across, bottom * down), name)
    return Subject(np.asarray(copy), view, pixels)


def _subject_of_tensor(model: VisionModel, pixels: Tensor, image: InputImage) -> Subject:
    """Return a subject in floating point throughout, so that visible pixels are unchanged to the bit."""
    if model.preprocessing is not None:
        factor, offset = model.preprocessing.affine
    else:
        low, high = pixels.float().amin().cpu(), pixels.float().amax().cpu()
        factor, offset = ((high - low) / 255).expand(len(pixels)), low.expand(len(pixels))
    values = (pixels.float().cpu().permute(1, 2, 0) - offset) / factor.clamp_min(1e-12)
    return Subject(values.numpy(), image, pixels[None], (factor, offset))


class Renderer:
    """Renders the model's input for any mask.

    A photo that preprocessing resizes is perturbed before preprocessing, in bytes, so that the model gets the same
    input as for a file with these pixels. A photo that keeps its size is perturbed afterwards, on the model's device,
    with the same result.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        hide: Any,
        segments: Segments | None,
        seed: int,
        *,
        option: str = "hide",
        names: Sequence[str] = get_args(HideName),
    ) -> None:
        self._model, self._subject = model, subject
        self._filling = fill(subject.values, hide, segments, seed, option=option, names=names)
        self._input_region = self._input_region_or_none()
        if self._input_region is not None:
            self._filled = self._input_of(self._filling)

    def start(self, pool: Executor, masks: Masks, indices: Sequence[int]) -> "list[Future[Any]]":
        """Start rendering some of the masks in the threads of ``pool``."""
        return [pool.submit(self._render, masks, index) for index in indices]

    def finish(self, started: "list[Future[Any]]") -> Tensor:
        """Return the batch (batch, channel, height, width), in the model's dtype and on its device."""
        rendered, pixels = torch.stack([future.result() for future in started]), self._subject.pixels
        if self._input_region is None:
            return self._preprocessing().normalized(rendered.to(pixels.device).permute(0, 3, 1, 2)).to(pixels.dtype)
        visible = rendered.to(pixels.device)[:, None]
        if visible.dtype == torch.bool:
            return torch.where(visible, pixels, self._filled)
        return (self._filled + visible * (pixels.float() - self._filled.float())).to(pixels.dtype)

    def hidden(self) -> Tensor:
        """Return the input with everything hidden, (1, channel, height, width)."""
        return self._input_of(self._filling)

    def _render(self, masks: Masks, index: int) -> Tensor:
        """Return the visibility of the input's pixels, or the perturbed photo cut to the input's size."""
        visible = masks.visible(index)
        if self._input_region is not None:
            return torch.from_numpy(np.ascontiguousarray(visible[self._input_region]))
        photo, filling = self._subject.values, self._filling
        if visible.dtype == bool:
            mixed = np.where(visible[..., None], photo, filling)
        else:
            share = visible[..., None].astype(np.float32)
            mixed = (share * photo + (1 - share) * filling).round().astype(np.uint8)
        # Return bytes: a thread that computed with torch would start more threads and take cores from the model.
        return torch.from_numpy(self._preprocessing().resize_and_crop(Image.fromarray(mixed))[0])

    def _preprocessing(self) -> Preprocessing:
        assert self._model.preprocessing is not None, "a photo was preprocessed"
        return self._model.preprocessing

    def _input_region_or_none(self) -> tuple[slice, slice] | None:
        """Return the region of the image that becomes the input pixel for pixel, if there is one."""
        (height, width), pixels = self._subject.size, self._subject.pixels.shape[-2:]
        if self._subject.scaling is not None:
            return slice(None), slice(None)
        corner = self._preprocessing().crop_corner_or_none(width, height)
        if corner is None or min(corner) < 0 or corner[0] + pixels[0] > height or corner[1] + pixels[1] > width:
            return None
        return slice(corner[0], corner[0] + pixels[0]), slice(corner[1], corner[1] + pixels[1])

    def _input_of(self, values: np.ndarray) -> Tensor:
        """Return the model's input for an image of the subject's size."""
        pixels = self._subject.pixels
        if self._subject.scaling is None:
            return self._model.prepare(values)[0].to(pixels)
        factor, offset = self._subject.scaling
        return (torch.from_numpy(values) * factor + offset).permute(2, 0, 1)[None].to(pixels)


def baseline_pixels(model: VisionModel, inputs: Sequence[Subject], baseline: Any) -> list[Tensor]:
    """Return the model's input for the image without information that belongs to each image.

    Args:
        model: the model.
        inputs: the images.
        baseline: ``"mean"`` (of the image), ``"black"``, ``"grey"``, ``"blur"``, ``"noise"``, a colour, an image, or a
            preprocessed tensor of the same shape as the input, of one image or of all.

    Returns:
        one (1, channel, height, width) for each image.

    Raises:
        CallError: the baseline is none of these.
    """
    if isinstance(baseline, Tensor):
        image = tuple(inputs[0].pixels.shape[1:])
        shape = (len(inputs), *image)
        if tuple(baseline.shape) not in (shape, (1, *image), image):
            raise CallError(f"baseline has the shape {tuple(baseline.shape)}: {shape} is expected, as the input")
        return list(baseline.expand(shape).to(inputs[0].pixels)[:, None])
    if isinstance(baseline, str) and baseline == "drop":
        raise CallError(f"baseline is 'drop', which leaves no image: choose {', '.join(BASELINES)}")
    return [
        Renderer(model, subject, baseline, None, 0, option="baseline", names=BASELINES).hidden() for subject in inputs
    ]


def pool() -> ThreadPoolExecutor:
    """Return a thread pool that renders the next batch while the model runs on the current one."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="vitscope-render")

"""Images with hidden parts as a model's input: through the whole preprocessing, or at once where it only scales."""

import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitscope.images.image import InputImage, on_white
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import photos, read_photo
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import fill
from vitscope.perturb.masks import Masks
from vitscope.perturb.segments import Segments

# Larger photos are perturbed on a smaller copy, of this size or twice the model's input: more detail never reaches it.
MAX_PERTURBED_PIXELS = 400_000


@dataclass(frozen=True, eq=False)
class Subject:
    """The image that is perturbed, and the model's input of it unperturbed.

    ``values`` is (pixel height, pixel width, channel) in 0 … 255: the photo's bytes, RGB (RGBA for a model that takes
    transparency) whatever the channels of the input, or for a tensor its own channels in floating point.
    ``view`` is the photo with the part that the model sees. ``scaling`` says how values become the tensor they came
    from, ``values · factor + offset`` for each channel; None for a photo.
    """

    values: np.ndarray
    view: InputImage
    pixels: Tensor
    scaling: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]


def subjects(model: VisionModel, images: Any) -> list[Subject]:
    """Each image of what :meth:`VisionModel.prepare` takes."""
    if isinstance(images, Tensor):
        pixels, views = model.prepare(images.detach())
        return [_of_tensor(model, one, view) for one, view in zip(pixels, views, strict=True)]
    return [_of_photo(model, source) for source in photos(images)]


def _of_photo(model: VisionModel, source: Any) -> Subject:
    photo, name = read_photo(source, alpha=model.preprocessing is not None and model.preprocessing.takes_transparency)
    sides = (0, 0) if model.preprocessing is None else model.preprocessing.size
    most = max(MAX_PERTURBED_PIXELS, 2 * sides[0] * sides[1])
    copy, shrink = photo, (most / (photo.width * photo.height)) ** 0.5
    if shrink < 1:
        copy = photo.resize((round(photo.width * shrink), round(photo.height * shrink)), Image.Resampling.LANCZOS)
    pixels, (image,) = model.prepare(copy)
    across, down = photo.width / copy.width, photo.height / copy.height
    left, top, right, bottom = image.box
    view = InputImage(on_white(photo), (left * across, top * down, right * across, bottom * down), name)
    return Subject(np.asarray(copy), view, pixels)


def _of_tensor(model: VisionModel, pixels: Tensor, image: InputImage) -> Subject:
    """Floating point all the way: what is not hidden stays bit for bit."""
    if model.preprocessing is not None:
        factor, offset = model.preprocessing.affine
    else:
        low, high = pixels.float().amin().cpu(), pixels.float().amax().cpu()
        factor, offset = ((high - low) / 255).expand(len(pixels)), low.expand(len(pixels))
    shown = (pixels.float().cpu().permute(1, 2, 0) - offset) / factor.clamp_min(1e-12)
    return Subject(shown.numpy(), image, pixels[None], (factor, offset))


class Renderer:
    """Makes the model's input for any mask.

    A photo that is resized on its way is perturbed before, in bytes, so that the model gets what it would have got
    from the perturbed file. One that keeps its size is perturbed after, on the model's device, which is the same.
    """

    def __init__(self, model: VisionModel, subject: Subject, hide: Any, segments: Segments | None, seed: int) -> None:
        self._model, self._subject = model, subject
        self._filling = fill(subject.values, hide, segments, seed)
        self._after = self._cut()
        if self._after is not None:
            self._filled = self._input_of(self._filling)

    def start(self, pool: Executor, masks: Masks, at: Sequence[int]) -> "list[Future[Any]]":
        """Begin with a batch, in the pool's threads."""
        return [pool.submit(self._one, masks, i) for i in at]

    def finish(self, begun: "list[Future[Any]]") -> Tensor:
        """The batch (batch, channel, height, width), in the model's dtype and on its device."""
        parts, pixels = torch.stack([part.result() for part in begun]), self._subject.pixels
        if self._after is None:
            return self._recipe().normalized(parts.to(pixels.device).permute(0, 3, 1, 2)).to(pixels.dtype)
        visible = parts.to(pixels.device)[:, None]
        if visible.dtype == torch.bool:
            return torch.where(visible, pixels, self._filled)
        return (self._filled + visible * (pixels.float() - self._filled.float())).to(pixels.dtype)

    def _one(self, masks: Masks, at: int) -> Tensor:
        visible = masks.visible(at)
        if self._after is not None:
            return torch.from_numpy(np.ascontiguousarray(visible[self._after]))
        photo, filling = self._subject.values, self._filling
        if visible.dtype == bool:
            mixed = np.where(visible[..., None], photo, filling)
        else:
            share = visible[..., None].astype(np.float32)
            mixed = (share * photo + (1 - share) * filling).round().astype(np.uint8)
        # Bytes: a thread that computes with torch would bring threads of its own, which the model needs.
        return torch.from_numpy(self._recipe().cut(Image.fromarray(mixed))[0])

    def _recipe(self) -> Preprocessing:
        assert self._model.preprocessing is not None, "a photo was preprocessed"
        return self._model.preprocessing

    def _cut(self) -> tuple[slice, slice] | None:
        """The part of the image that is the model's input pixel for pixel, if one is."""
        (height, width), pixels = self._subject.size, self._subject.pixels.shape[-2:]
        if self._subject.scaling is not None:
            return slice(None), slice(None)
        box = self._recipe().corner_of_uncut(width, height)
        if box is None or min(box) < 0 or box[0] + pixels[0] > height or box[1] + pixels[1] > width:
            return None
        return slice(box[0], box[0] + pixels[0]), slice(box[1], box[1] + pixels[1])

    def _input_of(self, values: np.ndarray) -> Tensor:
        like = self._subject.pixels
        if self._subject.scaling is None:
            return self._model.prepare(values)[0].to(like)
        factor, offset = self._subject.scaling
        return (torch.from_numpy(values) * factor + offset).permute(2, 0, 1)[None].to(like)


def pool() -> ThreadPoolExecutor:
    """Threads that render the next batch while the model runs on this one."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="vitscope-render")

"""Predictions for edited images: one model's outputs for many edits of one image, and their rollouts."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitscope.compositing.stage import EditedImage, Stage
from vitscope.interventions.positions import Positions, neutral_positions
from vitscope.methods.rollout import rollout
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.batching import BatchedPredictor, Evaluations
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Subject
from vitscope.progress import ProgressCallback
from vitscope.tracing.capture import run_and_capture


class EditedImagePredictor(BatchedPredictor):
    """Evaluate a model on edited images, batch by batch; the next batch is rendered while the model is busy.

    Args:
        model: the model.
        subject: the image that is edited.
        model_positions: the position embeddings of the model; they are replaced for images with neutral positions.
        attention: keep the rollout of every edited image.
        options, report: see :class:`~vitscope.perturb.batching.BatchedPredictor`.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        model_positions: Positions,
        options: PerturbationOptions,
        *,
        attention: bool = False,
        report: ProgressCallback | None = None,
    ) -> None:
        super().__init__(model, subject, options, report=report)
        self._positions, self._attention = model_positions, attention
        self.rollouts: dict[int, Float[np.ndarray, "height width"]] = {}

    def predict(self, stage: Stage, edited_images: Sequence[EditedImage]) -> Evaluations:
        """Return the outputs (edited image, class), and fill :attr:`rollouts`.

        Raises:
            KeyboardInterrupt: Ctrl-C came before two images were evaluated; a later Ctrl-C ends the evaluation early.
            WorkError: an output is NaN or infinite, or there is not enough memory for a single image.
        """
        batches = []
        for neutral in (False, True):
            indices = [index for index, image in enumerate(edited_images) if image.neutral is neutral]
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]

        def start(threads: Any, indices: list[int]) -> Any:
            return [threads.submit(self._render, stage, edited_images[index]) for index in indices]

        def finish(indices: list[int], futures: Any) -> Tensor:
            pixels = self._pixels([future.result() for future in futures])
            neutral = edited_images[indices[0]].neutral
            with neutral_positions(self._positions) if neutral else nullcontext():
                return self._logits_and_rollouts(indices, pixels)

        return self._evaluate(len(edited_images), batches, start, finish, range(len(self.original)))

    def rollouts_of(self, count: int) -> Float[np.ndarray, "image height width"]:
        """Return the rollouts of the first ``count`` edited images, NaN for images that Ctrl-C left out."""
        blank = np.full_like(next(iter(self.rollouts.values())), np.nan)
        return np.stack([self.rollouts.get(index, blank) for index in range(count)])

    def _render(self, stage: Stage, edited_image: EditedImage) -> Tensor:
        """Return an edited image cropped for the model as bytes; if the input was a tensor, as values in 0 … 255."""
        values = stage.render(edited_image)
        if self.subject.scaling is not None:
            return torch.from_numpy(values)
        assert self.model.preprocessing is not None, "a photo was preprocessed"
        return torch.from_numpy(self.model.preprocessing.resize_and_crop(Image.fromarray(values))[0])

    def _pixels(self, rendered: Sequence[Tensor]) -> Tensor:
        """Return rendered images as a batch for the model, in its dtype and on its device."""
        original = self.subject.pixels
        values = torch.stack(list(rendered)).to(original.device)
        if self.subject.scaling is None:
            assert self.model.preprocessing is not None, "a photo was preprocessed"
            return self.model.preprocessing.normalized(values.permute(0, 3, 1, 2)).to(original.dtype)
        factor, offset = (coefficient.to(original.device) for coefficient in self.subject.scaling)
        changed = values != torch.from_numpy(self.subject.values).to(original.device)
        scaled = (values * factor + offset).permute(0, 3, 1, 2).to(original)
        # Unchanged values are taken from the original, bit for bit.
        return torch.where(changed.permute(0, 3, 1, 2), scaled, original)

    def _logits_and_rollouts(self, indices: list[int], pixels: Tensor) -> Tensor:
        """Return the logits or features of a batch, and keep its rollouts."""
        if not self._attention:
            return self._logits(pixels)
        capture = run_and_capture(self.model, pixels, fuse="mean", merge="equal", by_class=False)
        values = rollout(capture.trace).values.cpu().numpy()
        self.rollouts |= dict(zip(indices, values, strict=True))
        return self._logits(pixels) if self.features is not None or capture.logits is None else capture.logits

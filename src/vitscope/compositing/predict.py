"""Showing: one model's answers to composites of one image, and where it looked."""

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
from vitscope.perturb.options import Output, PerturbationOptions
from vitscope.perturb.rendering import Subject
from vitscope.progress import ProgressCallback
from vitscope.tracing.capture import run_and_capture


class EditedImagePredictor(BatchedPredictor):
    """Shows a model composites, batch by batch; the next batch is put together while the model looks at this one.

    Args:
        known: how the model knows places, for composites that are asked about with positions made equal.
        attention: keep the rollout of every composite.
        subject, output, batch_size, progress: see :class:`~vitscope.perturb.batching.BatchedPredictor`.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        known: Positions,
        *,
        attention: bool = False,
        output: Output = "probability",
        batch_size: int = 64,
        progress: ProgressCallback | None = None,
    ) -> None:
        super().__init__(model, subject, PerturbationOptions(output=output, batch_size=batch_size), report=progress)
        self._positions, self._attention = known, attention
        self.rollouts: dict[int, Float[np.ndarray, "height width"]] = {}

    def show(self, stage: Stage, composites: Sequence[EditedImage]) -> Evaluations:
        """The answers (composite, class), and on the way :attr:`rollouts`.

        Raises:
            KeyboardInterrupt: Ctrl-C before two composites were seen; later ones end the showing quietly.
            WorkError: NaN or infinity, or no memory for a single image.
        """
        batches = [
            kind[start : start + self.batch_size]
            for neutral in (False, True)
            if (kind := [at for at, one in enumerate(composites) if one.neutral is neutral])
            for start in range(0, len(kind), self.batch_size)
        ]

        def start(threads: Any, at: list[int]) -> Any:
            return [threads.submit(self._made, stage, composites[i]) for i in at]

        def finish(at: list[int], begun: Any) -> Tensor:
            pixels = self._pixels([part.result() for part in begun])
            with neutral_positions(self._positions) if composites[at[0]].neutral else nullcontext():
                return self._looked(at, pixels)

        return self._evaluate(len(composites), batches, start, finish, range(len(self.original)))

    def rollouts_of(self, count: int) -> Float[np.ndarray, "composite height width"]:
        """The rollouts of so many composites, NaN where Ctrl-C came first."""
        blank = np.full_like(next(iter(self.rollouts.values())), np.nan)
        return np.stack([self.rollouts.get(at, blank) for at in range(count)])

    def _made(self, stage: Stage, composite: EditedImage) -> Tensor:
        """What the model is given: bytes that are cut for it, or (for a tensor) values in 0 … 255."""
        values = stage.render(composite)
        if self.subject.scaling is not None:
            return torch.from_numpy(values)
        assert self.model.preprocessing is not None, "a photo was preprocessed"
        return torch.from_numpy(self.model.preprocessing.cut(Image.fromarray(values))[0])

    def _pixels(self, made: Sequence[Tensor]) -> Tensor:
        like = self.subject.pixels
        values = torch.stack(list(made)).to(like.device)
        if self.subject.scaling is None:
            assert self.model.preprocessing is not None, "a photo was preprocessed"
            return self.model.preprocessing.normalized(values.permute(0, 3, 1, 2)).to(like.dtype)
        factor, offset = (part.to(like.device) for part in self.subject.scaling)
        changed = values != torch.from_numpy(self.subject.values).to(like.device)
        # What is as it was stays bit for bit.
        return torch.where(changed.permute(0, 3, 1, 2), (values * factor + offset).permute(0, 3, 1, 2).to(like), like)

    def _looked(self, at: list[int], pixels: Tensor) -> Tensor:
        if not self._attention:
            return self._logits(pixels)
        seen = run_and_capture(self.model, pixels, fuse="mean", merge="equal", by_class=False)
        values = rollout(seen.trace).values.cpu().numpy()
        self.rollouts |= dict(zip(at, values, strict=True))
        return self._logits(pixels) if self.features is not None or seen.logits is None else seen.logits

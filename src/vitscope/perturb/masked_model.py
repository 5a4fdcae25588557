"""Evaluation of a model on one image with parts of it hidden."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vitscope.attention.windows import merged_grid
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.interventions.token_dropping import similar_batches, without_hidden
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import describe_hide
from vitscope.perturb.batching import BatchedPredictor, Evaluations
from vitscope.perturb.masks import Masks, SegmentMasks
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Renderer, Subject
from vitscope.perturb.segments import Segments, patch_points, segment
from vitscope.progress import ProgressCallback


class MaskedModel(BatchedPredictor):
    """A model as a function of masks over one image.

    Args:
        model, subject, report: see :class:`~vitscope.perturb.batching.BatchedPredictor`.
        options: ``hide`` says what replaces hidden pixels, see :func:`~vitscope.perturb.baselines.fill`. ``"drop"``
            removes the patches that are less than half visible, see
            :func:`~vitscope.interventions.token_dropping.without_hidden`.
        segments: see :func:`~vitscope.perturb.segments.segment`; None if masks consist of pixels.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        options: PerturbationOptions,
        *,
        segments: Any = None,
        report: ProgressCallback | None = None,
    ) -> None:
        super().__init__(model, subject, options, report=report)
        photo = np.asarray(subject.view.photo) if subject.scaling is None else subject.values
        self.segments: Segments | None = None
        if segments is not None:
            self.segments = segment(photo, segments, *cells_of(model, subject))
        self.parameters = {
            "segments": None if self.segments is None else self.segments.name,
            "hide": describe_hide(options.hide),
            "perturbed_at": list(subject.size),
        }
        self._points = None
        if isinstance(options.hide, str) and options.hide == "drop":
            self._logits_without = without_hidden(model, subject.pixels, self._logits)
            self._points = patch_points(subject.size, subject.view, self._require_grid())
        else:
            scaled = None if self.segments is None else self.segments.resized(subject.size)
            self._renderer = Renderer(model, subject, options.hide, scaled, options.seed)

    def masks(self, rows: Bool[np.ndarray, "mask segment"]) -> SegmentMasks:
        """Return rows over the segments (True: visible) as masks over the perturbed image."""
        return SegmentMasks(rows, self.require_segments().resized(self.subject.size))

    def require_segments(self) -> Segments:
        """Return the segments.

        Raises:
            CallError: the image was not divided into segments.
        """
        if self.segments is None:
            raise CallError("segments is None: pass quickshift, slic, patches, or labels as large as the image")
        return self.segments

    def evaluate(
        self,
        masks: Masks,
        columns: Sequence[int],
        *,
        stored: Sequence[int] = (),
        before: int = 0,
        total: int | None = None,
    ) -> Evaluations:
        """Evaluate the model on masks over the pixels of the subject, or on masks from :meth:`masks`.

        Args:
            masks: the masks.
            columns: the classes whose outputs are explained.
            stored: the classes of :attr:`Evaluations.class_outputs`; they may be infinite.
            before: number of masks evaluated in earlier calls, for the progress.
            total: number of masks in all calls, for the progress; by default the number of ``masks``.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before two masks were evaluated. After that, Ctrl-C ends the
                evaluation early without an error.
            WorkError: the output is NaN or infinity, or there is not enough memory for a single image.
        """
        return self._evaluate(
            len(masks),
            self._batches(masks),
            lambda threads, batch: None if self._points is not None else self._renderer.start(threads, masks, batch),
            self._run,
            columns,
            stored=stored,
            before=before,
            total=total,
        )

    def _batches(self, masks: Masks) -> Iterable[list[int]]:
        if self._points is None:
            return self._batches_in_order(len(masks))
        visible = masks.patch_shares(range(len(masks)), self._points) >= 0.5 - 1e-9
        self._visible_patches = torch.from_numpy(visible)
        return similar_batches(self.model, visible, self.batch_size)

    def _run(self, batch: list[int], ready: Any) -> Tensor:
        pixels = self.subject.pixels
        if self._points is not None:
            return self._logits_without(pixels, self._visible_patches[batch].to(pixels.device))
        return self._logits(self._renderer.finish(ready))

    def _require_grid(self) -> Grid:
        assert self.model.layout is not None, "without_hidden refuses a model without a layout"
        return self.model.layout.grid(*self.subject.pixels.shape[-2:])


def cells_of(model: VisionModel, subject: Subject) -> tuple[InputImage, Grid | None]:
    """Return the image with the region that the cells cover, and the grid of cells; None if it is unknown.

    The cells are the patches of a plain transformer, or the tokens of the last stage of a window transformer.
    """
    view = subject.view
    if model.layout is None:
        return view, None
    finest = model.layout.grid(*subject.pixels.shape[-2:])
    cells, hierarchy = Grid(finest.height, finest.width), model.layout.hierarchy
    merged = 0 if hierarchy is None else len(hierarchy.mergings) + len(hierarchy.downsampling)
    for _ in range(merged):
        cells = merged_grid(cells)
    # If a side is odd, the last tokens reach beyond the image.
    reach = (cells.height * 2**merged / finest.height, cells.width * 2**merged / finest.width)
    return view.top_left(*reach), cells

"""Inquiry: one image, one model, and what it answers when parts of the image are hidden."""

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
from vitscope.interventions.token_dropping import batches, without_hidden
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import described
from vitscope.perturb.batching import Answers, BatchedPredictor, Progress
from vitscope.perturb.masks import Masks, SegmentMasks
from vitscope.perturb.rendering import Renderer, Subject
from vitscope.perturb.segments import Segments, patch_points, segment


class MaskedModel(BatchedPredictor):
    """Asks a model about one image, again and again, with parts of it hidden.

    Args:
        subject, output, batch_size, progress: see :class:`~vitscope.perturb.batching.BatchedPredictor`.
        segments: see :func:`~vitscope.perturb.segments.segment`; None where masks are made of pixels.
        hide: what stands in the place of hidden parts, see :func:`~vitscope.perturb.baselines.fill`; ``"drop"`` takes
            patches away, see :func:`~vitscope.interventions.token_dropping.without_hidden`: those less than half shown.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        *,
        segments: Any = None,
        hide: Any = "mean",
        output: str = "probability",
        batch_size: int = 64,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(model, subject, output=output, batch_size=batch_size, progress=progress)
        photo = np.asarray(subject.view.photo) if subject.scaling is None else subject.values
        self.segments: Segments | None = None
        if segments is not None:
            self.segments = segment(photo, segments, *cells_of(model, subject))
        self.parameters = {
            "segments": None if self.segments is None else self.segments.name,
            "hide": described(hide),
            "perturbed_at": list(subject.size),
            "output": self.output,
        }
        self._points = None
        if isinstance(hide, str) and hide == "drop":
            self._answer_without = without_hidden(model, subject.pixels, self._logits)
            grid = self._require_grid()
            self._points = patch_points(subject.size, subject.view, grid)
        else:
            used = None if self.segments is None else self.segments.at(subject.size)
            self._renderer = Renderer(model, subject, hide, used, seed)

    def masks(self, rows: Bool[np.ndarray, "mask segment"]) -> SegmentMasks:
        """Rows of zeros and ones over the segments, as masks of the image that is perturbed."""
        return SegmentMasks(rows, self.require_segments().at(self.subject.size))

    def require_segments(self) -> Segments:
        """The segments, or a CallError where the image was cut into none."""
        if self.segments is None:
            raise CallError("segments is None: pass quickshift, slic, patches, or labels as large as the image")
        return self.segments

    def ask(self, masks: Masks, columns: Sequence[int], *, before: int = 0, total: int | None = None) -> Answers:
        """The model's answers to masks over the pixels of the subject, or from :meth:`masks`.

        Args and Raises: as for :meth:`~vitscope.perturb.batching.BatchedPredictor._ask`.
        """
        return self._ask(
            len(masks),
            self._batches(masks),
            lambda threads, at: None if self._points is not None else self._renderer.start(threads, masks, at),
            self._run,
            columns,
            before=before,
            total=total,
        )

    def _batches(self, masks: Masks) -> Iterable[list[int]]:
        if self._points is None:
            return self._in_order(len(masks))
        shown = masks.patch_shares(range(len(masks)), self._points) >= 0.5 - 1e-9
        self._shown = torch.from_numpy(shown)
        return batches(self.model, shown, self.batch_size)

    def _run(self, at: list[int], ready: Any) -> Tensor:
        pixels = self.subject.pixels
        if self._points is not None:
            return self._answer_without(pixels, self._shown[at].to(pixels.device))
        return self._logits(self._renderer.finish(ready))

    def _require_grid(self) -> Grid:
        assert self.model.layout is not None, "asked for after dropping was found to be possible"
        return self.model.layout.grid(*self.subject.pixels.shape[-2:])


def cells_of(model: VisionModel, subject: Subject) -> tuple[InputImage, Grid | None]:
    """The patches of a plain transformer, or the last stage's tokens of a window transformer; and where they lie."""
    view = subject.view
    if model.layout is None:
        return view, None
    finest = model.layout.grid(*subject.pixels.shape[-2:])
    cells, hierarchy = Grid(finest.height, finest.width), model.layout.hierarchy
    merged = 0 if hierarchy is None else len(hierarchy.mergings) + len(hierarchy.downsampling)
    for _ in range(merged):
        cells = merged_grid(cells)
    # Where a side is odd the last tokens reach beyond the image.
    reach = (cells.height * 2**merged / finest.height, cells.width * 2**merged / finest.width)
    return view.top_left(*reach), cells

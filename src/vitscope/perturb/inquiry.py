"""Inquiry: one picture, one model, and what it answers when parts of the picture are hidden."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitscope.arguments import at_least
from vitscope.attribution import only_finite
from vitscope.errors import CallError, WorkError, warn
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import described
from vitscope.perturb.dropping import batches, without_hidden
from vitscope.perturb.masks import Masks, SegmentMasks
from vitscope.perturb.rendering import Renderer, Subject, pool
from vitscope.perturb.segments import Segments, patch_points, segment
from vitscope.picture import Picture
from vitscope.target import class_index
from vitscope.windows import merged_grid

Output = Literal["probability", "logit"]
Progress = Callable[[int, int], None]  # questions answered, questions in all

SIMILARITY = "similarity"


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model said to a number of masks.

    Attributes:
        outputs: float64 (mask, class), NaN where the question was not asked.
        asked: which masks were.
        interrupted: Ctrl-C came before all of them were.
    """

    outputs: Float[np.ndarray, "mask label"]
    asked: Bool[np.ndarray, " mask"]
    interrupted: bool = False


class Inquiry:
    """Asks a model about one picture, again and again, with parts of it hidden.

    Memory is bounded: two batches of pictures are there at a time, whatever the number of questions. A batch for which
    there is no memory is halved, and so is every batch after it; a warning says so.

    Args:
        subject: the picture, from :func:`~vitscope.perturb.rendering.subjects`.
        segments: see :func:`~vitscope.perturb.segments.segment`; None where masks are made of pixels.
        hide: what stands in the place of hidden parts, see :func:`~vitscope.perturb.baselines.fill`; ``"drop"`` takes
            patches away, see :func:`~vitscope.perturb.dropping.without_hidden`: those less than half shown.
        output: what is asked for, a class's softmax ``"probability"`` or its ``"logit"``. A model without a classifier
            answers with the cosine between its features and those of the whole picture.
        batch_size: pictures to a forward, at most.
        progress: told of every batch.
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
        if output not in get_args(Output):
            raise CallError(f"unknown output {output!r}: choose {' or '.join(get_args(Output))}")
        self.batch_size = at_least(1, batch_size, "batch_size")
        self.model, self.subject, self._output, self._progress = model, subject, output, progress
        self.features: Tensor | None = None
        self.original = self._first()
        photo = np.asarray(subject.view.photo) if subject.scaling is None else subject.values
        self.segments: Segments | None = None
        if segments is not None:
            self.segments = segment(photo, segments, *cells_of(model, subject))
        self.parameters = {
            "segments": None if self.segments is None else self.segments.name,
            "hide": described(hide),
            "perturbed_at": list(subject.size),
            "output": SIMILARITY if self.features is not None else output,
        }
        self._points = None
        if isinstance(hide, str) and hide == "drop":
            self._answer_without = without_hidden(model, subject.pixels, self._logits)
            grid = self._known_grid()
            self._points = patch_points(subject.size, subject.view, grid)
        else:
            used = None if self.segments is None else self.segments.at(subject.size)
            self._renderer = Renderer(model, subject, hide, used, seed)

    def target(self, wanted: int | str | None) -> int:
        """The column of :attr:`original` that is explained: a class, the likeliest by default, or the similarity."""
        if self.features is not None:
            if wanted == SIMILARITY:
                return 0
            raise CallError(
                f"{self.model.name} has no classifier, so there is no class to explain: pass target='similarity' to "
                "explain how alike its features stay, or look at attention_map and rollout, which need no class"
            )
        if wanted is None:
            return int(self.original.argmax())
        return class_index(wanted, self.model.labels, len(self.original))

    def label(self, column: int) -> str:
        """The name of what a column explains."""
        return SIMILARITY if self.features is not None else self.model.label(column)

    def masks(self, rows: Bool[np.ndarray, "mask segment"]) -> SegmentMasks:
        """Rows of zeros and ones over the segments, as masks of the picture that is perturbed."""
        return SegmentMasks(rows, self.known_segments().at(self.subject.size))

    def known_segments(self) -> Segments:
        """The segments, or a CallError where the picture was cut into none."""
        if self.segments is None:
            raise CallError("segments is None: pass quickshift, slic, patches, or labels as large as the picture")
        return self.segments

    def likeliest(self, count: int) -> list[int]:
        """The columns with the highest answers to the whole picture, highest first."""
        return np.argsort(-self.original, kind="stable")[:count].tolist()

    def columns(self, wanted: int | str | None, others: int) -> list[int]:
        """The target's column, then those of so many of the likeliest classes."""
        return list(dict.fromkeys([self.target(wanted), *self.likeliest(others)]))

    def ask(self, masks: Masks, columns: Sequence[int], *, before: int = 0, total: int | None = None) -> Answers:
        """The model's answers to masks.

        Args:
            masks: over the pixels of the subject, or from :meth:`masks`.
            columns: the classes whose answers are kept.
            before, total: for the progress bar, if these questions are some of many.

        Raises:
            KeyboardInterrupt: Ctrl-C before two questions were answered; later ones end the asking quietly.
            WorkError: NaN or infinity, or no memory for a single picture.
        """
        outputs = np.full((len(masks), len(columns)), np.nan)
        asked = np.zeros(len(masks), dtype=bool)
        interrupted = False
        with pool() as threads:
            try:
                waiting, begun = self._batches(masks), None
                while waiting:
                    at = waiting.popleft()
                    ready = begun if begun is not None else self._begin(threads, masks, at)
                    begun = self._begin(threads, masks, waiting[0]) if waiting else None
                    try:
                        answers = self._outputs(self._run(at, ready))
                    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                        waiting, begun = self._smaller([at, *waiting], error), None
                        continue
                    outputs[at], asked[at] = answers[:, list(columns)], True
                    if self._progress is not None:
                        self._progress(before + int(asked.sum()), total or len(masks))
            except KeyboardInterrupt:
                if before + asked.sum() < 2:
                    raise
                interrupted = True
                threads.shutdown(wait=False, cancel_futures=True)
        return Answers(outputs, asked, interrupted)

    def _batches(self, masks: Masks) -> "deque[list[int]]":
        if self._points is None:
            starts = range(0, len(masks), self.batch_size)
            return deque(list(range(start, min(start + self.batch_size, len(masks)))) for start in starts)
        shown = masks.patch_shares(range(len(masks)), self._points) >= 0.5 - 1e-9
        self._shown = torch.from_numpy(shown)
        return deque(batches(self.model, shown, self.batch_size))

    def _begin(self, threads: Any, masks: Masks, at: list[int]) -> Any:
        return None if self._points is not None else self._renderer.start(threads, masks, at)

    def _run(self, at: list[int], ready: Any) -> Tensor:
        pixels = self.subject.pixels
        if self._points is not None:
            return self._answer_without(pixels, self._shown[at].to(pixels.device))
        return self._logits(self._renderer.finish(ready))

    def _logits(self, pixels: Tensor) -> Tensor:
        """(batch, class), or features (batch, channel) where there is no classifier."""
        with torch.no_grad(), self.model.running():
            return self.model.features(pixels) if self.features is not None else self._known(self.model.answer(pixels))

    def _first(self) -> Float[np.ndarray, " label"]:
        """The answer to the whole picture; says on the way whether there are classes."""
        with torch.no_grad(), self.model.running():
            logits = self.model.answer(self.subject.pixels)
            if logits is None:
                logits = self.features = self.model.features(self.subject.pixels)
        return self._outputs(logits)[0]

    def _known(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise WorkError(f"{self.model.name} answered with classes before and does not any more")
        return logits

    def _outputs(self, logits: Tensor) -> Float[np.ndarray, "mask label"]:
        logits = only_finite(logits.float(), f"the answer of {self.model.name}")
        if self.features is not None:
            outputs = torch.cosine_similarity(logits, self.features.float(), dim=-1)[:, None]
        else:
            outputs = logits.softmax(-1) if self._output == "probability" else logits
        return outputs.cpu().numpy().astype(np.float64)

    def _smaller(self, waiting: list[list[int]], error: BaseException) -> "deque[list[int]]":
        """All batches, none larger than half the first, if it was memory that was missing."""
        at = waiting[0]
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)):
            raise error
        if len(at) == 1:
            raise WorkError(f"there is no memory for one picture of {self.model.name}: take a smaller model or input")
        if self.subject.pixels.is_cuda:
            torch.cuda.empty_cache()
        self.batch_size = len(at) // 2
        warn(f"no memory for a batch of {len(at)}: going on with {self.batch_size}")
        most = self.batch_size
        return deque(batch[i : i + most] for batch in waiting for i in range(0, len(batch), most))

    def _known_grid(self) -> Grid:
        assert self.model.layout is not None, "asked for after dropping was found to be possible"
        return self.model.layout.grid(*self.subject.pixels.shape[-2:])


def cells_of(model: VisionModel, subject: Subject) -> tuple[Picture, Grid | None]:
    """The patches of a plain transformer, or the last stage's tokens of a window transformer; and where they lie."""
    view = subject.view
    if model.layout is None:
        return view, None
    finest = model.layout.grid(*subject.pixels.shape[-2:])
    cells, hierarchy = Grid(finest.height, finest.width), model.layout.hierarchy
    merged = 0 if hierarchy is None else len(hierarchy.mergings) + len(hierarchy.shrinking)
    for _ in range(merged):
        cells = merged_grid(cells)
    # Where a side is odd the last tokens reach beyond the picture.
    reach = (cells.height * 2**merged / finest.height, cells.width * 2**merged / finest.width)
    return view.top_left(*reach), cells

"""Evaluation of a model on variants of one image, batch by batch."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitscope.errors import WorkError, warn
from vitscope.models.evaluation import lacks_memory
from vitscope.models.targets import (
    CUSTOM,
    SIMILARITY,
    VALUE,
    ResolvedTarget,
    cosine,
    numbers_of_classes,
    resolve,
)
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Subject, pool
from vitscope.progress import Progress, ProgressCallback
from vitscope.results.samples import without_rounding
from vitscope.typing import ImageTarget
from vitscope.validation import require_finite_tensor

MAX_STORED = 20_000_000  # outputs of one image: 80 MB


@dataclass(frozen=True, eq=False)
class Evaluations:
    """A model's outputs for the variants of an image.

    Attributes:
        outputs: float64 (variant, class); NaN for variants that were not evaluated.
        evaluated: True for each variant that was evaluated.
        interrupted: whether Ctrl-C ended the evaluation early.
        class_outputs: float32 (variant, class), of the classes whose outputs are stored, as the model returned them.
    """

    outputs: Float[np.ndarray, "variant label"]
    evaluated: Bool[np.ndarray, " variant"]
    interrupted: bool
    class_outputs: Float[np.ndarray, "variant stored"]


class BatchedPredictor:
    """One model and one image: the output for the original, the classes, and the loop over batches of variants.

    The outputs have a column for each class, or a single one for the similarity if the model has no classifier. A
    target that is neither, such as a contrast, adds a column of its own.

    Memory is bounded: at most two batches of images are held at a time, whatever the number of variants. If there is
    not enough memory for a batch, that batch and all later ones are halved, with a warning.

    Args:
        model: the model to evaluate.
        subject: the image, from :func:`~vitscope.perturb.rendering.subjects`.
        options: the output to evaluate and the batch size. If the model has no classifier, the output is the cosine
            similarity between its features of a variant and those of the original.
        report: progress callback, called after each batch.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        options: PerturbationOptions,
        *,
        report: ProgressCallback | None = None,
    ) -> None:
        self.batch_size = options.batch_size
        self.model, self.subject, self._output, self._report = model, subject, options.output, report
        self.features: Tensor | None = None
        self._targets: list[ResolvedTarget] = []
        self._original_output = self._evaluate_original()
        self.original = self._outputs(self._original_output)[0]
        self.num_classes = len(self.original)
        self._names = (SIMILARITY,) if self.features is not None else model.names(self.num_classes)

    @property
    def output(self) -> str:
        """The kind of the classes' outputs: that of the options, value (of a regression) or similarity."""
        if self.features is not None:
            return SIMILARITY
        return VALUE if self.model.meaning == VALUE else self._output

    def output_of(self, column: int) -> str:
        """Return the kind of the output in a column: :attr:`output`, similarity, or custom for a function."""
        return self.output if column < self.num_classes else self._targets[column - self.num_classes].output

    def target(self, target: ImageTarget | None) -> int:
        """Return the column of :attr:`original` to explain; a target that has none gets a new one.

        Raises:
            CallError: the target does not fit the model.
            WorkError: its number is NaN or infinity.
        """
        names = None if self.features is not None else self._names
        resolved = resolve(self.model, target, names, self.top(1)[0], self._output, self._similarity)
        if len(resolved.classes) == 1:
            return resolved.classes[0]
        if resolved.label == SIMILARITY and resolved.output == SIMILARITY:
            return 0
        self._targets.append(resolved)
        self.original = self._outputs(self._original_output)[0]
        return len(self.original) - 1

    def label(self, column: int) -> str:
        """Return the name of the output in a column, such as a class, the similarity or a contrast."""
        return self._names[column] if column < self.num_classes else self._targets[column - self.num_classes].label

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of all classes."""
        return self._names

    def class_index(self, column: int) -> int | None:
        """Return the index of the class in a column; None if the column is a target of its own."""
        return column if column < self.num_classes else None

    def top(self, count: int) -> list[int]:
        """Return the columns of the classes with the highest outputs for the original image, highest first."""
        return np.argsort(-self.original[: self.num_classes], kind="stable")[:count].tolist()

    def columns(self, target: ImageTarget | None, top_labels: int) -> list[int]:
        """Return the target's column, followed by those of the ``top_labels`` most probable classes."""
        return list(dict.fromkeys([self.target(target), *self.top(top_labels)]))

    def stored_classes(self, count: int) -> list[int]:
        """Return the columns of the classes whose outputs for ``count`` variants are stored, the most probable first.

        These are all classes, unless their outputs would be more than :data:`MAX_STORED` numbers.
        """
        return self.top(max(MAX_STORED // count, 1))

    def _evaluate(
        self,
        count: int,
        batches: Iterable[list[int]],
        start: Callable[[Any, list[int]], Any],
        finish: Callable[[list[int], Any], Tensor],
        columns: Sequence[int],
        *,
        stored: Sequence[int] = (),
        before: int = 0,
        total: int | None = None,
    ) -> Evaluations:
        """Evaluate ``count`` variants and return their outputs.

        Args:
            count: number of variants.
            batches: indices of the variants, grouped into batches.
            start: a function that starts to prepare a batch in a thread pool, while the model runs on the previous one.
            finish: a function that turns the result of ``start`` into the model's output, (batch, class) or features.
            columns: the classes whose outputs are explained.
            stored: the classes of :attr:`Evaluations.class_outputs`; they may be infinite.
            before: number of variants evaluated in earlier calls, for the progress.
            total: number of variants in all calls, for the progress; by default ``count``.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before two variants were evaluated. After that, Ctrl-C ends the
                evaluation early without an error.
            WorkError: the output is NaN or infinity, or there is not enough memory for a single image.
        """
        outputs = np.full((count, len(columns)), np.nan)
        class_outputs = np.full((count, len(stored)), np.nan, dtype=np.float32)
        evaluated = np.zeros(count, dtype=bool)
        interrupted = False
        with pool() as threads:
            try:
                pending, started = deque(batches), None
                while pending:
                    batch = pending.popleft()
                    ready = started if started is not None else start(threads, batch)
                    started = start(threads, pending[0]) if pending else None
                    try:
                        all_outputs = self._outputs(finish(batch, ready))
                    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                        pending, started = self._halve_batches([batch, *pending], error), None
                        continue
                    outputs[batch] = self._require_finite(all_outputs[:, list(columns)])
                    class_outputs[batch], evaluated[batch] = all_outputs[:, list(stored)], True
                    if self._report is not None:
                        self._report(Progress("evaluating", before + int(evaluated.sum()), total or count))
            except KeyboardInterrupt:
                if before + evaluated.sum() < 2:
                    raise
                interrupted = True
                threads.shutdown(wait=False, cancel_futures=True)
        for position, column in enumerate(columns):
            values = without_rounding(outputs[evaluated, position], self.original[column], self._magnitude(column))
            outputs[evaluated, position] = values
        return Evaluations(outputs, evaluated, interrupted, class_outputs)

    def _batches_in_order(self, count: int) -> Iterable[list[int]]:
        """Split the indices of ``count`` variants into batches."""
        return (list(range(start, min(start + self.batch_size, count))) for start in range(0, count, self.batch_size))

    def _logits(self, pixels: Tensor) -> Tensor:
        """Return (batch, class), or features (batch, channel) if the model has no classifier."""
        with torch.no_grad(), self.model.running():
            if self.features is not None:
                return self.model.features(pixels)
            return self._require_logits(self.model.logits(pixels))

    def _evaluate_original(self) -> Tensor:
        """Return the model's output for the original image. If the model has no classes, keep its features."""
        with torch.no_grad(), self.model.running():
            logits = self.model.logits(self.subject.pixels)
            if logits is None:
                logits = self.features = self.model.features(self.subject.pixels)
        return logits

    def _similarity(self, output: Tensor) -> Float[Tensor, " variant"]:
        """Return the cosine similarity of features to those of the original."""
        assert self.features is not None, "only a model without classes has a similarity"
        return cosine(output, self.features)

    def _magnitude(self, column: int) -> float:
        """Return the magnitude to which the rounding of a column is relative: for a contrast, that of its classes."""
        extra = column - self.num_classes
        classes = self._targets[extra].classes if extra >= 0 else ()
        return float(np.abs(self.original[list(classes) or [column]]).max())

    def warn_if_constant(self, evaluations: Evaluations, column: int) -> bool:
        """Warn if the output for a class is the same for all masks, and return whether it is."""
        outputs = evaluations.outputs[evaluations.evaluated, 0]
        constant = len(outputs) > 1 and bool((outputs == self.original[column]).all())
        if constant:
            output = self.output_of(column)
            noun, advice = VALUE if output == CUSTOM else output, ""
            if output == "probability":
                advice = ": explain output='logit'"
            warn(
                f"the {noun} of {self.label(column)!r} stays {self.original[column]:.6g} for all "
                f"{len(outputs)} masks, so the map shows nothing{advice}"
            )
        return constant

    def _require_logits(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise WorkError(f"{self.model.name} returned classes for the original image, but none for a perturbed one")
        return logits

    def _outputs(self, output: Tensor) -> Float[np.ndarray, "variant label"]:
        """Turn logits or features into the outputs to explain: the classes, then the other targets."""
        finite = require_finite_tensor(output.float(), f"the output of {self.model.name}")
        if self.features is not None:
            numbers = self._similarity(finite)[:, None]
        else:
            numbers = numbers_of_classes(self.model, finite, self.output)
        columns = [numbers.cpu().double()]
        for target in self._targets:
            values = target.values(output, columns[0]).detach().cpu().double()
            columns.append(require_finite_tensor(values, f"the {target.output} of {target.label!r}")[:, None])
        return torch.cat(columns, dim=1).numpy()

    def _require_finite(self, outputs: Float[np.ndarray, "variant label"]) -> Float[np.ndarray, "variant label"]:
        if not np.isfinite(outputs).all():
            raise WorkError(
                f"the {self.output} of a class is infinite, because {self.model.name} gives it a probability of "
                "exactly 0 or 1: pass output='probability'"
            )
        return outputs

    def _halve_batches(self, pending: list[list[int]], error: BaseException) -> "deque[list[int]]":
        """Split all batches to half the size of the first, or raise ``error`` if it is not caused by lack of memory."""
        size = len(pending[0])
        if not lacks_memory(error):
            raise error
        if size == 1:
            raise WorkError(
                f"not enough memory to run {self.model.name} on a single image: use a smaller model or image size"
            )
        if self.subject.pixels.is_cuda:
            torch.cuda.empty_cache()
        self.batch_size = half = size // 2
        warn(f"not enough memory for a batch of {size}: continuing with {half}")
        return deque(batch[i : i + half] for batch in pending for i in range(0, len(batch), half))

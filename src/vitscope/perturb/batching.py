"""Evaluation of a model on variants of one image, batch by batch."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitscope.errors import CallError, WorkError, warn
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Subject, pool
from vitscope.progress import Progress, ProgressCallback
from vitscope.validation import require_class_index, require_finite_tensor

SIMILARITY = "similarity"
VALUE = "value"
# Outputs that differ by no more than this share of their magnitude are equal: batch sizes differ in their rounding.
ROUNDING_SHARE = 2e-6


@dataclass(frozen=True, eq=False)
class Evaluations:
    """A model's outputs for the variants of an image.

    Attributes:
        outputs: float64 (variant, class); NaN for variants that were not evaluated.
        evaluated: True for each variant that was evaluated.
        interrupted: whether Ctrl-C ended the evaluation early.
    """

    outputs: Float[np.ndarray, "variant label"]
    evaluated: Bool[np.ndarray, " variant"]
    interrupted: bool = False


class BatchedPredictor:
    """One model and one image: the output for the original, the classes, and the loop over batches of variants.

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
        self.original = self._evaluate_original()

    @property
    def output(self) -> str:
        """The kind of the outputs: probability, logit, value (of a regression) or similarity."""
        if self.features is not None:
            return SIMILARITY
        return VALUE if self.model.meaning == VALUE else self._output

    def target(self, target: int | str | None) -> int:
        """Return the column of :attr:`original` to explain: a class, by default the most probable, or the similarity.

        Raises:
            CallError: the model has no such class, or has no classifier and ``target`` is not ``"similarity"``.
        """
        if self.features is not None:
            if target == SIMILARITY:
                return 0
            raise CallError(
                f"{self.model.name} has no classifier, so there is no class to explain: pass target='similarity' to "
                "explain the similarity of its features, add a classifier from examples "
                "(vitscope.few_shot_classifier), or use attention_map or rollout, which need no class"
            )
        if target is None:
            return int(self.original.argmax())
        return require_class_index(target, self._names, len(self.original))

    def label(self, column: int) -> str:
        """Return the name of the output in a column: a class, or the similarity."""
        return SIMILARITY if self.features is not None else self._names[column]

    def top(self, count: int) -> list[int]:
        """Return the columns with the highest outputs for the original image, highest first."""
        return np.argsort(-self.original, kind="stable")[:count].tolist()

    def columns(self, target: int | str | None, top_labels: int) -> list[int]:
        """Return the target's column, followed by those of the ``top_labels`` most probable classes."""
        return list(dict.fromkeys([self.target(target), *self.top(top_labels)]))

    def _evaluate(
        self,
        count: int,
        batches: Iterable[list[int]],
        start: Callable[[Any, list[int]], Any],
        finish: Callable[[list[int], Any], Tensor],
        columns: Sequence[int],
        *,
        before: int = 0,
        total: int | None = None,
    ) -> Evaluations:
        """Evaluate ``count`` variants and return their outputs.

        Args:
            count: number of variants.
            batches: indices of the variants, grouped into batches.
            start: a function that starts to prepare a batch in a thread pool, while the model runs on the previous one.
            finish: a function that turns the result of ``start`` into the model's output, (batch, class) or features.
            columns: the classes whose outputs are kept.
            before: number of variants evaluated in earlier calls, for the progress.
            total: number of variants in all calls, for the progress; by default ``count``.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed before two variants were evaluated. After that, Ctrl-C ends the
                evaluation early without an error.
            WorkError: the output is NaN or infinity, or there is not enough memory for a single image.
        """
        outputs = np.full((count, len(columns)), np.nan)
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
                        batch_outputs = self._outputs(finish(batch, ready))
                    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                        pending, started = self._halve_batches([batch, *pending], error), None
                        continue
                    outputs[batch], evaluated[batch] = batch_outputs[:, list(columns)], True
                    if self._report is not None:
                        self._report(Progress("evaluating", before + int(evaluated.sum()), total or count))
            except KeyboardInterrupt:
                if before + evaluated.sum() < 2:
                    raise
                interrupted = True
                threads.shutdown(wait=False, cancel_futures=True)
        self._remove_rounding(outputs, columns)
        return Evaluations(outputs, evaluated, interrupted)

    def _batches_in_order(self, count: int) -> Iterable[list[int]]:
        """Split the indices of ``count`` variants into batches."""
        return (list(range(start, min(start + self.batch_size, count))) for start in range(0, count, self.batch_size))

    def _logits(self, pixels: Tensor) -> Tensor:
        """Return (batch, class), or features (batch, channel) if the model has no classifier."""
        with torch.no_grad(), self.model.running():
            if self.features is not None:
                return self.model.features(pixels)
            return self._require_logits(self.model.logits(pixels))

    def _evaluate_original(self) -> Float[np.ndarray, " label"]:
        """Return the output for the original image. If the model has no classes, keep its features."""
        with torch.no_grad(), self.model.running():
            logits = self.model.logits(self.subject.pixels)
            if logits is None:
                logits = self.features = self.model.features(self.subject.pixels)
        original = self._outputs(logits)[0]
        self._names = (SIMILARITY,) if self.features is not None else self.model.names(len(original))
        return original

    def _remove_rounding(self, outputs: Float[np.ndarray, "variant label"], columns: Sequence[int]) -> None:
        """Replace a column by the output for the original image if it differs from that only by rounding.

        The output of a saturated sigmoid or softmax is the same whatever is hidden, and its last bits explain nothing.
        """
        for position, column in enumerate(columns):
            values = outputs[np.isfinite(outputs[:, position]), position]
            original = self.original[column]
            if len(values) and np.abs(values - original).max() <= ROUNDING_SHARE * abs(original):
                outputs[np.isfinite(outputs[:, position]), position] = original

    def warn_if_constant(self, evaluations: Evaluations, column: int) -> bool:
        """Warn if the output for a class is the same for all masks, and return whether it is."""
        outputs = evaluations.outputs[evaluations.evaluated, 0]
        constant = len(outputs) > 1 and bool((outputs == self.original[column]).all())
        if constant:
            advice = ": explain output='logit'" if self.output == "probability" else ""
            warn(
                f"the {self.output} of {self.label(column)!r} stays {self.original[column]:.6g} for all "
                f"{len(outputs)} masks, so the map shows nothing{advice}"
            )
        return constant

    def _require_logits(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise WorkError(f"{self.model.name} returned classes for the original image, but none for a perturbed one")
        return logits

    def _outputs(self, logits: Tensor) -> Float[np.ndarray, "variant label"]:
        """Turn logits or features into the outputs to explain."""
        logits = require_finite_tensor(logits.float(), f"the output of {self.model.name}")
        if self.features is not None:
            outputs = torch.cosine_similarity(logits, self.features.float(), dim=-1)[:, None]
        else:
            chosen = self.model.probabilities(logits) if self.output == "probability" else logits
            assert chosen is not None, "a regression is explained by its value"
            if self.output == "logit" and self.model.meaning == "probabilities":
                raise CallError(f"{self.model.name} gives probabilities, not logits: pass output='probability'")
            outputs = chosen
        return outputs.cpu().numpy().astype(np.float64)

    def _halve_batches(self, pending: list[list[int]], error: BaseException) -> "deque[list[int]]":
        """Split all batches to half the size of the first, or raise ``error`` if it is not caused by lack of memory."""
        size = len(pending[0])
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)):
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

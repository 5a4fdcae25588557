"""Asker: one image, one model, and its answers to variants of the image, batch by batch."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitscope.errors import CallError, WorkError, warn
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.rendering import Subject, pool
from vitscope.validation import at_least, class_index, only_finite

Output = Literal["probability", "logit"]
Progress = Callable[[int, int], None]  # questions answered, questions in all

SIMILARITY = "similarity"
VALUE = "value"
# Answers that differ by no more than this share of their size are one answer, rounded in batches of other sizes.
ROUNDING_SHARE = 2e-6


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model said to a number of questions.

    Attributes:
        outputs: float64 (question, class), NaN where the question was not asked.
        asked: which questions were.
        interrupted: Ctrl-C came before all of them were.
    """

    outputs: Float[np.ndarray, "question label"]
    asked: Bool[np.ndarray, " question"]
    interrupted: bool = False


class BatchedPredictor:
    """The answer to the whole image, what may be asked for, and the loop over batches of variants.

    Memory is bounded: two batches of images are there at a time, whatever the number of questions. A batch for which
    there is no memory is halved, and so is every batch after it; a warning says so.

    Args:
        subject: the image, from :func:`~vitscope.perturb.rendering.subjects`.
        output: what is asked for, a class's softmax ``"probability"`` or its ``"logit"``. A model without a classifier
            answers with the cosine between its features and those of the whole image.
        batch_size: images to a forward, at most.
        progress: told of every batch.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        *,
        output: str = "probability",
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> None:
        if output not in get_args(Output):
            raise CallError(f"unknown output {output!r}: choose {' or '.join(get_args(Output))}")
        self.batch_size = at_least(1, batch_size, "batch_size")
        self.model, self.subject, self._output, self._progress = model, subject, output, progress
        self.features: Tensor | None = None
        self.original = self._first()

    @property
    def output(self) -> str:
        """What the answers are: probability, logit, value (of a regression) or similarity."""
        if self.features is not None:
            return SIMILARITY
        return VALUE if self.model.meaning == VALUE else self._output

    def target(self, wanted: int | str | None) -> int:
        """The column of :attr:`original` that is explained: a class, the likeliest by default, or the similarity."""
        if self.features is not None:
            if wanted == SIMILARITY:
                return 0
            raise CallError(
                f"{self.model.name} has no classifier, so there is no class to explain: pass target='similarity' to "
                "explain how alike its features stay, give it classes by examples (vitscope.few_shot_classifier), or "
                "look at attention_map and rollout, which need no class"
            )
        if wanted is None:
            return int(self.original.argmax())
        return class_index(wanted, self._names, len(self.original))

    def label(self, column: int) -> str:
        """The name of what a column explains."""
        return SIMILARITY if self.features is not None else self._names[column]

    def likeliest(self, count: int) -> list[int]:
        """The columns with the highest answers to the whole image, highest first."""
        return np.argsort(-self.original, kind="stable")[:count].tolist()

    def columns(self, wanted: int | str | None, others: int) -> list[int]:
        """The target's column, then those of so many of the likeliest classes."""
        return list(dict.fromkeys([self.target(wanted), *self.likeliest(others)]))

    def _ask(
        self,
        count: int,
        batches: Iterable[list[int]],
        start: Callable[[Any, list[int]], Any],
        finish: Callable[[list[int], Any], Tensor],
        columns: Sequence[int],
        *,
        before: int = 0,
        total: int | None = None,
    ) -> Answers:
        """The answers to ``count`` questions.

        Args:
            batches: the questions' numbers, together as they are asked.
            start: begins with a batch in the threads of a pool, while the model is busy with the one before.
            finish: what the model says, (batch, class) or features, of what ``start`` returned.
            columns: the classes whose answers are kept.
            before, total: for the progress bar, if these questions are some of many.

        Raises:
            KeyboardInterrupt: Ctrl-C before two questions were answered; later ones end the asking quietly.
            WorkError: NaN or infinity, or no memory for a single image.
        """
        outputs = np.full((count, len(columns)), np.nan)
        asked = np.zeros(count, dtype=bool)
        interrupted = False
        with pool() as threads:
            try:
                waiting, begun = deque(batches), None
                while waiting:
                    at = waiting.popleft()
                    ready = begun if begun is not None else start(threads, at)
                    begun = start(threads, waiting[0]) if waiting else None
                    try:
                        answers = self._outputs(finish(at, ready))
                    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                        waiting, begun = self._smaller([at, *waiting], error), None
                        continue
                    outputs[at], asked[at] = answers[:, list(columns)], True
                    if self._progress is not None:
                        self._progress(before + int(asked.sum()), total or count)
            except KeyboardInterrupt:
                if before + asked.sum() < 2:
                    raise
                interrupted = True
                threads.shutdown(wait=False, cancel_futures=True)
        self._without_noise(outputs, columns)
        return Answers(outputs, asked, interrupted)

    def _in_order(self, count: int) -> Iterable[list[int]]:
        """Batches of as many questions as may be asked at a time."""
        return (list(range(start, min(start + self.batch_size, count))) for start in range(0, count, self.batch_size))

    def _logits(self, pixels: Tensor) -> Tensor:
        """(batch, class), or features (batch, channel) where there is no classifier."""
        with torch.no_grad(), self.model.running():
            return self.model.features(pixels) if self.features is not None else self._known(self.model.answer(pixels))

    def _first(self) -> Float[np.ndarray, " label"]:
        """The answer to the whole image; says on the way whether there are classes."""
        with torch.no_grad(), self.model.running():
            logits = self.model.answer(self.subject.pixels)
            if logits is None:
                logits = self.features = self.model.features(self.subject.pixels)
        original = self._outputs(logits)[0]
        self._names = (SIMILARITY,) if self.features is not None else self.model.names(len(original))
        return original

    def _without_noise(self, outputs: Float[np.ndarray, "question label"], columns: Sequence[int]) -> None:
        """Put the answer to the whole image in place of answers that differ from it by rounding alone.

        A saturated sigmoid or softmax answers the same whatever is hidden; its last bits are no explanation.
        """
        for place, column in enumerate(columns):
            answers = outputs[np.isfinite(outputs[:, place]), place]
            original = self.original[column]
            if len(answers) and np.abs(answers - original).max() <= ROUNDING_SHARE * abs(original):
                outputs[np.isfinite(outputs[:, place]), place] = original

    def warn_if_constant(self, answers: Answers, column: int) -> bool:
        """Say that the answers for a class never changed, so that there is nothing to explain; True if so."""
        outputs = answers.outputs[answers.asked, 0]
        constant = len(outputs) > 1 and bool((outputs == self.original[column]).all())
        if constant:
            advice = ": explain output='logit'" if self.output == "probability" else ""
            warn(
                f"the {self.output} of {self.label(column)!r} stays {self.original[column]:.6g} with all of "
                f"{len(outputs)} masks, so the map shows nothing{advice}"
            )
        return constant

    def _known(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise WorkError(f"{self.model.name} answered with classes before and does not any more")
        return logits

    def _outputs(self, logits: Tensor) -> Float[np.ndarray, "question label"]:
        logits = only_finite(logits.float(), f"the answer of {self.model.name}")
        if self.features is not None:
            outputs = torch.cosine_similarity(logits, self.features.float(), dim=-1)[:, None]
        else:
            chances = self.model.probabilities(logits) if self.output == "probability" else logits
            assert chances is not None, "a regression is asked for its value"
            if self.output == "logit" and self.model.meaning == "probabilities":
                raise CallError(f"{self.model.name} gives probabilities, not logits: pass output='probability'")
            outputs = chances
        return outputs.cpu().numpy().astype(np.float64)

    def _smaller(self, waiting: list[list[int]], error: BaseException) -> "deque[list[int]]":
        """All batches, none larger than half the first, if it was memory that was missing."""
        at = waiting[0]
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)):
            raise error
        if len(at) == 1:
            raise WorkError(f"there is no memory for one image of {self.model.name}: take a smaller model or input")
        if self.subject.pixels.is_cuda:
            torch.cuda.empty_cache()
        self.batch_size = len(at) // 2
        warn(f"no memory for a batch of {len(at)}: going on with {self.batch_size}")
        most = self.batch_size
        return deque(batch[i : i + most] for batch in waiting for i in range(0, len(batch), most))

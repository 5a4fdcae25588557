"""Targets: the number of each image that a method explains, computed from the output of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitscope.errors import CallError
from vitscope.models.vision_model import VisionModel
from vitscope.validation import require_class_index

ScoreOutput = Literal["logit", "log_odds", "probability", "log_probability"]
SIMILARITY = "similarity"


@dataclass(frozen=True, eq=False)
class Score:
    """The score of a batch: one number per image, with the meaning of each.

    Attributes:
        values: (batch,), attached to the graph of the output.
        labels: what the score of each image is, such as "boxer" or "boxer − bull mastiff".
        output: meaning of the numbers: ``"logit"``, ``"log_odds"``, ``"probability"``, ``"log_probability"``,
            ``"value"``, ``"similarity"`` or ``"custom"``.
    """

    values: Float[Tensor, " batch"]
    labels: Sequence[str]
    output: str

    @property
    def label(self) -> str | None:
        """The label that all images share; None if they differ."""
        return self.labels[0] if len(set(self.labels)) == 1 else None


def score(model: VisionModel, output: Tensor, has_classes: bool, target: Any, kind: ScoreOutput = "logit") -> Score:
    """Return the score of each image.

    Args:
        model: the model.
        output: its logits (batch, class) or features (batch, channel).
        has_classes: whether the output is logits.
        target: None for the most probable class of each image; an index or label; a list with one of these per image;
            a tuple of two for a contrast, the first logit minus the second; a function of the output that returns
            (batch,); or ``"similarity"`` for a model without classes.
        kind: the number to explain: the logit, the log-odds against all other classes, the probability or its
            logarithm.

    Raises:
        CallError: the target does not fit the model or the batch, or the kind is unknown.
    """
    if kind not in get_args(ScoreOutput):
        raise CallError(f"unknown output {kind!r}: choose {', '.join(get_args(ScoreOutput))}")
    if callable(target):
        return _custom(output, target)
    if not has_classes:
        return _similarity(model, output, target)
    if isinstance(target, str) and target == SIMILARITY and SIMILARITY not in (model.labels or ()):
        raise CallError(f"{model.name} has classes: pass one of them as target, instead of 'similarity'")
    names = model.names(output.shape[-1])
    choices = _one_per_image(output, target)
    values, labels = [], []
    for row, choice in zip(output, choices, strict=True):
        if isinstance(choice, tuple):
            first, second = _contrast(choice, names)
            values.append(_number(model, row, first, kind) - _number(model, row, second, kind))
            labels.append(f"{names[first]} − {names[second]}")
        else:
            index = require_class_index(choice, names, len(names))
            values.append(_number(model, row, index, kind))
            labels.append(names[index])
    return Score(torch.stack(values), labels, "value" if model.meaning == "value" else kind)


def _one_per_image(output: Tensor, target: Any) -> list[Any]:
    """Return the class of each image."""
    if target is None:
        return list(output.argmax(-1).tolist())
    if isinstance(target, list):
        if len(target) != len(output):
            raise CallError(f"target lists {len(target)} classes for {len(output)} images: pass one for each image")
        return target
    return [target] * len(output)


def _contrast(pair: tuple[Any, ...], names: Sequence[str]) -> tuple[int, int]:
    """Return the two classes of a contrast."""
    if len(pair) != 2:
        raise CallError(f"target is {pair!r}: a contrast is a pair of classes, such as ('boxer', 'bull mastiff')")
    first, second = (require_class_index(choice, names, len(names)) for choice in pair)
    if first == second:
        raise CallError(f"a contrast of {names[first]!r} with itself is always 0: pass two different classes")
    return first, second


def _number(model: VisionModel, row: Tensor, index: int, kind: ScoreOutput) -> Tensor:
    """Return the number of one class to explain, from the logits of one image."""
    if kind == "logit" or model.meaning == "value":
        if model.meaning == "probabilities":
            raise CallError(f"{model.name} returns probabilities, not logits: pass output='probability'")
        return row[index]
    row = row if row.dtype == torch.float64 else row.float()
    if model.meaning == "probabilities":
        chances = row[index]
        return {"probability": chances, "log_probability": chances.log(), "log_odds": chances.logit()}[kind]
    if model.meaning == "sigmoid" or len(row) == 1:
        logit = row[index]
        return {"probability": logit.sigmoid(), "log_probability": F.logsigmoid(logit), "log_odds": logit}[kind]
    if kind == "log_odds":
        others = torch.cat([row[:index], row[index + 1 :]])
        return row[index] - others.logsumexp(0)
    logarithm = row.log_softmax(-1)[index]
    return logarithm.exp() if kind == "probability" else logarithm


def _custom(output: Tensor, target: Callable[[Tensor], Any]) -> Score:
    """Return the score that a function of the output returns."""
    values = target(output)
    if not isinstance(values, Tensor) or values.shape != (len(output),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise CallError(f"target returned {shape}: a tensor ({len(output)},), one number per image, is expected")
    return Score(values, [getattr(target, "__name__", "custom")] * len(output), "custom")


def _similarity(model: VisionModel, output: Tensor, target: Any) -> Score:
    """Return the length of the features along their own direction, whose gradient is that direction.

    The cosine of the features with themselves is 1 for every image, so its gradient is zero.
    """
    if target != SIMILARITY:
        raise CallError(
            f"{model.name} has no classifier, so there is no class to explain: pass target='similarity' to explain "
            "its features, add a classifier from examples (vitscope.few_shot_classifier), or use attention_map or "
            "rollout, which need no class"
        )
    direction = F.normalize(output.detach(), dim=-1)
    return Score((output * direction).sum(-1), [SIMILARITY] * len(output), SIMILARITY)

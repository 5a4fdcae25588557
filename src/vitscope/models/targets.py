"""Targets: the number of each image that a method explains, computed from the output of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitscope.errors import CallError
from vitscope.models.outputs import scale_of
from vitscope.models.vision_model import VisionModel
from vitscope.typing import SimilarTo
from vitscope.validation import contrast_label, require_class_index, require_contrast

ScoreOutput = Literal["logit", "log_odds", "probability", "log_probability"]
SIMILARITY = "similarity"
CUSTOM = "custom"
VALUE = "value"


@dataclass(frozen=True, eq=False)
class Score:
    """The score of a batch: one number per image, with the meaning of each.

    Attributes:
        values: (batch,), attached to the graph of the output.
        labels: what the score of each image is, such as "boxer" or "boxer − bull mastiff".
        output: meaning of the numbers: ``"logit"``, ``"log_odds"``, ``"probability"``, ``"log_probability"``,
            ``"value"``, ``"similarity"`` or ``"custom"``.
        fixed_target: the target of :func:`score` for other outputs of the model. The most probable classes are those of
            this output, and no reference image or text is evaluated again.
    """

    values: Float[Tensor, " batch"]
    labels: Sequence[str]
    output: str
    fixed_target: Any

    @property
    def label(self) -> str | None:
        """The label that all images share; None if they differ."""
        return self.labels[0] if len(set(self.labels)) == 1 else None

    def detached(self) -> "Score":
        """Return the score without the graph."""
        return replace(self, values=self.values.detach())


@dataclass(frozen=True, eq=False)
class ResolvedTarget:
    """A target of one image, whose classes exist.

    Attributes:
        label: what is explained, such as "boxer" or "boxer − bull mastiff".
        output: meaning of the number, see :class:`Score`.
        classes: index of the class, or of both classes of a contrast; empty if ``function`` returns the number.
        function: function of the model's output that returns (batch,); None for classes.
    """

    label: str
    output: str
    classes: tuple[int, ...] = ()
    function: Callable[[Tensor], Any] | None = None

    def values(self, output: Tensor, class_numbers: Tensor | None) -> Float[Tensor, " batch"]:
        """Return one number per row.

        Args:
            output: the model's output, (batch, class) or (batch, channel).
            class_numbers: the number of each class, (batch, class), from :func:`numbers_of_classes`; None if only
                ``function`` is needed.

        Raises:
            CallError: the function does not return one number per row, or its numbers do not depend on the output.
        """
        if self.function is None:
            assert class_numbers is not None, "only functions need no classes"
            first, *second = (class_numbers[:, index] for index in self.classes)
            return first - second[0] if second else first
        values = self.function(output)
        if not isinstance(values, Tensor) or values.shape != (len(output),):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise CallError(f"target returned {shape}: a tensor ({len(output)},), one number per image, is expected")
        if output.requires_grad and not values.requires_grad:
            raise CallError(
                f"the function {self.label!r} that was passed as target does not depend on the model's output, or "
                "detaches it: compute the numbers from the output with functions of torch"
            )
        return values


def check_output(output: Any) -> None:
    """Raise a CallError if there is no such number to explain."""
    if output not in get_args(ScoreOutput):
        raise CallError(f"unknown output {output!r}: choose {', '.join(get_args(ScoreOutput))}")


def score(model: VisionModel, output: Tensor, has_classes: bool, target: Any, kind: ScoreOutput = "logit") -> Score:
    """Return the score of each image, attached to the graph of the output.

    Args:
        model: the model.
        output: its logits (batch, class) or features (batch, channel).
        has_classes: whether the output is logits.
        target: see :data:`vitscope.typing.Target`; None for the most probable class of each image; or the
            :attr:`Score.fixed_target` of another score. ``"similarity"`` is the length of the features along their own
            direction, whose gradient is that direction: their cosine with themselves is 1 for every image, so that its
            gradient is zero.
        kind: the number to explain: the logit, the log-odds against all other classes, the probability or its
            logarithm.

    Raises:
        CallError: the target does not fit the model or the batch, or the kind is unknown.
    """
    check_output(kind)
    if callable(target):
        # A function may combine the images of a batch.
        custom = _function(target)
        return Score(custom.values(output, None), [custom.label] * len(output), custom.output, target)
    names = model.names(output.shape[-1]) if has_classes else None
    targets: list[ResolvedTarget] = []
    distinct: dict[tuple[int, int], ResolvedTarget] = {}
    for choice, top in zip(one_per_image(target, len(output)), output.argmax(-1).tolist(), strict=True):
        # A target that images share is resolved once, because a reference image or a text has to be evaluated.
        key = id(choice), top if has_classes else 0
        if key not in distinct:
            distinct[key] = resolve(model, choice, names, top, kind, _length_along_itself)
        targets.append(distinct[key])
    numbers = numbers_of_classes(model, output, kind) if any(resolved.classes for resolved in targets) else None
    values = [
        resolved.values(output[i : i + 1], None if numbers is None else numbers[i : i + 1])
        for i, resolved in enumerate(targets)
    ]
    kinds = dict.fromkeys(resolved.output for resolved in targets)
    return Score(torch.cat(values), [resolved.label for resolved in targets], " and ".join(kinds), targets)


def one_per_image(target: Any, count: int) -> list[Any]:
    """Return the target of each of ``count`` images.

    Raises:
        CallError: a list, tensor or array has another length, or a tensor or array does not hold whole numbers.
    """
    target = target_list(target)
    if isinstance(target, list):
        if len(target) != count:
            images = "1 image" if count == 1 else f"{count} images"
            raise CallError(f"target is a list of {len(target)} for {images}: pass one target for each image")
        return target
    return [target] * count


def target_list(target: Any) -> Any:
    """Return a tensor or array with an index for each image as a list, and any other target unchanged.

    Raises:
        CallError: a tensor or array is not one index, or one for each image.
    """
    if not isinstance(target, Tensor | np.ndarray):
        return target
    values = np.asarray(target.detach().cpu()) if isinstance(target, Tensor) else target
    if values.ndim > 1 or not np.issubdtype(values.dtype, np.integer):
        shape = "×".join(map(str, values.shape)) or "a single number"
        raise CallError(f"target is {shape} of {target.dtype}: pass whole numbers, one class index for each image")
    return values.tolist()


def resolve(
    model: VisionModel,
    target: Any,
    names: Sequence[str] | None,
    top: int,
    kind: str,
    similarity: Callable[[Tensor], Tensor],
) -> ResolvedTarget:
    """Return what a target of one image means.

    Args:
        model: the model.
        target: see :data:`vitscope.typing.ImageTarget`; None for the most probable class. A resolved target is
            returned as it is.
        names: names of the classes; None if the model returns features.
        top: index of the most probable class.
        kind: the number of a class to explain.
        similarity: function of features, (batch, channel), that ``"similarity"`` means; returns (batch,).

    Raises:
        CallError: the target does not fit the model.
    """
    if isinstance(target, ResolvedTarget):
        return target
    if callable(target):
        return _function(target)
    if names is None:
        return _resolve_features(model, target, similarity)
    if isinstance(target, SimilarTo):
        raise CallError(f"{model.name} returns classes, not features: load it with output='features' for SimilarTo")
    if isinstance(target, str) and target == SIMILARITY and SIMILARITY not in names:
        raise CallError(f"target 'similarity' is not a label: {model.name} has classes, so pass one of them")
    kind = VALUE if model.meaning == VALUE else kind
    if isinstance(target, tuple):
        first, second = require_contrast(target, names, top)
        return ResolvedTarget(contrast_label(names[first], names[second]), kind, (first, second))
    index = top if target is None else require_class_index(target, names, len(names))
    return ResolvedTarget(names[index], kind, (index,))


def numbers_of_classes(model: VisionModel, output: Tensor, kind: str) -> Tensor:
    """Return the number of each class to explain, from logits; both (batch, class).

    Log-odds are those of a class against all others, computed without loss of precision in saturated outputs. A
    regression has values, whatever the kind.

    Raises:
        CallError: logits are asked of a model that returns probabilities.
    """
    if kind == "logit" or model.meaning == VALUE:
        if model.meaning == "probabilities":
            raise CallError(f"{model.name} gives probabilities, not logits: pass output='probability'")
        return output
    output = output if output.dtype == torch.float64 else output.float()
    scale = scale_of(output, model.meaning)
    if scale == "probabilities":
        return output if kind == "probability" else output.logit() if kind == "log_odds" else output.log()
    if scale == "sigmoid":
        return output.sigmoid() if kind == "probability" else output if kind == "log_odds" else F.logsigmoid(output)
    if kind == "log_odds":
        return _log_odds(output)
    return output.softmax(-1) if kind == "probability" else output.log_softmax(-1)


def _log_odds(logits: Tensor) -> Tensor:
    """Return z_c − logsumexp of the logits of all other classes.

    The sum over the others is the total times 1 − p, which is precise for p up to ½. Only the most probable class may
    have more, so its sum is computed without it.
    """
    top = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
    others = logits.masked_fill(top, -torch.inf).logsumexp(-1, keepdim=True)
    total = logits.logsumexp(-1, keepdim=True)
    chances = (logits - total).exp().masked_fill(top, 0.0)
    return logits - torch.where(top, others, total + torch.log1p(-chances))


def _function(function: Callable[[Tensor], Any]) -> ResolvedTarget:
    return ResolvedTarget(getattr(function, "__name__", CUSTOM), CUSTOM, function=function)


def _resolve_features(model: VisionModel, target: Any, similarity: Callable[[Tensor], Tensor]) -> ResolvedTarget:
    """Return what a target of a model without a classifier means: a text, or a similarity to features."""
    if isinstance(target, SimilarTo):
        return _similar_to(model, target)
    if isinstance(target, str) and target == SIMILARITY:
        return ResolvedTarget(SIMILARITY, SIMILARITY, function=similarity)
    texts = target if isinstance(target, tuple) and len(target) == 2 else (target,)
    if all(isinstance(text, str) for text in texts) and model.text is not None:
        return _texts(model, texts)
    lacks = "no classifier and no text tower" if isinstance(target, str) else "no classifier"
    raise CallError(
        f"{model.name} has {lacks}, so there is no class to explain: pass target='similarity' to explain the "
        "similarity of its features, add a classifier from examples (vitscope.few_shot_classifier), or use "
        "attention_map or rollout, which need no class"
    )


def _texts(model: VisionModel, texts: Sequence[str]) -> ResolvedTarget:
    """Return the logit of a text, or the contrast of two."""
    if len(set(texts)) < len(texts):
        raise CallError(f"a contrast of {texts[0]!r} with itself is always 0: pass two different texts")
    logits = model.text_logits(texts)

    def read(output: Tensor) -> Tensor:
        numbers = logits(output)
        return numbers[:, 0] if len(texts) == 1 else numbers[:, 0] - numbers[:, 1]

    label = texts[0] if len(texts) == 1 else contrast_label(texts[0], texts[1])
    return ResolvedTarget(label, "logit", function=read)


def _similar_to(model: VisionModel, target: SimilarTo) -> ResolvedTarget:
    pixels, (reference, *more) = model.prepare(target.image)
    if more:
        raise CallError(f"SimilarTo takes one image, not {1 + len(more)}: pass a list of targets, one for each image")
    with torch.no_grad(), model.running():
        features = model.features(pixels)
    name = Path(reference.name).name or "another image"
    return ResolvedTarget(f"similarity to {name}", SIMILARITY, function=lambda output: cosine(output, features))


def cosine(output: Tensor, features: Tensor) -> Float[Tensor, " batch"]:
    """Return the cosine similarity of features (batch, channel) with those of a single image, (1, channel)."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.cosine_similarity(output.to(dtype), features.to(dtype), dim=-1)


def _length_along_itself(output: Tensor) -> Float[Tensor, " batch"]:
    direction = F.normalize(output.detach(), dim=-1)
    return (output * direction).sum(-1)

"""Change of the attention by tuning: distances per layer, rollouts before and after, and their faithfulness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from vitscope.attention.trace import AttentionStep
from vitscope.display import Drawn, counted, ends, one_line
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.methods.rollout import rollout
from vitscope.metrics.faithfulness import faithfulness
from vitscope.models.targets import SIMILARITY
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import capture

STEPS = 10
AREAS = ("deletion", "insertion", "random_deletion", "random_insertion")

RolloutValues = Float[np.ndarray, "image height width"]


@dataclass(frozen=True, eq=False)
class AttentionChange(Drawn):
    """The attention of a model before and after tuning, on the same images.

    Attributes:
        distances: for each layer, the total variation ½ Σ|a − b| between the attention of a query before and after,
            averaged over images, heads and queries; from 0 (identical) to 1 (disjoint).
        before, after: (image, height, width) the rollouts of the images; None if the model has no rollout.
        correlation: Pearson correlation of the rollouts of an image before and after, averaged over images; None
            without rollouts, NaN if a rollout is flat.
        faithfulness_before, faithfulness_after: areas under the deletion and insertion curves of the model's own
            rollouts and of a random order, averaged over images, see :func:`vitscope.faithfulness`. They follow the
            model's most likely class, or the similarity of its features if it has no classes. None without rollouts.

    Examples:
        >>> AttentionChange((0.0, 0.1), None, None, None, None, None).as_json()["distances"]
        [0.0, 0.1]
    """

    distances: tuple[float, ...]
    before: RolloutValues | None
    after: RolloutValues | None
    correlation: float | None
    faithfulness_before: dict[str, float] | None
    faithfulness_after: dict[str, float] | None

    def __repr__(self) -> str:
        distances = np.asarray(self.distances)
        rollouts = "" if self.before is None else f"rollouts of {counted(len(self.before), 'image')}"
        correlation = "" if self.correlation is None else f"correlation {self.correlation:+.2f}"
        return one_line(
            f"AttentionChange: {counted(len(distances), 'layer')}", f"distance {ends(distances)}", rollouts, correlation
        )

    def as_json(self) -> dict[str, Any]:
        """Return every field; rollouts are rounded to six digits."""
        before, after = (
            None if values is None else np.round(values.astype(float), 6).tolist()
            for values in (self.before, self.after)
        )
        return {
            "distances": list(self.distances),
            "correlation": None if self.correlation is None or np.isnan(self.correlation) else self.correlation,
            "faithfulness_before": self.faithfulness_before,
            "faithfulness_after": self.faithfulness_after,
            "before": before,
            "after": after,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "AttentionChange":
        """Return the change from the output of :meth:`as_json`."""
        before, after = (
            None if values is None else np.asarray(values, dtype=np.float32)
            for values in (record["before"], record["after"])
        )
        areas = record["faithfulness_before"], record["faithfulness_after"]
        return cls(tuple(record["distances"]), before, after, record["correlation"], *areas)


def attention_change(before: VisionModel, after: VisionModel, images: Sequence[Any]) -> AttentionChange:
    """Compare the attention of a model before and after tuning.

    Args:
        before: the model before tuning.
        after: the tuned model, with the same architecture.
        images: a list of paths, arrays or PIL images.

    Raises:
        CallError: the shapes of the attention differ, or ``images`` is not a list of images.

    Examples:
        >>> import skimage.data
        >>> import vitscope as vs
        >>> model = vs.load("vit-nano")
        >>> vs.attention_change(model, model, [skimage.data.chelsea()]).distances
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    """
    if isinstance(images, str) or not len(images):
        raise CallError(f"images is {images!r}: pass a list of images")
    totals: list[float] = []
    for image in images:
        first, second = (capture(model, image).blocks for model in (before, after))
        if [_shape(step) for step in first] != [_shape(step) for step in second]:
            raise CallError(
                f"cannot compare {before.name} and {after.name}, whose attention has different shapes: pass one model "
                "before and after tuning"
            )
        distances = [_distance(*steps) for steps in zip(first, second, strict=True)]
        totals = [a + b for a, b in zip(totals or [0.0] * len(distances), distances, strict=True)]
    rollouts = _rollouts(before, after, list(images))
    means = tuple(total / len(images) for total in totals)
    if rollouts is None:
        return AttentionChange(means, None, None, None, None, None)
    correlations = [_correlation(a, b) for a, b in zip(rollouts[0].values, rollouts[1].values, strict=True)]
    values = [result.values.cpu().numpy() for result in rollouts]
    areas = [_mean_areas(model, list(images), result) for model, result in zip((before, after), rollouts, strict=True)]
    return AttentionChange(means, values[0], values[1], float(np.mean(correlations)), areas[0], areas[1])


def _shape(step: AttentionStep) -> tuple[int, ...]:
    return tuple(step.scores.shape)


def _distance(first: AttentionStep, second: AttentionStep) -> float:
    """Return the mean total variation over all queries that are not padding."""
    distances = (first.weights() - second.weights()).abs().sum(-1).mean((0, 2)) / 2  # (window, query)
    if first.slots is None:
        return float(distances.mean())
    return float(distances[first.slots >= 0].mean())


def _rollouts(before: VisionModel, after: VisionModel, images: list[Any]) -> tuple[Attribution, Attribution] | None:
    """Return the rollouts of both models; None for families that have none."""
    try:
        return rollout(before, images), rollout(after, images)
    except UnsupportedModelError:
        return None


def _mean_areas(model: VisionModel, images: list[Any], result: Attribution) -> dict[str, float]:
    """Return the areas under the deletion and insertion curves, averaged over the images."""
    with torch.no_grad(), model.running():
        has_classes = model.logits(model.prepare(images[:1])[0]) is not None
    areas = faithfulness(model, images, result, target=None if has_classes else SIMILARITY, steps=STEPS)
    return {name: float(getattr(areas, name).mean()) for name in AREAS}


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])

"""What tuning did to the attention: how far each layer's maps moved, rollouts before and after, faithfulness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from vitscope.attention.trace import AttentionStep
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.methods.rollout import rollout
from vitscope.metrics.faithfulness import faithfulness
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.batching import SIMILARITY
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import capture

STEPS = 10
FAITHFUL = ("deletion", "insertion", "random_deletion", "random_insertion")

RolloutValues = Float[np.ndarray, "image height width"]


@dataclass(frozen=True, eq=False)
class AttentionChange:
    """Attention of two models of one shape on the same images.

    Attributes:
        distances: for each layer the total variation ½ Σ|a − b| between a query's attention before and after, the
            mean over images, heads and queries; 0 is the same, 1 has nothing in common.
        before, after: (image, height, width), the rollouts of the images; None for a model that has none.
        correlation: Pearson's between each image's rollouts, the mean over images; None without rollouts, NaN where
            one is flat.
        faithfulness_before, faithfulness_after: deletion and insertion of each model's own rollouts and of a random
            order, means over the images; see :func:`vitscope.faithfulness`. What is followed is the class that this
            model finds likeliest, or how alike its features stay where it has no classes. None without rollouts.
    """

    distances: tuple[float, ...]
    before: RolloutValues | None
    after: RolloutValues | None
    correlation: float | None
    faithfulness_before: dict[str, float] | None
    faithfulness_after: dict[str, float] | None

    def as_json(self) -> dict[str, Any]:
        """All of it; rollouts to six digits."""
        rollouts = (
            None if one is None else np.round(one.astype(float), 6).tolist() for one in (self.before, self.after)
        )
        before, after = rollouts
        return {
            "distances": list(self.distances),
            "correlation": None if self.correlation is None or np.isnan(self.correlation) else self.correlation,
            "faithfulness_before": self.faithfulness_before,
            "faithfulness_after": self.faithfulness_after,
            "before": before,
            "after": after,
        }

    @classmethod
    def of_json(cls, about: Mapping[str, Any]) -> "AttentionChange":
        """What :meth:`as_json` gave."""
        before, after = (
            None if one is None else np.asarray(one, dtype=np.float32) for one in (about["before"], about["after"])
        )
        faithful = about["faithfulness_before"], about["faithfulness_after"]
        return cls(tuple(about["distances"]), before, after, about["correlation"], *faithful)


def attention_change(before: VisionModel, after: VisionModel, images: Sequence[Any]) -> AttentionChange:
    """Compare a model's attention before and after it was tuned, on some images.

    Raises:
        CallError: the two do not attend in the same way, or no image was given.
    """
    if isinstance(images, str) or not len(images):
        raise CallError(f"images is {images!r}: a list of images is expected")
    totals: list[float] = []
    for image in images:
        first, second = (capture(model, image).blocks for model in (before, after))
        if [_shape(step) for step in first] != [_shape(step) for step in second]:
            raise CallError(f"{before.name} and {after.name} attend in different shapes: they are not one model")
        distances = [_distance(*pair) for pair in zip(first, second, strict=True)]
        totals = [a + b for a, b in zip(totals or [0.0] * len(distances), distances, strict=True)]
    rollouts = _rollouts(before, after, list(images))
    moved = tuple(total / len(images) for total in totals)
    if rollouts is None:
        return AttentionChange(moved, None, None, None, None, None)
    alike = [_correlation(a, b) for a, b in zip(rollouts[0].values, rollouts[1].values, strict=True)]
    values = [one.values.cpu().numpy() for one in rollouts]
    faithful = [_faithful(model, list(images), one) for model, one in zip((before, after), rollouts, strict=True)]
    return AttentionChange(moved, values[0], values[1], float(np.mean(alike)), faithful[0], faithful[1])


def _shape(step: AttentionStep) -> tuple[int, ...]:
    return tuple(step.scores.shape)


def _distance(first: AttentionStep, second: AttentionStep) -> float:
    """Queries on padding are left out."""
    moved = (first.weights() - second.weights()).abs().sum(-1).mean((0, 2)) / 2  # (window, query)
    if first.slots is None:
        return float(moved.mean())
    return float(moved[first.slots >= 0].mean())


def _rollouts(before: VisionModel, after: VisionModel, images: list[Any]) -> tuple[Attribution, Attribution] | None:
    try:
        return rollout(before, images), rollout(after, images)
    except UnsupportedModelError:
        return None  # a family that no row can be followed through


def _faithful(model: VisionModel, images: list[Any], found: Attribution) -> dict[str, float]:
    with torch.no_grad(), model.running():
        classes = model.answer(model.prepare(images[:1])[0]) is not None
    areas = faithfulness(model, images, found, target=None if classes else SIMILARITY, steps=STEPS)
    return {name: float(getattr(areas, name).mean()) for name in FAITHFUL}


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])

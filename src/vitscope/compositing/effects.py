"""Effects: how much the object, its place, its background and the position embeddings change an output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from vitscope.compositing.result import Composition
from vitscope.display import Tabulated, counted, one_line
from vitscope.errors import CallError
from vitscope.results.attribution import Attribution
from vitscope.typing import ClassTarget
from vitscope.validation import require_ratio

BACKGROUNDS = {"blank": "a blank", "blurred": "a blurred", "shuffled": "a shuffled", "other": "another"}

DESCRIPTIONS = {
    "object": "with the object, minus without it",
    **{
        f"context: {name}": f"over its own background, minus over {adjective} one"
        for name, adjective in BACKGROUNDS.items()
    },
    "place": "at the centre, minus at the rim, over its own background",
    "place, blank": "the same over a blank background: the model's own preference for the centre",
    "place, blank, neutral": "the same with neutral position embeddings",
    "place by context": "place, minus place over blank: what the background adds",
    "place by position": "place over blank, minus the same with neutral positions",
    "position": "the original, minus the original with neutral positions",
}


@dataclass(frozen=True, eq=False)
class Effect:
    """A difference between two outputs, averaged over one or more images.

    Attributes:
        name: see :data:`DESCRIPTIONS` for the two sides of the difference.
        values: (image,) the difference in each image, averaged over its objects.
        mean: of ``values``.
        interval: Student's confidence interval (low, high) of the mean, based on the t distribution; None for a single
            image.
        standardized: Cohen's d of paired differences, mean / standard deviation; None for a single image, or if all
            values are the same.
        confidence: confidence level of the interval.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> cat = {"cat": (105, 20, 235, 200)}
        >>> result = vs.compose(vs.load("vit-nano"), skimage.data.chelsea(), cat, tests="controls", places=2)
        >>> effect = vs.effects(result)[0]
        >>> effect.name, len(effect.values), effect.interval
        ('object', 1, None)
    """

    name: str
    values: Float[np.ndarray, " image"]
    mean: float
    interval: tuple[float, float] | None
    standardized: float | None
    confidence: float = 0.95

    def __repr__(self) -> str:
        interval = "" if self.interval is None else "{:+.3f} to {:+.3f}".format(*self.interval)
        return one_line(f"Effect {self.name}: {self.mean:+.3f}", interval, counted(len(self.values), "image"))

    @property
    def description(self) -> str:
        """The two sides of the difference, in words."""
        return DESCRIPTIONS[self.name]

    def as_json(self) -> dict[str, Any]:
        """Return the effect in types that JSON supports."""
        return {
            "name": self.name,
            "description": self.description,
            "mean": self.mean,
            "interval": None if self.interval is None else list(self.interval),
            "confidence": self.confidence,
            "standardized": self.standardized,
            "values": self.values.tolist(),
        }


class Effects(list[Effect], Tabulated):
    """A list of effects, which a notebook shows as a table."""


def effects(
    results: Composition | Sequence[Composition], *, target: ClassTarget | None = None, confidence: float = 0.95
) -> Effects:
    """Return the effects of object, place, background and positions, from the controls of one or more images.

    ``place`` is the output at the place nearest to the centre of what the model sees, minus the mean output over the
    rim of the location grid. A preference for the centre that remains over a blank background is the model's own:
    it was learned from the training data. The part of it that disappears with neutral positions comes from the position
    embeddings (or relative biases). The part that disappears over the blank background comes from the context.

    Args:
        results: one or more results of one model, from ``compose(…, tests=(…, "controls"))``.
        target: the class; by default that of each object, see :meth:`Composition.column`.
        confidence: confidence level of the intervals, above 0 and below 1. The intervals are over images, so they
            describe the mean over other images of the same kind.

    Returns:
        A list with one effect for each difference that is available in all images, in the order of
        :data:`DESCRIPTIONS`. Means are in the unit of the outputs: 0.1 is ten percentage points of probability.

    Raises:
        CallError: there are no controls, they were interrupted, or the results have different models or outputs.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> cat = {"cat": (105, 20, 235, 200)}
        >>> result = vs.compose(vs.load("vit-nano"), skimage.data.chelsea(), cat, tests="controls", places=3)
        >>> [effect.name for effect in vs.effects(result)][:3]
        ['object', 'context: blank', 'context: blurred']
    """
    compositions = _require_compositions(results)
    if not 0 < require_ratio(confidence, "confidence") < 1:
        raise CallError(f"confidence is {confidence}: pass a number above 0 and below 1")
    by_image = [_effects_of_image(result, target) for result in compositions]
    return Effects(
        _summarize(name, np.array([values[name] for values in by_image]), confidence)
        for name in DESCRIPTIONS
        if all(name in values for values in by_image)
    )


def _require_compositions(results: Any) -> list[Composition]:
    """Return the results as a list of compositions of one model and one output."""
    is_list = hasattr(results, "__iter__") and not isinstance(results, Composition)
    compositions = list(results) if is_list else [results]
    if not compositions or not all(isinstance(result, Composition) for result in compositions):
        raise CallError("effects takes results of vitscope.compose: pass one or a list of them")
    models = dict.fromkeys(str(result.provenance["model"]) for result in compositions)
    outputs = dict.fromkeys(result.output for result in compositions)
    for noun, values in (("model", models), ("output", outputs)):
        if len(values) > 1:
            raise CallError(
                f"cannot combine results of different {noun}s ({', '.join(values)}): pass those of one {noun}"
            )
    return compositions


def _summarize(name: str, values: Float[np.ndarray, " image"], confidence: float) -> Effect:
    """Return the mean of an effect over images, with its interval and its standardized size."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Effect(name, values, mean, None, None, confidence)
    deviation = float(values.std(ddof=1))
    half_width = float(student.ppf((1 + confidence) / 2, count - 1)) * deviation / count**0.5
    standardized = mean / deviation if deviation > 0 else None
    return Effect(name, values, mean, (mean - half_width, mean + half_width), standardized, confidence)


def _effects_of_image(result: Composition, target: ClassTarget | None) -> Mapping[str, float]:
    """Return each difference, averaged over the objects of an image."""
    objects = result.tested("controls")
    if not objects:
        raise CallError("the result has no controls: pass tests=('controls',) to compose")
    if result.provenance["interrupted"]:
        raise CallError("the controls were interrupted, so their effects are incomplete: run compose again")
    by_object = [_effects_of_object(result, name, target) for name in objects]
    shared = [name for name in by_object[0] if all(name in values for values in by_object)]
    return {name: float(np.mean([values[name] for values in by_object])) for name in shared}


def _effects_of_object(result: Composition, name: str, target: ClassTarget | None) -> dict[str, float]:
    """Return each difference for one object."""

    def output(image: int | str) -> float:
        return result.value(image, target, name)

    def place_effect(background: str, *, neutral: bool = False) -> float | None:
        places = result.location_map(name, target, test="controls", background=background, neutral=neutral)
        return centre_minus_rim(places, result)

    (alone,) = result.select("controls", name, background="own", placed=False)[:1]
    differences = {"object": output("original") - output(f"no {name}")}
    for background in BACKGROUNDS:
        (over_background,) = result.select("controls", name, background=background, placed=False)
        differences[f"context: {background}"] = output(alone) - output(over_background)
    place, blank = place_effect("own"), place_effect("blank")
    if place is not None and blank is not None:
        differences |= {"place": place, "place, blank": blank, "place by context": place - blank}
    if result.select("controls", name, neutral=True):
        differences["position"] = output("original") - output("positions neutral")
        neutral = place_effect("blank", neutral=True)
        if blank is not None and neutral is not None:
            differences |= {"place, blank, neutral": neutral, "place by position": blank - neutral}
    return differences


def centre_minus_rim(places: Attribution, result: Composition) -> float | None:
    """Return the mean over the places nearest to the centre of what the model sees, minus the mean over the rim.

    The result is None if all places are equally near to the centre.
    """
    values = places.values[0].double().cpu().numpy()
    left, top, right, bottom = places.images[0].box
    height, width = values.shape
    xs = left + (np.arange(width) + 0.5) / width * (right - left)
    ys = top + (np.arange(height) + 0.5) / height * (bottom - top)
    seen_box = result.original.box
    centre_x, centre_y = (seen_box[0] + seen_box[2]) / 2, (seen_box[1] + seen_box[3]) / 2
    distance = np.hypot(xs[None] - centre_x, ys[:, None] - centre_y)
    nearest = distance <= distance.min() + 1e-6
    rim = np.ones_like(nearest)
    # The rim of a grid of a single row or column is its two ends.
    rim[(slice(1, -1) if height > 1 else slice(None)), (slice(1, -1) if width > 1 else slice(None))] = False
    rim &= ~nearest
    return float(values[nearest].mean() - values[rim].mean()) if rim.any() else None

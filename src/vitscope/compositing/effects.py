"""Effects: what of a model's answer is owed to the object, its place, its background and the position embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from vitscope.compositing.result import Composition
from vitscope.errors import CallError
from vitscope.results.attribution import Attribution
from vitscope.validation import ratio

BACKGROUNDS = {"blank": "a blank", "blurred": "a blurred", "shuffled": "a shuffled", "other": "another"}

ABOUT = {
    "object": "with the object, less without it",
    **{f"context: {name}": f"on its own background, less on {words} one" for name, words in BACKGROUNDS.items()},
    "place": "at the centre, less at the rim, its own background",
    "place, blank": "the same on a blank background: the model's own liking for the centre",
    "place, blank, neutral": "the same with position embeddings made equal",
    "place by context": "place, less place on blank: what the background adds",
    "place by position": "place on blank, less the same with positions made equal",
    "position": "the original, less the original with positions made equal",
}


@dataclass(frozen=True, eq=False)
class Effect:
    """One difference between answers, over several images.

    Attributes:
        name: see :data:`ABOUT` for what is taken from what.
        values: (image,) the difference in each, the mean over its objects.
        mean: of these.
        interval: (low, high) of the mean, Student's; None for one image.
        confidence: of the interval.
        standardized: Cohen's d of paired differences, mean / standard deviation; None for one image, or where all
            are the same.
    """

    name: str
    values: Float[np.ndarray, " image"]
    mean: float
    interval: tuple[float, float] | None
    standardized: float | None
    confidence: float = 0.95

    @property
    def about(self) -> str:
        """What is taken from what."""
        return ABOUT[self.name]

    def as_json(self) -> dict[str, Any]:
        """What JSON has."""
        return {
            "name": self.name,
            "about": self.about,
            "mean": self.mean,
            "interval": None if self.interval is None else list(self.interval),
            "confidence": self.confidence,
            "standardized": self.standardized,
            "values": self.values.tolist(),
        }


def effects(
    results: Composition | Sequence[Composition], *, target: int | str | None = None, confidence: float = 0.95
) -> list[Effect]:
    """The controls of one image or several, as differences that tell the guesses apart.

    ``place`` compares the place nearest the middle of what the model sees with the mean over the rim of the location
    grid. A liking for the centre that stays on a blank background is the model's own, learned from its data; as far as
    it goes when positions are made equal, it comes through the position embedding (or the relative bias); what the
    blank background takes away came from the context.

    Args:
        results: of one model, from ``compose(…, tests=(…, "controls"))``.
        target: the class; by default that of each object, see :meth:`Composition.column`.
        confidence: of the intervals, in (0, 1). They are Student's, over images: they speak of images like these.

    Returns:
        one effect a control that was made in all of the images, in the order of :data:`ABOUT`. Means are in the unit
        of the answers: 0.1 is ten percentage points of probability.

    Raises:
        CallError: no controls were made, they were interrupted, or the results are of different models or outputs.
    """
    given = [results] if isinstance(results, Composition) else list(results) if hasattr(results, "__iter__") else []
    if not given or not all(isinstance(one, Composition) for one in given):
        raise CallError("effects are taken from results of vitscope.compose")
    if not 0 < ratio(confidence, "confidence") < 1:
        raise CallError(f"confidence is {confidence}: a share between 0 and 1 is expected")
    for what in ("model", "output"):
        kinds = dict.fromkeys(str(one.output if what == "output" else one.provenance["model"]) for one in given)
        if len(kinds) > 1:
            raise CallError(f"the results are of {' and '.join(kinds)}: effects are taken for one {what} at a time")
    measured = [_of_image(one, target) for one in given]
    return [
        _effect(name, np.array([one[name] for one in measured]), confidence)
        for name in ABOUT
        if all(name in one for one in measured)
    ]


def _effect(name: str, values: Float[np.ndarray, " image"], confidence: float) -> Effect:
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Effect(name, values, mean, None, None, confidence)
    deviation = float(values.std(ddof=1))
    half = float(student.ppf((1 + confidence) / 2, count - 1)) * deviation / count**0.5
    return Effect(
        name, values, mean, (mean - half, mean + half), mean / deviation if deviation > 0 else None, confidence
    )


def _of_image(result: Composition, target: int | str | None) -> Mapping[str, float]:
    """Each difference, the mean over the image's objects."""
    objects = result.tested("controls")
    if not objects:
        raise CallError("the controls were not made: pass tests=('controls',) to compose")
    if result.provenance["interrupted"]:
        raise CallError("the controls were interrupted: their effects are not whole")
    measured = [_of_object(result, name, target) for name in objects]
    shared = [name for name in measured[0] if all(name in one for one in measured)]
    return {name: float(np.mean([one[name] for one in measured])) for name in shared}


def _of_object(result: Composition, name: str, target: int | str | None) -> dict[str, float]:
    def value(composite: str) -> float:
        return result.value(composite, target, name)

    def place(background: str, *, neutral: bool = False) -> float | None:
        found = result.location_map(name, target, test="controls", background=background, neutral=neutral)
        return centre_against_rim(found, result)

    (alone,) = result.select("controls", name, background="own", placed=False)[:1]
    found = {"object": value("original") - value(f"no {name}")}
    for background in BACKGROUNDS:
        (on_it,) = result.select("controls", name, background=background, placed=False)
        found[f"context: {background}"] = result.value(alone, target, name) - result.value(on_it, target, name)
    own, blank = place("own"), place("blank")
    if own is not None and blank is not None:
        found |= {"place": own, "place, blank": blank, "place by context": own - blank}
    if result.select("controls", name, neutral=True):
        found["position"] = value("original") - value("positions neutral")
        neutral = place("blank", neutral=True)
        if blank is not None and neutral is not None:
            found |= {"place, blank, neutral": neutral, "place by position": blank - neutral}
    return found


def centre_against_rim(places: Attribution, result: Composition) -> float | None:
    """The mean over the places nearest the middle of what the model sees, less the mean over the outermost ones.

    None where all places are as near.
    """
    values = places.values[0].double().cpu().numpy()
    left, top, right, bottom = places.images[0].box
    height, width = values.shape
    xs = left + (np.arange(width) + 0.5) / width * (right - left)
    ys = top + (np.arange(height) + 0.5) / height * (bottom - top)
    seen = result.original.box
    distance = np.hypot(xs[None] - (seen[0] + seen[2]) / 2, ys[:, None] - (seen[1] + seen[3]) / 2)
    nearest = distance <= distance.min() + 1e-6
    rim = np.ones_like(nearest)
    # A grid of one row, or one column, has its rim at the two ends.
    rim[(slice(1, -1) if height > 1 else slice(None)), (slice(1, -1) if width > 1 else slice(None))] = False
    rim &= ~nearest
    return float(values[nearest].mean() - values[rim].mean()) if rim.any() else None

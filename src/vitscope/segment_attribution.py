"""Results that have one weight a segment: LIME's, KernelSHAP's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.arguments import whole_number
from vitscope.attribution import Attribution
from vitscope.errors import CallError
from vitscope.grid import Grid


@dataclass(frozen=True, eq=False)
class Weighing:
    """What a linear model of one picture says about one class.

    Attributes:
        label: the class.
        answer: the model's answer to the whole picture.
        weights: float64, one a segment, in the order of the sorted labels.
        intervals: float64 (segment, 2), lower and upper end; None where a method has none.
        intercept: what the linear model says when everything is hidden.
        score: the weighted R² of the linear model on what it was fitted to.
    """

    label: str
    answer: float
    weights: Float[Tensor, " segment"]
    intervals: Float[Tensor, "segment 2"] | None
    intercept: float
    score: float

    @property
    def local_prediction(self) -> float:
        """What the linear model says of the whole picture."""
        return self.intercept + float(self.weights.sum())


@dataclass(frozen=True, eq=False)
class SegmentAttribution(Attribution):
    """One weight for each segment of a picture, painted on its pixels.

    ``values`` are the weights at every pixel, float32 (1, pixel height, pixel width). The same questions were answered
    for several classes: :meth:`of` is the result for another one of :attr:`classes`, without asking the model again.

    Attributes:
        segments: (pixel height, pixel width), the labels.
        index: the place of each pixel's label in :attr:`weights`; −1 where nothing is ever hidden.
        weighings: one for each class, the target's first.
    """

    segments: Int[Tensor, "pixel_height pixel_width"] = field(kw_only=True)
    index: Int[Tensor, "pixel_height pixel_width"] = field(kw_only=True)
    weighings: Sequence[Weighing] = field(kw_only=True)

    @property
    def classes(self) -> list[str]:
        """The classes that :meth:`of` has, the target first."""
        return [weighing.label for weighing in self.weighings]

    @property
    def weights(self) -> Float[Tensor, " segment"]:
        """Float64: what each segment adds to the target's answer, in the order of the segments' sorted labels."""
        return self.weighings[0].weights

    @property
    def intervals(self) -> Float[Tensor, "segment 2"] | None:
        """Float64: lower and upper end of the interval of each weight; None where the method gives none."""
        return self.weighings[0].intervals

    @property
    def intercept(self) -> float:
        """The linear model's answer when everything is hidden."""
        return self.weighings[0].intercept

    @property
    def score(self) -> float:
        """The weighted R² of the linear model."""
        return self.weighings[0].score

    @property
    def local_prediction(self) -> float:
        """The linear model's answer to the whole picture."""
        return self.weighings[0].local_prediction

    def of(self, target: str) -> Self:
        """The same questions' result for another class."""
        for at, weighing in enumerate(self.weighings):
            if weighing.label == target:
                others = [other for i, other in enumerate(self.weighings) if i != at]
                values = spread(self.index, weighing.weights)[None]
                return replace(self, values=values, target=weighing.label, weighings=[weighing, *others])
        raise CallError(f"{target!r} was not asked about: this result has {', '.join(self.classes)}")

    def top(self, count: int = 5, *, sign: str = "positive") -> list[int]:
        """Places of the weightiest segments among the sorted labels: supporting ones, ``"negative"`` or ``"both"``."""
        signs = {"positive": self.weights, "negative": -self.weights, "both": self.weights.abs()}
        if sign not in signs:
            raise CallError(f"sign is {sign!r}: choose {', '.join(signs)}")
        strength = signs[sign]
        order = strength.argsort(descending=True, stable=True)[: whole_number(count, "count")]
        return [at for at in order.tolist() if strength[at] > 0]

    def regions(self, count: int = 5, *, sign: str = "positive") -> Bool[Tensor, "pixel_height pixel_width"]:
        """Where the :meth:`top` segments are."""
        chosen = torch.zeros(len(self.weights), dtype=torch.bool)
        chosen[self.top(count, sign=sign)] = True
        return (self.index >= 0) & chosen[self.index.clamp_min(0)]

    def as_json(self) -> dict[str, Any]:
        """Each class's weights with intervals, and where each segment lies; the arrays are in the other formats."""
        inside, count = self.index >= 0, len(self.weights)
        index = self.index[inside]
        sizes = torch.bincount(index, minlength=count)
        labels = torch.zeros(count, dtype=self.segments.dtype).scatter_(0, index, self.segments[inside])
        rows, columns = (
            torch.bincount(index, weights=places, minlength=count) / sizes.clamp_min(1)
            for places in inside.nonzero().double().unbind(1)
        )
        segments = [
            {"label": label, "pixels": size, "centre": [round(row, 1), round(column, 1)]}
            for label, size, row, column in zip(*(t.tolist() for t in (labels, sizes, rows, columns)), strict=True)
        ]
        return {**self._about(), "segments": segments}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {**super()._tensors(), "segments": self.segments, "index": self.index}
        for at, weighing in enumerate(self.weighings):
            tensors[f"weights.{at}"] = weighing.weights
            if weighing.intervals is not None:
                tensors[f"intervals.{at}"] = weighing.intervals
        return tensors

    def _about(self) -> dict[str, Any]:
        classes = [
            {
                "label": weighing.label,
                "answer": weighing.answer,
                "intercept": weighing.intercept,
                "score": weighing.score,
                "weights": weighing.weights.tolist(),
                "intervals": None if weighing.intervals is None else weighing.intervals.tolist(),
            }
            for weighing in self.weighings
        ]
        return {**super()._about(), "classes": classes}

    @classmethod
    def _restored(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Self:
        weighings = [
            Weighing(
                entry["label"],
                entry["answer"],
                tensors[f"weights.{at}"],
                tensors.get(f"intervals.{at}"),
                entry["intercept"],
                entry["score"],
            )
            for at, entry in enumerate(about["classes"])
        ]
        return cls(
            tensors["values"],
            Grid(**about["grid"]),
            (),
            about["provenance"],
            about["target"],
            True,
            segments=tensors["segments"],
            index=tensors["index"],
            weighings=weighings,
        )


def spread(
    index: Int[Tensor, "pixel_height pixel_width"], weights: Float[Tensor, " segment"]
) -> Float[Tensor, "pixel_height pixel_width"]:
    """Each segment's weight at its pixels, float32; 0 where there is no segment."""
    return torch.where(index >= 0, weights[index.clamp_min(0)], 0.0).float()

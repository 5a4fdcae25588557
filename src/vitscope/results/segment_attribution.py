"""Results that have one weight a segment: LIME's, KernelSHAP's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.results.attribution import Attribution
from vitscope.validation import at_least, class_index, number, require_mapping, require_tensor, text_of, whole_number

Own = TypeVar("Own", bound="SegmentAttribution")


@dataclass(frozen=True, eq=False, repr=False)
class LinearFit:
    """What a linear model of one image says about one class.

    Attributes:
        label: the class.
        index: its place among the model's classes.
        answer: the model's answer to the whole image.
        weights: float64, one a segment, in the order of the sorted labels.
        intervals: float64 (segment, 2), lower and upper end; None where a method has none.
        intercept: what the linear model says when everything is hidden.
        score: the weighted R² of the linear model on what it was fitted to.
    """

    label: str
    index: int
    answer: float
    weights: Float[Tensor, " segment"]
    intervals: Float[Tensor, "segment 2"] | None
    intercept: float
    score: float

    def __repr__(self) -> str:
        return f"<LinearFit of {text_of(self.label, '')} ({self.index}): {len(self.weights)} segments>"

    def as_json(self) -> dict[str, Any]:
        intervals = None if self.intervals is None else self.intervals.tolist()
        return {**vars(self), "weights": self.weights.tolist(), "intervals": intervals}


@dataclass(frozen=True, eq=False, repr=False)
class SegmentedImage:
    """The segments of one image, and the linear model of each class that was asked about.

    Attributes:
        segments: (pixel height, pixel width), the labels.
        index: the place of each pixel's label among the weights; −1 where nothing is ever hidden.
        fits: one for each class, the target's first.
    """

    segments: Int[Tensor, "pixel_height pixel_width"]
    index: Int[Tensor, "pixel_height pixel_width"]
    fits: Sequence[LinearFit]

    def __repr__(self) -> str:
        height, width = self.segments.shape
        count = len(self.fits[0].weights)
        return f"<SegmentedImage of {height}×{width} pixels: {count} segments, {len(self.fits)} classes>"

    def of(self, target: int | str) -> "SegmentedImage":
        """The same with another class first."""
        labels = [fit.label for fit in self.fits]
        if isinstance(target, str) and not target.isdecimal():
            at = class_index(target, labels, len(labels))
        else:
            indices = [fit.index for fit in self.fits]
            wanted = whole_number(int(target) if isinstance(target, str) else target, "target")
            if wanted not in indices:
                raise CallError(f"class {wanted} was not asked about: this result has {indices} ({'; '.join(labels)})")
            at = indices.index(wanted)
        first = self.fits[at]
        return replace(self, fits=[first, *(other for other in self.fits if other is not first)])

    def values(self) -> Float[Tensor, "1 pixel_height pixel_width"]:
        """The first class's weights at every pixel, float32; 0 where there is no segment."""
        weights = self.fits[0].weights[self.index.clamp_min(0)]
        return weights.masked_fill(self.index < 0, 0.0).float()[None]

    def as_json(self) -> dict[str, Any]:
        """Where each segment lies, and each class's weights with intervals."""
        inside, count = self.index >= 0, len(self.fits[0].weights)
        index = self.index[inside]
        sizes = torch.bincount(index, minlength=count)
        labels = self.segments.new_zeros(count).scatter_(0, index, self.segments[inside])
        rows, columns = (
            torch.bincount(index, weights=places, minlength=count) / sizes.clamp_min(1)
            for places in inside.nonzero().double().unbind(1)
        )
        segments = [
            {"label": label, "pixels": size, "centre": [round(row, 1), round(column, 1)]}
            for label, size, row, column in zip(*(t.tolist() for t in (labels, sizes, rows, columns)), strict=True)
        ]
        return {"segments": segments, "classes": [fit.as_json() for fit in self.fits]}


@dataclass(frozen=True, eq=False, repr=False)
class SegmentAttribution(Attribution):
    """One weight for each segment of an image, painted on its pixels.

    ``values`` are the weights at every pixel, float32 (batch, pixel height, pixel width). The same questions were
    answered for several classes: :meth:`of` is the result for another one of :attr:`classes`, without asking the model
    again. What follows is of one image; of a result of several take ``result[i]`` first.
    """

    parts: Sequence[SegmentedImage] = field(kw_only=True)

    def _more_lines(self) -> list[str]:
        if len(self.parts) != 1:
            return [f"  segments: of {len(self.parts)} images; take one, as in result[0]"]
        return [f"  segments: {len(self.weights)}, weights for {len(self.classes)} classes"]

    @property
    def segments(self) -> Int[Tensor, "pixel_height pixel_width"]:
        """The label of each pixel."""
        return self._part.segments

    @property
    def index(self) -> Int[Tensor, "pixel_height pixel_width"]:
        """The place of each pixel's label in :attr:`weights`; −1 where nothing is ever hidden."""
        return self._part.index

    @property
    def classes(self) -> list[str]:
        """The classes that :meth:`of` has, the target first."""
        return [fit.label for fit in self._part.fits]

    @property
    def weights(self) -> Float[Tensor, " segment"]:
        """Float64: what each segment adds to the target's answer, in the order of the segments' sorted labels."""
        return self._fit.weights

    @property
    def intervals(self) -> Float[Tensor, "segment 2"] | None:
        """Float64: lower and upper end of the interval of each weight; None where the method gives none."""
        return self._fit.intervals

    @property
    def answer(self) -> float:
        """The model's answer to the whole image."""
        return self._fit.answer

    @property
    def intercept(self) -> float:
        """The linear model's answer when everything is hidden."""
        return self._fit.intercept

    @property
    def score(self) -> float:
        """The weighted R² of the linear model."""
        return self._fit.score

    @property
    def local_prediction(self) -> float:
        """The linear model's answer to the whole image."""
        return self.intercept + float(self.weights.sum())

    @property
    def class_indices(self) -> list[int]:
        """The places of :attr:`classes` among the model's classes."""
        return [fit.index for fit in self._part.fits]

    def of(self: Own, target: int | str) -> Own:
        """The same questions' result for another class, by index or label.

        Raises:
            CallError: it was not asked about.
        """
        parts = [part.of(target) for part in self.parts]
        values, label = torch.cat([part.values() for part in parts]), parts[0].fits[0].label
        return replace(self, values=values, target=label, parts=parts)

    def top(self, count: int = 5, *, sign: str = "positive") -> list[int]:
        """Places of the weightiest segments among the sorted labels: supporting ones, ``"negative"`` or ``"both"``."""
        signs = {"positive": self.weights, "negative": -self.weights, "both": self.weights.abs()}
        if sign not in signs:
            raise CallError(f"sign is {sign!r}: choose {', '.join(signs)}")
        strength = signs[sign]
        order = strength.argsort(descending=True, stable=True)[: at_least(0, count, "count")]
        return [at for at in order.tolist() if strength[at] > 0]

    def regions(self, count: int = 5, *, sign: str = "positive") -> Bool[Tensor, "pixel_height pixel_width"]:
        """Where the :meth:`top` segments are."""
        chosen = torch.zeros(len(self.weights), dtype=torch.bool, device=self.weights.device)
        chosen[self.top(count, sign=sign)] = True
        return (self.index >= 0) & chosen[self.index.clamp_min(0)]

    def as_json(self) -> dict[str, Any]:
        """Segments, weights and intervals of each image; the arrays are in the other formats."""
        return {**self._about(), "images": [part.as_json() for part in self.parts]}

    @property
    def _part(self) -> SegmentedImage:
        if len(self.parts) != 1:
            raise CallError(f"this result holds {len(self.parts)} images: take one, as in result[0]")
        return self.parts[0]

    @property
    def _fit(self) -> LinearFit:
        return self._part.fits[0]

    def _one(self, at: int) -> dict[str, Any]:
        part = self.parts[at]
        return {**super()._one(at), "parts": [part], "target": part.fits[0].label}

    @classmethod
    def _together(cls: type[Own], results: Sequence[Own]) -> dict[str, Any]:
        return {**super()._together(results), "parts": [part for result in results for part in result.parts]}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        for at, part in enumerate(self.parts):
            tensors |= {f"segments.{at}": part.segments, f"index.{at}": part.index}
            for rank, fit in enumerate(part.fits):
                tensors[f"weights.{at}.{rank}"] = fit.weights
                if fit.intervals is not None:
                    tensors[f"intervals.{at}.{rank}"] = fit.intervals
        return tensors

    def _about(self) -> dict[str, Any]:
        scalars = ("label", "index", "answer", "intercept", "score")
        parts = [[{name: getattr(one, name) for name in scalars} for one in part.fits] for part in self.parts]
        return {**super()._about(), "parts": parts}

    @classmethod
    def _fields(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._fields(tensors, about)
        values, entries = fields["values"], about["parts"]
        if not isinstance(entries, list) or len(entries) != len(values):
            raise ValueError(f"it does not hold the segments of {len(values)} images")
        parts = [_saved_part(tensors, at, classes, fields["grid"]) for at, classes in enumerate(entries)]
        for part, painted in zip(parts, values, strict=True):
            if not torch.allclose(part.values()[0], painted, rtol=1e-5, atol=1e-12):
                raise ValueError("its values are not the weights of its segments")
        return {**fields, "parts": parts}


def _saved_part(tensors: Mapping[str, Tensor], at: int, classes: Any, grid: Grid) -> SegmentedImage:
    """The segments of one image, as :meth:`SegmentAttribution._tensors` wrote them."""
    if not isinstance(classes, list) or not classes:
        raise ValueError("an image has no classes")
    size = (grid.height, grid.width)
    kind = tensors[f"segments.{at}"].dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(f"segments.{at} holds {kind}, not whole numbers")
    segments = require_tensor(tensors, f"segments.{at}", kind, size)
    index = require_tensor(tensors, f"index.{at}", tensors[f"index.{at}"].dtype, size)
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index.{at} holds {index.dtype}, not whole numbers")
    fits = [
        _saved_fit(tensors, f"{at}.{rank}", require_mapping(entry, "a class")) for rank, entry in enumerate(classes)
    ]
    count = len(fits[0].weights)
    if any(len(fit.weights) != count for fit in fits):
        raise ValueError("its classes have different numbers of segments")
    if int(index.min()) < -1 or int(index.max()) >= count:
        raise ValueError(f"index.{at} names segments that have no weight")
    return SegmentedImage(segments, index, fits)


def _saved_fit(tensors: Mapping[str, Tensor], place: str, entry: Mapping[str, Any]) -> LinearFit:
    """The linear model of one class, as it was written."""
    weights = require_tensor(tensors, f"weights.{place}", torch.float64, (None,))
    intervals = None
    if f"intervals.{place}" in tensors:
        intervals = require_tensor(tensors, f"intervals.{place}", torch.float64, (len(weights), 2))
    if not isinstance(entry["label"], str):
        raise ValueError("the label of a class is not text")
    scalars = {name: float(number(entry[name], name)) for name in ("answer", "intercept", "score")}
    return LinearFit(
        entry["label"], at_least(0, entry["index"], "index"), weights=weights, intervals=intervals, **scalars
    )

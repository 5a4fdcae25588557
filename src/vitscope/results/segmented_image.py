"""The segments of an image, and the linear model of each explained class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.errors import CallError
from vitscope.estimators.shapley import shapley
from vitscope.estimators.surrogate import fit
from vitscope.results.map_sizes import Size
from vitscope.results.samples import SampledOutput, Samples
from vitscope.typing import ClassTarget, Contrast
from vitscope.validation import (
    require_at_least,
    require_class_index,
    require_integer,
    require_mapping,
    require_number,
    require_tensor,
    short_repr,
    short_text,
)


@dataclass(frozen=True, eq=False, repr=False)
class LinearFit:
    """The linear model of one image and one class.

    Attributes:
        label: the class, or the target that is not a class, such as the contrast "boxer − bull mastiff".
        index: index of the class in the model's output; None if the target is not a class.
        output: the model's output for the unchanged image.
        weights: float64 (segment,), in the order of the sorted labels.
        intervals: float64 (segment, 2), lower and upper end of each weight's interval; None if the method has none.
        intercept: output of the linear model if all segments are hidden.
        score: weighted R² of the linear model on the samples that it was fitted to, which rises with every segment.
        held_out_score: weighted R² on samples that were left out of the fit (leave-one-out cross-validation; a mask and
            its complement are left out together). 0 is as good as their mean. None if it is not determined, as with
            fewer samples than segments and no penalty, or if the outputs do not vary.
    """

    label: str
    index: int | None
    output: float
    weights: Float[Tensor, " segment"]
    intervals: Float[Tensor, "segment 2"] | None
    intercept: float
    score: float
    held_out_score: float | None = None

    def __repr__(self) -> str:
        index = "" if self.index is None else f" ({self.index})"
        return f"<LinearFit of {short_text(self.label, '')}{index}: {len(self.weights)} segments>"

    @property
    def undecided(self) -> Bool[Tensor, " segment"] | None:
        """True for each weight whose interval holds 0; None without intervals."""
        return None if self.intervals is None else (self.intervals[:, 0] <= 0) & (self.intervals[:, 1] >= 0)

    def as_json(self) -> dict[str, Any]:
        """Return all attributes as JSON values."""
        intervals = None if self.intervals is None else self.intervals.tolist()
        return {**vars(self), "weights": self.weights.tolist(), "intervals": intervals}


@dataclass(frozen=True, eq=False, repr=False)
class SegmentedImage:
    """The segments of one image, and a linear model for each explained class.

    Attributes:
        segments: the label of each pixel.
        index: the position in the weights of each pixel's segment; −1 for pixels that are never hidden.
        fits: one linear model per class, that of the target first.
        samples: the masks and outputs, from which other classes are explained; None if they are not stored.
    """

    segments: Int[Tensor, "pixel_height pixel_width"]
    index: Int[Tensor, "pixel_height pixel_width"]
    fits: Sequence[LinearFit]
    samples: Samples | None = None

    def __repr__(self) -> str:
        height, width = self.segments.shape
        count = len(self.fits[0].weights)
        return f"<SegmentedImage of {height}×{width} pixels: {count} segments, {len(self.fits)} classes>"

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        height, width = self.segments.shape
        return height, width

    def of(self, target: ClassTarget | Contrast, parameters: Mapping[str, Any] | None = None) -> "SegmentedImage":
        """Return the same segments with the linear model of another class, or of a contrast of two, first.

        Args:
            target: index or label, or a pair.
            parameters: of the method, for a class without a linear model.

        Raises:
            CallError: the model has no such class, or the class has neither a linear model nor stored outputs.
        """
        first = self._fit_or_none(target)
        if first is None:
            assert self.samples is not None, "without samples, a class without a linear model is refused"
            first = linear_fit(self.samples, self.samples.output(target), parameters or {})
        rest = [fit for fit in self.fits if (fit.label, fit.index) != (first.label, first.index)]
        return replace(self, fits=[first, *rest])

    def _fit_or_none(self, target: ClassTarget | Contrast) -> LinearFit | None:
        """Return the linear model of a target; None if it has to be fitted to the samples."""
        classes = [fit for fit in self.fits if fit.index is not None]
        if isinstance(target, tuple):
            if self.samples is None:
                raise CallError(
                    f"{short_repr(target)} was not explained, and this result holds no outputs to do it now: explain "
                    "the image with this target="
                )
            label = self.samples.output(target).label
            return next((fit for fit in self.fits if fit.index is None and fit.label == label), None)
        if isinstance(target, str) and not target.isdecimal():
            # A class comes before a contrast with a synonym of it.
            exact = next((fit for fit in self.fits if fit.index is None and fit.label == target.strip()), None)
            if exact is not None:
                return exact
        if self.samples is not None:
            index = require_class_index(target, self.samples.labels, len(self.samples.labels))
            return next((fit for fit in classes if fit.index == index), None)
        return self._require_fit(target, classes or self.fits)

    def _require_fit(self, target: ClassTarget, candidates: Sequence[LinearFit]) -> LinearFit:
        """Return the linear model of a class that was explained, of a result without outputs of other classes."""
        names = [fit.label for fit in candidates]
        advice = "for another class, explain the image with target= or a larger top_labels="
        if isinstance(target, str) and not target.isdecimal():
            try:
                return candidates[require_class_index(target, names, len(names))]
            except CallError:
                raise CallError(
                    f"{target!r} was not explained: this result has the classes {', '.join(names)}; {advice}"
                ) from None
        index = require_integer(int(target) if isinstance(target, str) else target, "target")
        match = next((fit for fit in candidates if fit.index == index), None)
        if match is None:
            indices = [fit.index for fit in candidates if fit.index is not None]
            raise CallError(
                f"class {index} was not explained: this result has the classes {indices} ({'; '.join(names)}); {advice}"
            )
        return match

    def values(self) -> Float[Tensor, "1 pixel_height pixel_width"]:
        """Return the weights of the first class at every pixel, float32; 0 for pixels without a segment."""
        weights = self.fits[0].weights[self.index.clamp_min(0)]
        return weights.masked_fill(self.index < 0, 0.0).float()[None]

    def as_json(self) -> dict[str, Any]:
        """Return the label, size and centre of each segment, and the linear model of each class, as JSON values."""
        inside, count = self.index >= 0, len(self.fits[0].weights)
        index = self.index[inside]
        sizes = torch.bincount(index, minlength=count)
        labels = self.segments.new_zeros(count).scatter_(0, index, self.segments[inside])
        rows, columns = (
            torch.bincount(index, weights=coordinates, minlength=count) / sizes.clamp_min(1)
            for coordinates in inside.nonzero().double().unbind(1)
        )
        segments = [
            {"label": label, "pixels": size, "centre": [round(row, 1), round(column, 1)]}
            for label, size, row, column in zip(
                *(tensor.tolist() for tensor in (labels, sizes, rows, columns)), strict=True
            )
        ]
        return {"segments": segments, "classes": [fit.as_json() for fit in self.fits]}


def linear_fit(samples: Samples, output: SampledOutput, parameters: Mapping[str, Any]) -> LinearFit:
    """Return the linear model of an output, fitted as by the method that drew the masks.

    Args:
        samples: of LIME, if they have groups, or of KernelSHAP.
        output: the outputs for the masks.
        parameters: of the method.
    """
    values = output.values[:, None]
    weights = samples.weights
    assert weights is not None, "the samples of a regression are weighted"
    intervals = None
    if samples.groups is None:
        coefficients, (score,), (held_out,) = shapley(samples.masks[2:], weights[2:], values[2:], values[:2])
        intercept = values[0, 0]
    else:
        surrogate = fit(samples.masks, values, weights, parameters["alpha"], samples.groups)
        coefficients, (score,), (held_out,) = surrogate.weights, surrogate.scores, surrogate.held_out_scores
        intervals = torch.from_numpy(surrogate.intervals(parameters["confidence"])[0].copy())
        (intercept,) = surrogate.intercepts
    return LinearFit(
        output.label,
        output.index,
        output.original,
        torch.from_numpy(coefficients[0].copy()),
        intervals,
        float(intercept),
        float(score),
        number_or_none(held_out),
    )


def number_or_none(value: float) -> float | None:
    """Return a number, or None for NaN."""
    return None if np.isnan(value) else float(value)


def parse_image(tensors: Mapping[str, Tensor], image: int, classes: Any, size: Size, samples: Any) -> SegmentedImage:
    """Return the segments of an image from the tensors and metadata of a saved file.

    Args:
        tensors: of the file.
        image: its index.
        classes: metadata of its linear models.
        size: (height, width) of the image.
        samples: metadata of its samples; None if they were not stored.

    Raises:
        KeyError, TypeError, ValueError: an entry is missing, or contradicts the others.
    """
    if not isinstance(classes, list) or not classes:
        raise ValueError("an image has no classes")
    dtype = tensors[f"segments.{image}"].dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"segments.{image} holds {dtype}, not whole numbers")
    segments = require_tensor(tensors, f"segments.{image}", dtype, size)
    index = require_tensor(tensors, f"index.{image}", tensors[f"index.{image}"].dtype, size)
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index.{image} holds {index.dtype}, not whole numbers")
    fits = [
        _parse_fit(tensors, f"{image}.{rank}", require_mapping(entry, "a class")) for rank, entry in enumerate(classes)
    ]
    count = len(fits[0].weights)
    if any(len(fit.weights) != count for fit in fits):
        raise ValueError("its classes have different numbers of segments")
    if int(index.min()) < -1 or int(index.max()) >= count:
        raise ValueError(f"index.{image} names segments that have no weight")
    if samples is None:
        return SegmentedImage(segments, index, fits)
    parsed = Samples.parse(tensors, str(image), require_mapping(samples, "samples"))
    if parsed.masks.shape[1] != count or len(parsed.masks) < 2 or parsed.weights is None:
        raise ValueError(f"masks.{image} are not masks over {count} segments with their weights")
    return SegmentedImage(segments, index, fits, parsed)


def _parse_fit(tensors: Mapping[str, Tensor], suffix: str, entry: Mapping[str, Any]) -> LinearFit:
    """Return the linear model of one class; ``suffix`` ends the names of its tensors."""
    weights = require_tensor(tensors, f"weights.{suffix}", torch.float64, (None,))
    intervals = None
    if f"intervals.{suffix}" in tensors:
        intervals = require_tensor(tensors, f"intervals.{suffix}", torch.float64, (len(weights), 2))
    if not isinstance(entry["label"], str):
        raise ValueError("the label of a class is not text")
    scalars = {name: float(require_number(entry[name], name)) for name in ("output", "intercept", "score")}
    index = None if entry["index"] is None else require_at_least(0, entry["index"], "index")
    held_out = (
        None if entry.get("held_out_score") is None else require_number(entry["held_out_score"], "held_out_score")
    )
    return LinearFit(entry["label"], index, weights=weights, intervals=intervals, held_out_score=held_out, **scalars)

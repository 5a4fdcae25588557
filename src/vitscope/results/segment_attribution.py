"""Results of LIME and KernelSHAP: one weight per segment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.display import counted
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.results.attribution import Attribution
from vitscope.results.colours import ColourScale, colour_scale
from vitscope.typing import ClassTarget
from vitscope.validation import (
    require_at_least,
    require_class_index,
    require_integer,
    require_mapping,
    require_number,
    require_tensor,
    short_text,
)

Result = TypeVar("Result", bound="SegmentAttribution")


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
        score: weighted R² of the linear model on its samples.
    """

    label: str
    index: int | None
    output: float
    weights: Float[Tensor, " segment"]
    intervals: Float[Tensor, "segment 2"] | None
    intercept: float
    score: float

    def __repr__(self) -> str:
        index = "" if self.index is None else f" ({self.index})"
        return f"<LinearFit of {short_text(self.label, '')}{index}: {len(self.weights)} segments>"

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
    """

    segments: Int[Tensor, "pixel_height pixel_width"]
    index: Int[Tensor, "pixel_height pixel_width"]
    fits: Sequence[LinearFit]

    def __repr__(self) -> str:
        height, width = self.segments.shape
        count = len(self.fits[0].weights)
        return f"<SegmentedImage of {height}×{width} pixels: {count} segments, {len(self.fits)} classes>"

    def of(self, target: ClassTarget) -> "SegmentedImage":
        """Return the same segments and linear models with another class first.

        Raises:
            CallError: the class was not explained.
        """
        first = self._fit_of(target)
        return replace(self, fits=[first, *(fit for fit in self.fits if fit is not first)])

    def _fit_of(self, target: ClassTarget) -> LinearFit:
        labels = [fit.label for fit in self.fits]
        classes = [fit for fit in self.fits if fit.index is not None]
        if isinstance(target, str) and not target.isdecimal():
            # A class comes before a contrast with a synonym of it.
            exact = next((fit for fit in self.fits if fit.index is None and fit.label == target.strip()), None)
            if exact is not None:
                return exact
            candidates = classes or self.fits
            names = [fit.label for fit in candidates]
            try:
                return candidates[require_class_index(target, names, len(names))]
            except CallError:
                raise CallError(
                    f"{target!r} was not explained: this result has the classes {', '.join(names)}; for another class, "
                    "explain the image with target= or a larger top_labels="
                ) from None
        index = require_integer(int(target) if isinstance(target, str) else target, "target")
        match = next((fit for fit in classes if fit.index == index), None)
        if match is None:
            indices = [fit.index for fit in classes]
            raise CallError(
                f"class {index} was not explained: this result has the classes {indices} ({'; '.join(labels)}); for "
                "another class, explain the image with target= or a larger top_labels="
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


@dataclass(frozen=True, eq=False, repr=False)
class SegmentAttribution(Attribution):
    """One weight for each segment of an image.

    ``values`` are the weights at every pixel, float32 (batch, pixel height, pixel width). The same samples explain
    several classes: :meth:`of` returns the result for another one of :attr:`classes`, without evaluating the model
    again. The properties, :meth:`top` and :meth:`regions` need the result of a single image: use ``result[i]`` first.

    Attributes:
        segmented_images: the segments and linear models of each image.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model = vs.load("vit-nano")
        >>> result = vs.lime(model, skimage.data.chelsea(), segments="patches", num_samples=80)
        >>> len(result.weights) == len(result.segments.unique())
        True
        >>> result.of(result.classes[1]).target == result.classes[1]
        True
    """

    segmented_images: Sequence[SegmentedImage] = field(kw_only=True)

    def _extra_repr(self) -> list[str]:
        if len(self.segmented_images) != 1:
            return []
        return [counted(len(self.weights), "segment"), f"{len(self.classes)} class{'es' * (len(self.classes) != 1)}"]

    def colour_scale(self, index: int = 0) -> ColourScale:
        """Return the values at the ends of the colours of one image's map: a single segment is no outlier."""
        return colour_scale(self.values[self._require_index(index)].cpu().numpy(), signed=self.signed, clip=False)

    @property
    def segments(self) -> Int[Tensor, "pixel_height pixel_width"]:
        """The label of each pixel."""
        return self._image.segments

    @property
    def index(self) -> Int[Tensor, "pixel_height pixel_width"]:
        """The position in :attr:`weights` of each pixel's segment; −1 for pixels that are never hidden."""
        return self._image.index

    @property
    def classes(self) -> list[str]:
        """Labels of the explained classes, the target first, whether or not it is a class."""
        return [fit.label for fit in self._image.fits]

    @property
    def class_indices(self) -> list[int | None]:
        """Indices of :attr:`classes` in the model's output; None for a target that is not a class."""
        return [fit.index for fit in self._image.fits]

    @property
    def weights(self) -> Float[Tensor, " segment"]:
        """The contribution of each segment to the target's output, float64, in the order of the sorted labels."""
        return self._fit.weights

    @property
    def intervals(self) -> Float[Tensor, "segment 2"] | None:
        """Lower and upper end of each weight's interval, float64; None if the method has none."""
        return self._fit.intervals

    @property
    def output(self) -> float:
        """The model's output for the unchanged image."""
        return self._fit.output

    @property
    def intercept(self) -> float:
        """The linear model's output if all segments are hidden."""
        return self._fit.intercept

    @property
    def score(self) -> float:
        """The weighted R² of the linear model."""
        return self._fit.score

    @property
    def local_prediction(self) -> float:
        """The linear model's output for the unchanged image."""
        return self.intercept + float(self.weights.sum())

    def of(self: Result, target: ClassTarget) -> Result:
        """Return the result for another class, from the same samples.

        Args:
            target: index or label of the class, one of :attr:`classes`; a contrast by its label.

        Raises:
            CallError: the class was not explained.
        """
        images = [image.of(target) for image in self.segmented_images]
        values, label = torch.cat([image.values() for image in images]), images[0].fits[0].label
        return replace(self, values=values, target=label, segmented_images=images)

    def top(self, count: int = 5, *, sign: str = "positive") -> list[int]:
        """Return the positions in :attr:`weights` of the segments with the largest weights, largest first.

        Args:
            count: maximum number of segments.
            sign: ``"positive"`` for segments that support the target, ``"negative"`` for those that oppose it,
                ``"both"`` for the largest magnitudes.

        Raises:
            CallError: ``sign`` is none of these, ``count`` is not a whole number or is negative, or the result holds
                several images.
        """
        signs = {"positive": self.weights, "negative": -self.weights, "both": self.weights.abs()}
        if sign not in signs:
            raise CallError(f"sign is {sign!r}: choose {', '.join(signs)}")
        strength = signs[sign]
        order = strength.argsort(descending=True, stable=True)[: require_at_least(0, count, "count")]
        return [position for position in order.tolist() if strength[position] > 0]

    def regions(self, count: int = 5, *, sign: str = "positive") -> Bool[Tensor, "pixel_height pixel_width"]:
        """Return a mask that is True for the pixels of the :meth:`top` segments.

        Args:
            count: maximum number of segments.
            sign: see :meth:`top`.

        Raises:
            CallError: as :meth:`top`.
        """
        selected = torch.zeros(len(self.weights), dtype=torch.bool, device=self.weights.device)
        selected[self.top(count, sign=sign)] = True
        return (self.index >= 0) & selected[self.index.clamp_min(0)]

    def as_json(self) -> dict[str, Any]:
        """Return the segments and linear models of each image as JSON values, without a value for every pixel."""
        return {**self._metadata(), "images": [image.as_json() for image in self.segmented_images]}

    @property
    def _image(self) -> SegmentedImage:
        if len(self.segmented_images) != 1:
            raise CallError(f"this result holds {len(self.segmented_images)} images: take one, as in result[0]")
        return self.segmented_images[0]

    @property
    def _fit(self) -> LinearFit:
        return self._image.fits[0]

    def _fields_of(self, index: int) -> dict[str, Any]:
        image = self.segmented_images[index]
        return {**super()._fields_of(index), "segmented_images": [image], "target": image.fits[0].label}

    @classmethod
    def _joined_fields(cls: type[Result], results: Sequence[Result]) -> dict[str, Any]:
        return {
            **super()._joined_fields(results),
            "segmented_images": [image for result in results for image in result.segmented_images],
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        for index, image in enumerate(self.segmented_images):
            tensors |= {f"segments.{index}": image.segments, f"index.{index}": image.index}
            for rank, fit in enumerate(image.fits):
                tensors[f"weights.{index}.{rank}"] = fit.weights
                if fit.intervals is not None:
                    tensors[f"intervals.{index}.{rank}"] = fit.intervals
        return tensors

    def _metadata(self) -> dict[str, Any]:
        names = ("label", "index", "output", "intercept", "score")
        images = [
            [{name: getattr(fit, name) for name in names} for fit in image.fits] for image in self.segmented_images
        ]
        return {**super()._metadata(), "segmented_images": images}

    @classmethod
    def _parse(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._parse(tensors, metadata)
        values, entries = fields["values"], metadata["segmented_images"]
        if not isinstance(entries, list) or len(entries) != len(values):
            raise ValueError(f"it does not hold the segments of {len(values)} images")
        images = [_parse_image(tensors, index, classes, fields["grid"]) for index, classes in enumerate(entries)]
        for image, saved in zip(images, values, strict=True):
            if not torch.allclose(image.values()[0], saved, rtol=1e-5, atol=1e-12):
                raise ValueError("its values are not the weights of its segments")
        return {**fields, "segmented_images": images}


def _parse_image(tensors: Mapping[str, Tensor], image: int, classes: Any, grid: Grid) -> SegmentedImage:
    """Return the segments of image ``image`` from the tensors and metadata of a saved file."""
    if not isinstance(classes, list) or not classes:
        raise ValueError("an image has no classes")
    size = (grid.height, grid.width)
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
    return SegmentedImage(segments, index, fits)


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
    return LinearFit(entry["label"], index, weights=weights, intervals=intervals, **scalars)

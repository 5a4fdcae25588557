"""Results of LIME and KernelSHAP: one weight per segment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.display import counted
from vitscope.errors import CallError
from vitscope.results.attribution import Attribution
from vitscope.results.colours import ColourScale, colour_scale
from vitscope.results.map_sizes import enlarged
from vitscope.results.segmented_image import LinearFit, SegmentedImage, parse_image
from vitscope.typing import ClassTarget, Contrast
from vitscope.validation import require_at_least, require_number

Result = TypeVar("Result", bound="SegmentAttribution")


@dataclass(frozen=True, eq=False, repr=False)
class SegmentAttribution(Attribution):
    """One weight for each segment of an image.

    ``values`` are the weights at every pixel, float32 (batch, pixel height, pixel width). The same samples explain
    every class: :meth:`of` returns the result for another class, or for a contrast of two, without evaluating the model
    again. The properties, :meth:`top` and :meth:`regions` need the result of a single image: use ``result[i]`` first.

    Attributes:
        segmented_images: the segments and linear models of each image.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model = vs.load("vit-nano")
        >>> result = vs.lime(model, skimage.data.chelsea(), segments="patches", num_samples=80)
        >>> len(result.weights) == len(result.segments.unique())
        True
        >>> result.of("dog").target, result.of(("cat", "dog")).target
        ('dog', 'cat − dog')
    """

    segmented_images: Sequence[SegmentedImage] = field(kw_only=True)

    _covers_photo = True

    def _extra_repr(self) -> list[str]:
        if len(self.segmented_images) != 1:
            return []
        return [counted(len(self.weights), "segment"), f"{len(self.classes)} class{'es' * (len(self.classes) != 1)}"]

    def colour_scale(self, index: int = 0) -> ColourScale:
        """Return the values at the ends of the colours of one image's map: a single segment is no outlier."""
        return colour_scale(self[index].values[0].cpu().numpy(), signed=self.signed, clip=False)

    def pale_pixels(self, index: int = 0) -> Bool[np.ndarray, "pixel_height pixel_width"] | None:
        """Return the pixels of segments whose interval holds 0; None if the method has no intervals."""
        image = self.segmented_images[self._require_index(index)]
        undecided = image.fits[0].undecided
        if undecided is None:
            return None
        return ((image.index >= 0) & undecided[image.index.clamp_min(0)]).cpu().numpy()

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
    def undecided(self) -> Bool[Tensor, " segment"] | None:
        """True for each weight whose interval holds 0: it cannot be told from none; None without intervals."""
        return self._fit.undecided

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
        """The weighted R² of the linear model on the samples that it was fitted to, which rises with every segment."""
        return self._fit.score

    @property
    def held_out_score(self) -> float | None:
        """The weighted R² of the linear model on samples that were left out of the fit.

        See :class:`~vitscope.results.segmented_image.LinearFit`.
        """
        return self._fit.held_out_score

    @property
    def local_prediction(self) -> float:
        """The linear model's output for the unchanged image."""
        return self.intercept + float(self.weights.sum())

    @property
    def labels(self) -> list[str]:
        """Labels of all classes that :meth:`of` takes, in the order of the model's output."""
        image = self._image
        if image.samples is None:
            return self.classes
        return [image.samples.labels[index] for index in sorted(image.samples.classes.tolist())]

    def of(self: Result, target: ClassTarget | Contrast) -> Result:
        """Return the result for another class, or for a contrast of two, from the same samples.

        It equals the result of the method with this ``target`` to the last bit, if both have as many samples.

        Args:
            target: index or label of any class of the model, or a pair of these; the label of a target in
                :attr:`classes` that is no class.

        Raises:
            CallError: the model has no such class, or its outputs are not stored.
        """
        if len(self) > 1:
            return self.join([result.of(target) for result in self])
        image = self._image.of(target, self.provenance.get("parameters", {}))
        return replace(self, values=image.values(), target=image.fits[0].label, segmented_images=[image])

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
            if image.samples is not None:
                tensors |= image.samples.tensors(str(index))
        return tensors

    def _metadata(self) -> dict[str, Any]:
        names = ("label", "index", "output", "intercept", "score", "held_out_score")
        images = [
            [{name: getattr(fit, name) for name in names} for fit in image.fits] for image in self.segmented_images
        ]
        return {**super()._metadata(), "segmented_images": images}

    def _saved_metadata(self) -> dict[str, Any]:
        samples = [None if image.samples is None else image.samples.metadata() for image in self.segmented_images]
        return {**super()._saved_metadata(), "samples": samples}

    @classmethod
    def _parse(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._parse(tensors, metadata)
        values, entries = fields["values"], metadata["segmented_images"]
        if not isinstance(entries, list) or len(entries) != len(values):
            raise ValueError(f"it does not hold the segments of {len(values)} images")
        grid = (fields["grid"].height, fields["grid"].width)
        sizes, samples = fields["sizes"] or [grid] * len(values), metadata.get("samples") or [None] * len(values)
        if not isinstance(samples, list) or len(samples) != len(values):
            raise ValueError(f"it does not hold the samples of {len(values)} images")
        images = [
            parse_image(tensors, index, *described)
            for index, described in enumerate(zip(entries, sizes, samples, strict=True))
        ]
        for image, saved in zip(images, values, strict=True):
            if not torch.allclose(enlarged(image.values(), grid)[0], saved, rtol=1e-5, atol=1e-12):
                raise ValueError("its values are not the weights of its segments")
        _check_parameters(fields["provenance"], images)
        return {**fields, "segmented_images": images}


def _check_parameters(provenance: Mapping[str, Any], images: Sequence[SegmentedImage]) -> None:
    """Check the parameters that other classes of LIME are fitted with.

    Raises:
        KeyError, ValueError: one is missing, or is not a number.
    """
    records = provenance.get("images", [provenance] * len(images))
    for record, image in zip(records, images, strict=True):
        if image.samples is not None and image.samples.groups is not None:
            for name in ("alpha", "confidence"):
                require_number(record["parameters"][name], name)

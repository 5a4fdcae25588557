"""Results of RISE and occlusion: maps that are means over the outputs for masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitscope.errors import CallError
from vitscope.estimators.occlusion_drops import mean_drops
from vitscope.estimators.soft_masks import mean_output_if_visible
from vitscope.results.attribution import Attribution
from vitscope.results.map_sizes import Size
from vitscope.results.samples import SampledOutput, Samples
from vitscope.typing import ClassTarget, Contrast
from vitscope.validation import require_mapping, require_ratio, short_repr

Result = TypeVar("Result", bound="SampledAttribution")


@dataclass(frozen=True, eq=False, repr=False)
class SampledAttribution(Attribution):
    """Maps that are computed from the outputs for masks.

    The same outputs explain every class: :meth:`of` returns the result for another class, or for a contrast of two,
    without evaluating the model again.

    Attributes:
        samples: the masks and outputs of each image; None if they are not stored.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.occlusion(vs.load("vit-nano"), skimage.data.chelsea())
        >>> result.target, result.of("dog").target, result.of((3, 5)).target
        ('cat', 'dog', 'cat − dog')
    """

    samples: Sequence[Samples | None] = field(kw_only=True)

    _covers_photo = True

    @property
    def labels(self) -> list[str]:
        """Labels of all classes that :meth:`of` takes, in the order of the model's output."""
        samples = self.samples[0]
        return [] if samples is None else [samples.labels[index] for index in sorted(samples.classes.tolist())]

    @property
    def output(self) -> float | None:
        """The model's output for the unchanged image, of a result of one image; None if it is not stored."""
        samples = self.samples[0] if len(self.samples) == 1 else None
        if samples is None or self.target not in self.labels:
            return None
        return samples.output(self.target).original

    def of(self: Result, target: ClassTarget | Contrast) -> Result:
        """Return the result for another class, or for a contrast of two, from the same samples.

        It equals the result of the method with this ``target`` to the last bit.

        Args:
            target: index or label of any class of the model, or a pair of these.

        Raises:
            CallError: the model has no such class, or its outputs are not stored.
        """
        if len(self) > 1:
            return self.join([result.of(target) for result in self])
        samples = self.samples[0]
        if samples is None:
            raise CallError(
                f"{short_repr(target)} was not explained, and this result holds no outputs to do it now: explain the "
                "image with this target="
            )
        output, size = samples.output(target), (self.grid.height, self.grid.width)
        values = mean_map(samples.masks, samples.shifts, output, size, self.provenance["parameters"])
        return replace(self, values=values, target=output.label)

    def _fields_of(self, index: int) -> dict[str, Any]:
        return {**super()._fields_of(index), "samples": [self.samples[index]]}

    @classmethod
    def _joined_fields(cls: type[Result], results: Sequence[Result]) -> dict[str, Any]:
        return {
            **super()._joined_fields(results),
            "samples": [samples for result in results for samples in result.samples],
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        for index, samples in enumerate(self.samples):
            tensors |= {} if samples is None else samples.tensors(str(index))
        return tensors

    def _saved_metadata(self) -> dict[str, Any]:
        samples = [None if entry is None else entry.metadata() for entry in self.samples]
        return {**super()._saved_metadata(), "samples": samples}

    @classmethod
    def _parse(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
        fields, entries = super()._parse(tensors, metadata), metadata["samples"]
        if not isinstance(entries, list) or len(entries) != len(fields["values"]):
            raise ValueError(f"it does not hold the samples of {len(fields['values'])} images")
        samples = [
            None if entry is None else Samples.parse(tensors, str(index), require_mapping(entry, "samples"))
            for index, entry in enumerate(entries)
        ]
        provenance = fields["provenance"]
        for record, parsed in zip(provenance.get("images", [provenance] * len(samples)), samples, strict=True):
            if parsed is not None:
                _check(parsed, record, (fields["grid"].height, fields["grid"].width))
        return {**fields, "samples": samples}


def mean_map(
    masks: Bool[np.ndarray, "sample cell"],
    shifts: Float[np.ndarray, "sample 2"] | None,
    output: SampledOutput,
    size: Size,
    parameters: Mapping[str, Any],
) -> Float[Tensor, "1 height width"]:
    """Return the map of an output, float32, computed as by the method that drew the masks.

    Args:
        masks: as in :class:`~vitscope.results.samples.Samples`.
        shifts: of the masks of RISE; None for occlusion.
        output: the outputs for the masks.
        size: (height, width) of the map.
        parameters: of the method.
    """
    if shifts is None:
        values = mean_drops(masks, output.values, output.original).reshape(size)
    else:
        cells = round(masks.shape[1] ** 0.5)
        bits, probability = masks.reshape(-1, cells, cells), parameters["keep_probability"]
        values = mean_output_if_visible(bits, shifts, output.values, output.original, probability, size)
    return torch.from_numpy(np.array(values)).float()[None]


def _check(samples: Samples, record: Mapping[str, Any], size: Size) -> None:
    """Check that a map can be computed from samples.

    Raises:
        KeyError, ValueError: the masks do not fit the map, or a parameter is missing or out of range.
    """
    cells = samples.masks.shape[1]
    if samples.shifts is None:
        if cells != size[0] * size[1]:
            raise ValueError(f"its masks have {cells} patches, and its maps {size[0]}×{size[1]}")
        return
    if round(cells**0.5) ** 2 != cells or not ((samples.shifts >= 0) & (samples.shifts <= 1)).all():
        raise ValueError("its masks are not shifted square grids")
    if not len(samples.masks) or not require_ratio(record["parameters"]["keep_probability"], "keep_probability"):
        raise ValueError("it has no masks, or no probability that a cell is visible")

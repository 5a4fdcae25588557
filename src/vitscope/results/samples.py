"""The masks over an image and the outputs for them, from which other classes are explained without the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitscope.display import counted
from vitscope.errors import CallError
from vitscope.typing import ClassTarget, Contrast
from vitscope.validation import (
    contrast_label,
    require_at_least,
    require_class_index,
    require_contrast,
    require_tensor,
)

# Outputs that differ by no more than this share of their magnitude are equal: batch sizes differ in their rounding.
ROUNDING_SHARE = 2e-6


@dataclass(frozen=True, eq=False)
class SampledOutput:
    """The outputs of a class, or of a contrast of two, for all masks.

    Attributes:
        label: the class, or the contrast.
        index: index of the class in the model's output; None for a contrast.
        values: for each mask.
        original: for the unchanged image.
    """

    label: str
    index: int | None
    values: Float[np.ndarray, " sample"]
    original: float


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """The masks over one image, and the model's outputs for them.

    Attributes:
        masks: what each mask is made of. LIME and KernelSHAP: True for each visible segment; KernelSHAP starts with the
            hidden image and the unchanged one. RISE: True for each visible cell of the coarse grid, row by row.
            Occlusion: True for each hidden patch.
        outputs: float32, of each class in ``classes``.
        classes: indices of the classes whose outputs are stored, the most probable first.
        original: float32, of each class in ``classes``, for the unchanged image.
        labels: of all classes of the model.
        weights: of each mask in the regression of LIME and KernelSHAP; None for other methods.
        groups: LIME: the number that a mask shares with its complement; None for other methods.
        shifts: RISE: the crop of each mask, see :func:`~vitscope.estimators.soft_masks.soft_mask`; None for others.
    """

    masks: Bool[np.ndarray, "sample cell"]
    outputs: Float[np.ndarray, "sample stored"]
    classes: Int[np.ndarray, " stored"]
    original: Float[np.ndarray, " stored"]
    labels: tuple[str, ...]
    weights: Float[np.ndarray, " sample"] | None = None
    groups: Int[np.ndarray, " sample"] | None = None
    shifts: Float[np.ndarray, "sample 2"] | None = None

    def __repr__(self) -> str:
        return f"<Samples: {counted(len(self.masks), 'mask')}, {len(self.classes)} of {len(self.labels)} classes>"

    def output(self, target: ClassTarget | Contrast) -> SampledOutput:
        """Return the outputs of a class, or of a contrast of two.

        Raises:
            CallError: the model has no such class, or its outputs are not stored.
        """
        if not isinstance(target, tuple):
            index = require_class_index(target, self.labels, len(self.labels))
            column = self._column(index)
            magnitude = abs(float(self.original[column]))
            return _sampled_output(self.labels[index], index, *self._numbers(column), magnitude)
        pair = require_contrast(target, self.labels, int(self.classes[0]))
        columns = [self._column(index) for index in pair]
        (values, original), (other_values, other_original) = map(self._numbers, columns)
        magnitude = float(np.abs(self.original[columns]).max())
        label = contrast_label(*(self.labels[index] for index in pair))
        return _sampled_output(label, None, values - other_values, original - other_original, magnitude)

    def _column(self, index: int) -> int:
        columns = np.flatnonzero(self.classes == index)
        if not len(columns):
            raise CallError(
                f"{self.labels[index]!r} is a class of this model, but was not evaluated: this result holds the "
                f"outputs of {len(self.classes)} of {len(self.labels)} classes; explain the image with target={index}"
            )
        return int(columns[0])

    def _numbers(self, column: int) -> tuple[Float[np.ndarray, " sample"], float]:
        return self.outputs[:, column].astype(np.float64), float(self.original[column])

    def tensors(self, suffix: str) -> dict[str, Tensor]:
        """Return the tensors of a saved file, whose names end in ``suffix``; masks are packed into bits."""
        arrays = {
            "masks": np.packbits(self.masks, axis=1),
            "outputs": self.outputs,
            "output_classes": self.classes,
            "original": self.original,
            "mask_weights": self.weights,
            "mask_groups": self.groups,
            "mask_shifts": self.shifts,
        }
        return {f"{name}.{suffix}": torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of a saved file."""
        return {"mask_size": self.masks.shape[1], "labels": list(self.labels)}

    @classmethod
    def parse(cls, tensors: Mapping[str, Tensor], suffix: str, entry: Mapping[str, Any]) -> "Samples":
        """Return samples from the tensors and metadata of a saved file.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing, or contradicts the others.
        """
        labels, cells = entry["labels"], require_at_least(1, entry["mask_size"], "mask_size")
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError("the labels of the classes are not texts")
        packed = require_tensor(tensors, f"masks.{suffix}", torch.uint8, (None, -(-cells // 8)))
        outputs = require_tensor(tensors, f"outputs.{suffix}", torch.float32, (len(packed), None))
        classes = require_tensor(tensors, f"output_classes.{suffix}", torch.int64, (outputs.shape[1],))
        if not len(classes) or not 0 <= int(classes.min()) <= int(classes.max()) < len(labels):
            raise ValueError(f"output_classes.{suffix} names classes that the model does not have")
        original = require_tensor(tensors, f"original.{suffix}", torch.float32, (len(classes),))
        optional = {
            name: require_tensor(tensors, key, dtype, (len(packed), *shape)).numpy()
            for name, dtype, shape in (
                ("weights", torch.float64, ()),
                ("groups", torch.int64, ()),
                ("shifts", torch.float64, (2,)),
            )
            if (key := f"mask_{name}.{suffix}") in tensors
        }
        if any((array < 0).any() for name, array in optional.items() if name != "shifts"):
            raise ValueError("a weight or a group of a mask is negative")
        if "groups" in optional and optional["groups"].max(initial=0) >= len(packed):
            raise ValueError(f"there are more groups than the {len(packed)} masks")
        masks = np.unpackbits(packed.numpy(), axis=1, count=cells).astype(bool)
        return cls(masks, outputs.numpy(), classes.numpy(), original.numpy(), tuple(labels), **optional)


def _sampled_output(
    label: str, index: int | None, values: Float[np.ndarray, " sample"], original: float, magnitude: float
) -> SampledOutput:
    return SampledOutput(label, index, without_rounding(values, original, magnitude), original)


def without_rounding(
    values: Float[np.ndarray, " sample"], original: float, magnitude: float
) -> Float[np.ndarray, " sample"]:
    """Return outputs for masks; if they differ from that for the original image only by rounding, return that.

    The output of a saturated sigmoid or softmax is the same whatever is hidden, and its last bits explain nothing.

    Args:
        values: for each mask.
        original: for the original image.
        magnitude: of the numbers whose rounding the values have.
    """
    if len(values) and np.abs(values - original).max() <= ROUNDING_SHARE * magnitude:
        return np.full_like(values, original)
    return values

"""Array types, and the glossary of their axes.

==============  ============================================================================
batch           images
window          windows of an image, whose tokens attend to each other (one in a plain ViT)
head            attention heads
query, key      the token that attends, the token that is attended to
token           prefix tokens (CLS, distillation, registers), then patches row by row
slot            a position in a window, which holds a token or padding
row             vectors over tokens that are processed together
merged          tokens after patch merging, each made of a group of four
height, width   of the token grid; of an image if the name contains "pixel"
==============  ============================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer
from torch import Tensor

Pixels = Float[Tensor, "batch input_channel pixel_height pixel_width"]
"""Model input."""

Weights = Float[Tensor, "batch window head query key"]
"""Attention, one matrix per head and window."""

Fused = Float[Tensor, "batch window query key"]
"""Attention with its heads combined."""

DenseAttention = Float[Tensor, "batch head query key"]
"""Attention between all tokens of an image, without windows."""

Rows = Float[Tensor, "batch row token"]
"""Row vectors over the tokens of a block."""

ReadoutRow = Float[Tensor, "batch token"]
"""One value per token."""

Maps = Float[Tensor, "batch height width"]
"""One value per patch or pixel."""

Slots = Int[Tensor, "window slot"]
"""The token in each slot; −1 for padding."""

Groups = Int[Tensor, "merged 4"]
"""The four tokens that patch merging joins; −1 for padding."""

Shares = Float[Tensor, "batch merged 4"]
"""One value for each of the four tokens that patch merging joins."""

PaddingMass = Float[Tensor, "batch row"]
"""The sum of each row's values on padding."""

ClassTarget = int | str
"""A class: its index, or its label; for a text-image model without classes, a text such as "a photo of a boxer"."""

Contrast = tuple[ClassTarget | None, ClassTarget]
"""Two classes: the output of the first minus that of the second. None is the most probable class of each image."""


@dataclass(frozen=True, eq=False)
class SimilarTo:
    """A target: the cosine similarity of the features of an image to those of a reference image.

    The model must return features; load a classifier with ``output="features"``.

    Attributes:
        image: the reference: a path, a PIL image, a uint8 array (pixel height, pixel width, 3), or a preprocessed
            tensor (1, 3, pixel height, pixel width).

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model, reference = vs.load("vit-nano", output="features"), skimage.data.astronaut()
        >>> result = vs.occlusion(model, skimage.data.chelsea(), target=vs.SimilarTo(reference))
        >>> result.target, result.provenance["parameters"]["output"]
        ('similarity to another image', 'similarity')
    """

    image: Any = field(repr=False)


ImageTarget = ClassTarget | Contrast | Callable[[Tensor], Tensor] | SimilarTo
"""What is explained of one image."""

Target = ImageTarget | Sequence[ImageTarget] | Integer[Tensor, " batch"] | Integer[np.ndarray, " batch"]
"""What a method explains. Every ``target`` takes one of these forms, or None for the most probable class of each image:

* an index or label: a class;
* a tuple of two classes: a contrast, the output of the first minus that of the second, such as
  ``("boxer", "bull mastiff")``; ``(None, "bull mastiff")`` contrasts the most probable class of each image;
* a function of the model's output, (batch, class) or (batch, channel), that returns (batch,);
* for a model without a classifier, ``"similarity"``, the similarity to the original image, or a :class:`SimilarTo`, the
  similarity to another one;
* a list with one of these for each image, or a tensor or array (batch,) of indices.

The number of a class, and of the two of a contrast, is that of the option ``output``.
"""

"""RISE (Petsiuk et al., 2018): the mean of random soft masks, weighted by the output for each."""

from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import nn

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.methods._perturbation import (
    explain_each,
    perturbation_method,
    perturbation_provenance,
    warn_if_interrupted,
)
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PerturbationArguments, PerturbationOptions, PixelMasks
from vitscope.perturb.masks import check_count
from vitscope.results.attribution import Attribution
from vitscope.typing import ImageTarget, Target
from vitscope.validation import require_at_least, require_ratio

# Maps are as smooth as the masks: more pixels per side than this would add no information.
MAX_SIDE = 512


@perturbation_method()
def rise(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    num_samples: int = 4000,
    cells: int = 7,
    keep_probability: float = 0.5,
    **options: Unpack[PerturbationArguments],
) -> Attribution:
    """Explain a prediction by the expected output given that each pixel is visible.

    Each mask is a grid of ``cells`` × ``cells`` random bits, enlarged bilinearly, shifted by a random fraction of a
    cell, and laid over the image. The map is Σ output · mask / (samples · keep_probability). There are no segments, so
    by default hidden pixels have the mean colour of the image. The paper hides them in black, ``hide="black"``.

    Reference: Petsiuk, Das & Saenko, 2018 (arXiv 1806.07421).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images of one size, or a tensor (batch, 3, height, width) that is already
            preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        num_samples: number of masks; the paper uses 4,000 to 8,000.
        cells: number of rows, and of columns, of the coarse grid; at least 2.
        keep_probability: probability that a cell is visible, between 0 and 1.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        an attribution whose ``values`` (batch, height, width) cover the photo, with at most 512 per side. They are the
        expected output given that the pixel is visible, not a difference.

    Raises:
        CallError: an option is out of range, the model has no such class, or the images differ in size.
        UnsupportedModelError: as for :func:`vitscope.lime`.
        WorkError: as for :func:`vitscope.lime`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.rise(vs.load("vit-nano"), skimage.data.chelsea(), target="cat", num_samples=100)
        >>> result.values.shape
        torch.Size([1, 300, 451])
    """
    settings = PerturbationOptions(**options)
    count, cells = require_at_least(1, num_samples, "num_samples"), require_at_least(2, cells, "cells")
    check_count(count, cells * cells)
    probability = require_ratio(keep_probability, "keep_probability")
    if not 0 < probability < 1:
        raise CallError(f"keep_probability is {probability}: a probability between 0 and 1 is expected")

    def explain(masked_model: MaskedModel, image_target: ImageTarget | None) -> Attribution:
        column = masked_model.target(image_target)
        random = np.random.default_rng(settings.seed)
        bits = random.random((count, cells, cells)) < probability
        shifts = random.random((count, 2))
        mask = partial(_mask, bits, shifts)
        masks = PixelMasks(count, lambda index: mask(index, masked_model.subject.size))
        evaluations = masked_model.evaluate(masks, [column])
        samples = int(evaluations.evaluated.sum())
        warn_if_interrupted(evaluations.interrupted, samples, count)
        size = _limited(masked_model.subject.size)
        total = np.zeros(size)
        if masked_model.warn_if_constant(evaluations, column):
            # The mean of random masks has a pattern of its own, which would be all that the map shows.
            total += masked_model.original[column] * samples * probability
        else:
            for index in np.flatnonzero(evaluations.evaluated).tolist():
                total += evaluations.outputs[index, 0] * mask(index, size)
        parameters = {"num_samples": count, "cells": cells, "keep_probability": probability, "seed": settings.seed}
        return Attribution(
            torch.from_numpy(total / (samples * probability)).float()[None],
            Grid(*size),
            [masked_model.subject.view.uncropped()],
            perturbation_provenance(
                masked_model, "rise", parameters, column, samples=samples, interrupted=evaluations.interrupted
            ),
            masked_model.label(column),
        )

    return explain_each(model, images, None, settings, target, explain)


def _mask(
    bits: np.ndarray, shifts: np.ndarray, index: int, size: tuple[int, int]
) -> Float[np.ndarray, "pixel_height pixel_width"]:
    """Return one mask in [0, 1]: the coarse grid, enlarged to one cell more per side than the image, then cropped."""
    cells = bits.shape[1]
    cell = [-(-side // cells) for side in size]
    coarse = Image.fromarray(bits[index].astype(np.float32))
    enlarged = coarse.resize(((cells + 1) * cell[1], (cells + 1) * cell[0]), Image.Resampling.BILINEAR)
    top, left = (int(shift * side) for shift, side in zip(shifts[index], cell, strict=True))
    return np.asarray(enlarged)[top : top + size[0], left : left + size[1]]


def _limited(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size with the same proportions, at most :data:`MAX_SIDE` per side."""
    shrink = min(MAX_SIDE / max(size), 1)
    return max(round(size[0] * shrink), 1), max(round(size[1] * shrink), 1)

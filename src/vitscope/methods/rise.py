"""RISE (Petsiuk et al., 2018): the mean of random soft masks, weighted by the output for each."""

from typing import Any, Unpack

import numpy as np
from torch import nn

from vitscope.errors import CallError
from vitscope.estimators.soft_masks import soft_mask
from vitscope.grid import Grid
from vitscope.methods._perturbation import (
    explain_each,
    perturbation_method,
    perturbation_provenance,
    sampled_output,
    stored_samples,
    warn_if_interrupted,
)
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PerturbationArguments, PerturbationOptions, PixelMasks
from vitscope.perturb.masks import check_count
from vitscope.results.sampled_attribution import SampledAttribution, mean_map
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
) -> SampledAttribution:
    """Explain a prediction by the expected output given that each pixel is visible.

    Each mask is a grid of ``cells`` × ``cells`` random bits, enlarged bilinearly, shifted by a random fraction of a
    cell, and laid over the image. The map is Σ output · mask / (samples · keep_probability). There are no segments, so
    by default hidden pixels have the mean colour of the image. The paper hides them in black, ``hide="black"``.

    Reference: Petsiuk, Das & Saenko, 2018 (arXiv 1806.07421).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images of any sizes, or a tensor (batch, 3, height, width) that is already
            preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        num_samples: number of masks; the paper uses 4,000 to 8,000.
        cells: number of rows, and of columns, of the coarse grid; at least 2.
        keep_probability: probability that a cell is visible, between 0 and 1.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        an attribution whose ``values`` (batch, height, width) cover the photo, with at most 512 per side; those of
        photos of different sizes are enlarged to the largest, see :attr:`Attribution.sizes`. They are the expected
        output given that the pixel is visible, not a difference. ``result.of("dog")`` explains another class.

    Raises:
        CallError: an option is out of range, or the model has no such class.
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

    def explain(masked_model: MaskedModel, image_target: ImageTarget | None) -> SampledAttribution:
        column = masked_model.target(image_target)
        random = np.random.default_rng(settings.seed)
        bits = random.random((count, cells, cells)) < probability
        shifts = random.random((count, 2))
        masks = PixelMasks(count, lambda index: soft_mask(bits[index], shifts[index], masked_model.subject.size))
        stored = masked_model.stored_classes(count)
        evaluations = masked_model.evaluate(masks, [column], stored=stored)
        evaluated = evaluations.evaluated
        samples = int(evaluated.sum())
        warn_if_interrupted(evaluations.interrupted, samples, count)
        masked_model.warn_if_constant(evaluations, column)
        size = _limited(masked_model.subject.size)
        parameters = {"num_samples": count, "cells": cells, "keep_probability": probability, "seed": settings.seed}
        drawn, offsets = bits.reshape(count, -1)[evaluated], shifts[evaluated]
        output = sampled_output(masked_model, column, evaluations.outputs[evaluated, 0])
        return SampledAttribution(
            mean_map(drawn, offsets, output, size, parameters),
            Grid(*size),
            [masked_model.subject.view.uncropped()],
            perturbation_provenance(
                masked_model, "rise", parameters, column, samples=samples, interrupted=evaluations.interrupted
            ),
            masked_model.label(column),
            samples=[stored_samples(masked_model, drawn, evaluations.class_outputs[evaluated], stored, shifts=offsets)],
        )

    return explain_each(model, images, None, settings, target, explain)


def _limited(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size with the same proportions, at most :data:`MAX_SIDE` per side."""
    shrink = min(MAX_SIDE / max(size), 1)
    return max(round(size[0] * shrink), 1), max(round(size[1] * shrink), 1)

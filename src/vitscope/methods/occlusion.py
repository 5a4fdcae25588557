"""Occlusion (Zeiler & Fergus, 2014): the drop in the output if a window of patches is hidden."""

from typing import Any, Unpack

import numpy as np
from torch import nn

from vitscope.errors import CallError
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
from vitscope.perturb import MaskedModel, PerturbationArguments, PerturbationOptions
from vitscope.perturb.masked_model import cells_of
from vitscope.results.sampled_attribution import SampledAttribution, mean_map
from vitscope.typing import ImageTarget, Target
from vitscope.validation import require_integer


@perturbation_method()
def occlusion(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    window: int = 1,
    stride: int = 1,
    **options: Unpack[PerturbationArguments],
) -> SampledAttribution:
    """Explain a prediction by how much the output drops if each patch is hidden.

    A window slides over the patches and hides those that it covers, by default each in its mean colour, so that a patch
    of one colour is no evidence. A patch's value is the mean drop over the windows that cover it. Each window takes one
    forward pass.

    Reference: Zeiler & Fergus, 2014 (arXiv 1311.2901).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images of any sizes, or a tensor (batch, 3, height, width) that is already
            preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        window: side of the window, in patches of a plain transformer or in tokens of the last stage of a window
            transformer.
        stride: step from one window to the next, in the same unit; at most ``window``, so that every patch is covered.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        an attribution whose ``values`` (batch, height, width) on the grid of patches are the output for the original
        image minus the output without the patch. ``result.of("dog")`` explains another class from the same outputs.

    Raises:
        CallError: the window does not fit the grid, ``stride`` or another option is out of range, or the model has no
            such class.
        UnsupportedModelError: as for :func:`vitscope.lime`.
        WorkError: as for :func:`vitscope.lime`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.occlusion(vs.load("vit-nano"), skimage.data.chelsea(), target="cat", window=2)
        >>> result.target, result.values.shape
        ('cat', torch.Size([1, 8, 8]))
    """
    settings = PerturbationOptions(**options)
    window, stride = require_integer(window, "window"), require_integer(stride, "stride")
    if not 1 <= stride <= window:
        raise CallError(f"stride is {stride} and window is {window}: 1 ≤ stride ≤ window is expected")

    def explain(masked_model: MaskedModel, image_target: ImageTarget | None) -> SampledAttribution:
        view, cells = cells_of(masked_model.model, masked_model.subject)
        assert cells is not None, "the segments are patches, so their grid is known"
        column = masked_model.target(image_target)
        covers = _windows(cells, window, stride)
        stored = masked_model.stored_classes(len(covers))
        evaluations = masked_model.evaluate(masked_model.masks(~covers), [column], stored=stored)
        evaluated = evaluations.evaluated
        samples = int(evaluated.sum())
        warn_if_interrupted(evaluations.interrupted, samples, len(covers))
        masked_model.warn_if_constant(evaluations, column)
        covers = covers[evaluated]
        output = sampled_output(masked_model, column, evaluations.outputs[evaluated, 0])
        parameters = {"window": window, "stride": stride}
        return SampledAttribution(
            mean_map(covers, None, output, (cells.height, cells.width), parameters),
            cells,
            [view],
            perturbation_provenance(
                masked_model, "occlusion", parameters, column, samples=samples, interrupted=evaluations.interrupted
            ),
            masked_model.label(column),
            True,
            samples=[stored_samples(masked_model, covers, evaluations.class_outputs[evaluated], stored)],
        )

    return explain_each(model, images, "patches", settings, target, explain)


def _windows(cells: Grid, window: int, stride: int) -> np.ndarray:
    """Return (window, patch), True if the window covers the patch; the last windows end at the edge."""
    if window > min(cells.height, cells.width):
        raise CallError(f"a window of {window} patches does not fit the grid of {cells.height}×{cells.width}")
    covers = []
    for top in _starts(cells.height, window, stride):
        for left in _starts(cells.width, window, stride):
            cover = np.zeros((cells.height, cells.width), dtype=bool)
            cover[top : top + window, left : left + window] = True
            covers.append(cover.ravel())
    return np.stack(covers)


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Return the first row or column of each window."""
    last = side - window
    return sorted({*range(0, last + 1, stride), last})

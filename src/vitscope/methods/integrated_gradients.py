"""Integrated gradients (Sundararajan et al., 2017): the gradient along the way from a baseline to the image."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.methods._gradient import in_batches, require_choice
from vitscope.methods.input_x_gradient import Place, relevance_result, require_start
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import describe_hide
from vitscope.perturb.rendering import baseline_pixels, subjects
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model
from vitscope.tracing.gradients import GradientOptions, capture_gradients
from vitscope.typing import Target
from vitscope.validation import require_at_least


def integrated_gradients(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    steps: int = 50,
    baseline: Any = "black",
    at: Place = "patches",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by the gradient along the straight way from a baseline to the image.

    (x − x′) ⊙ Σ_k w_k · ∂f/∂x at x′ + t_k (x − x′), with the nodes t_k and weights w_k of Gauss and Legendre. The sum
    is f(x) − f(x′) up to the error of the quadrature. For patches, x and x′ are the tokens that enter the first block.

    Reference: Sundararajan et al., 2017 (arXiv 1703.01365).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        steps: number of nodes, each a forward and a backward pass; at least 1.
        baseline: the image without information: ``"black"``, ``"grey"``, ``"mean"`` (of the image), ``"blur"``,
            ``"noise"``, a colour, an image, or a preprocessed tensor of the same shape as the input.
        at: the input to explain: ``"patches"`` or ``"pixels"``.
        output: the number of a class: ``"logit"``, ``"log_odds"``, ``"probability"`` or ``"log_probability"``.

    Returns:
        a signed attribution, see :func:`vitscope.input_x_gradient`. ``provenance["convergence"]`` holds for each image
        the output for the image and for the baseline, and the ``error``: their difference less everything that was
        attributed.

    Raises:
        CallError: as for :func:`vitscope.input_x_gradient`, or the baseline is not valid.
        UnsupportedModelError: as for :func:`vitscope.input_x_gradient`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.integrated_gradients(vs.load("vit-nano"), skimage.data.chelsea(), target="cat", steps=8)
        >>> result.values.shape, sorted(result.provenance["convergence"][0])
        (torch.Size([1, 8, 8]), ['baseline', 'error', 'output'])
    """
    require_choice(at, Place, "at")
    steps = require_at_least(1, steps, "steps")
    nodes, shares = np.polynomial.legendre.leggauss(steps)
    vision = as_vision_model(model)
    on_pixels = at == "pixels"
    name = "a tensor" if isinstance(baseline, Tensor) else describe_hide(baseline, "baseline")
    parameters = {"steps": steps, "baseline": name, "at": at}

    def explain(images: Any, target: Any) -> Attribution:
        with capture_gradients(vision, images, GradientOptions(weights=False, pixels=on_pixels)) as run:
            explained = score(run.model, run.output, run.has_classes, target, output).detached()
            run = run.detached()
        image = require_start(run, at)
        with capture_gradients(
            vision, _baseline(vision, images, baseline), GradientOptions(weights=False, pixels=on_pixels)
        ) as blank:
            blank = blank.detached()
        reference = score(blank.model, blank.output, blank.has_classes, explained.fixed_target, output).values
        origin = require_start(blank, at)
        mean = torch.zeros_like(image)
        for node, share in zip(nodes, shares, strict=True):
            position = origin + (image - origin) * float((node + 1) / 2)
            options = GradientOptions(weights=False, pixels=on_pixels, start=lambda _, position=position: position)  # type: ignore[misc]
            with capture_gradients(vision, images, options) as point:
                values = score(point.model, point.output, point.has_classes, explained.fixed_target, output).values
                mean += point.gradients(values, [require_start(point, at)])[0] * float(share / 2)
        change = image - origin
        result = relevance_result(run, "integrated_gradients", parameters, explained, change, mean, complete=False)
        return _with_convergence(result, explained.values - reference, reference, (change * mean).flatten(1))

    return in_batches(images, target, explain)


def _with_convergence(result: Attribution, difference: Tensor, reference: Tensor, attributed: Tensor) -> Attribution:
    """Add the error of the quadrature to the provenance of a result."""
    errors = difference - attributed.sum(1)
    convergence = [
        {"output": first + second, "baseline": second, "error": error}
        for first, second, error in zip(difference.tolist(), reference.tolist(), errors.tolist(), strict=True)
    ]
    provenance = {**result.provenance, "convergence": convergence}
    return Attribution(result.values, result.grid, result.images, provenance, result.target, result.signed)


def _baseline(model: VisionModel, images: Any, baseline: Any) -> Tensor:
    """Return the model's input for the baseline of each image."""
    return torch.cat(baseline_pixels(model, subjects(model, images), baseline))

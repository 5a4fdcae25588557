"""KernelSHAP (Lundberg & Lee, 2017): Shapley values of segments, from a regression over coalitions."""

from itertools import combinations
from math import comb
from typing import Any, Unpack

import numpy as np
from jaxtyping import Bool, Float
from torch import nn

from vitscope.errors import warn
from vitscope.estimators.shapley import shapley
from vitscope.methods._perturbation import (
    explain_each,
    perturbation_method,
    segment_result,
    stored_samples,
    warn_if_interrupted,
)
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PerturbationArguments, PerturbationOptions
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.typing import ImageTarget, Target
from vitscope.validation import require_at_least


@perturbation_method()
def kernel_shap(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    num_samples: int = 2048,
    segments: Any = "quickshift",
    top_labels: int = 5,
    **options: Unpack[PerturbationArguments],
) -> SegmentAttribution:
    """Explain a prediction by the Shapley value of each segment: its fair share of the output.

    The weights and the intercept (the output if everything is hidden) add up to the output for the original image.
    Coalitions (sets of visible segments) are evaluated by size, smallest and largest first, because these have the
    largest weight in the kernel. As long as enough samples are left, all coalitions of a size are evaluated; the
    remaining samples are drawn from the kernel, each with its complement. With at least 2ᵏ − 2 samples for k segments
    the values are exact.

    Reference: Lundberg & Lee, 2017 (arXiv 1705.07874); complements: Covert & Lee, 2021 (arXiv 2012.01536).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images of any sizes, or a tensor (batch, 3, height, width) that is already
            preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        num_samples: maximum number of coalitions, besides the original image and the fully hidden one; at least 2.
        segments: see :func:`vitscope.lime`.
        top_labels: number of the most probable classes to explain besides the target, see :func:`vitscope.lime`.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        a result as from :func:`vitscope.lime`, but ``intervals`` is None.

    Raises:
        CallError: as for :func:`vitscope.lime`.
        UnsupportedModelError: as for :func:`vitscope.lime`.
        WorkError: as for :func:`vitscope.lime`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.kernel_shap(vs.load("vit-nano"), skimage.data.chelsea(), segments="slic", num_samples=300)
        >>> result.target, abs(result.local_prediction - result.output) < 1e-6
        ('cat', True)
    """
    settings = PerturbationOptions(**options)
    count, top_labels = require_at_least(2, num_samples, "num_samples"), require_at_least(0, top_labels, "top_labels")

    def explain(masked_model: MaskedModel, image_target: ImageTarget | None) -> SegmentAttribution:
        columns = masked_model.columns(image_target, top_labels)
        players = masked_model.require_segments().count
        rows, kernel = coalitions(players, count, settings.seed)
        if len(rows) < players:
            warn(
                f"num_samples is {count} for {players} segments: fewer samples than unknowns, so the values are the "
                "smallest that fit; use more samples or fewer segments"
            )
        ends = np.stack([np.zeros(rows.shape[1], dtype=bool), np.ones(rows.shape[1], dtype=bool)])
        masks, stored = np.concatenate([ends, rows]), masked_model.stored_classes(len(rows) + 2)
        evaluations = masked_model.evaluate(masked_model.masks(masks), columns, stored=stored)
        samples = int(evaluations.evaluated.sum())
        warn_if_interrupted(evaluations.interrupted, samples, len(rows) + 2)
        masked_model.warn_if_constant(evaluations, columns[0])
        if not evaluations.evaluated[:2].all():
            raise KeyboardInterrupt
        evaluated = evaluations.evaluated
        masks, outputs = masks[evaluated], evaluations.outputs[evaluated]
        weights = np.concatenate([np.zeros(2), kernel])[evaluated]  # the first two masks are constraints
        values, *scores = shapley(masks[2:], weights[2:], outputs[2:], outputs[:2])
        return segment_result(
            masked_model,
            "kernel_shap",
            {"num_samples": count, "seed": settings.seed},
            columns,
            values,
            None,
            outputs[0],
            (scores[0], scores[1]),
            stored=stored_samples(masked_model, masks, evaluations.class_outputs[evaluated], stored, weights=weights),
            samples=samples,
            interrupted=evaluations.interrupted,
        )

    return explain_each(model, images, segments, settings, target, explain)


def coalitions(
    players: int, count: int, seed: int
) -> tuple[Bool[np.ndarray, "coalition segment"], Float[np.ndarray, " coalition"]]:
    """Return at most ``count`` coalitions, neither empty nor complete, and the Shapley kernel's weight of each."""
    random = np.random.default_rng(seed)
    sizes = np.arange(1, players)
    # The kernel's weight of all coalitions of a size together: (k − 1) / (size · (k − size)).
    mass = (players - 1) / (sizes * (players - sizes))
    mass /= mass.sum()
    rows: list[np.ndarray] = []
    weights: list[float] = []
    complete: set[int] = set()  # sizes of which all coalitions are included
    for size in range(1, players // 2 + 1):
        mirrored = {size, players - size}
        number = comb(players, size) * len(mirrored)
        if len(rows) + number > count:
            break
        for members in combinations(range(players), size):
            row = np.zeros(players, dtype=bool)
            row[list(members)] = True
            rows += [row, ~row] if len(mirrored) == 2 else [row]
        weights += [mass[size - 1] / comb(players, size)] * number
        complete |= mirrored
    remaining_sizes = [size for size in sizes if size not in complete and size <= players - size]
    pairs = (count - len(rows)) // 2
    if remaining_sizes and pairs:
        # A size and its mirror are drawn together, so the middle one counts once.
        probabilities = np.array([mass[size - 1] * (2 if 2 * size != players else 1) for size in remaining_sizes])
        for size in random.choice(remaining_sizes, size=pairs, p=probabilities / probabilities.sum()):
            row = np.zeros(players, dtype=bool)
            row[random.choice(players, size=size, replace=False)] = True
            rows += [row, ~row]
        weights += [probabilities.sum() / (2 * pairs)] * (2 * pairs)
    return np.stack(rows) if rows else np.zeros((0, players), dtype=bool), np.array(weights)

"""Deletion and insertion: whether the prediction depends on the patches that an attribution ranks highest."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.integrate import trapezoid
from torch import nn

from vitscope.display import Tabulated, counted, one_line
from vitscope.errors import CallError
from vitscope.models.targets import one_per_image
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PerturbationOptions
from vitscope.perturb.masked_model import cells_of
from vitscope.perturb.rendering import subjects
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model
from vitscope.typing import Target
from vitscope.validation import require_at_least

DELETED, INSERTED = "grey", "blur"  # what replaces deleted patches, and patches that are not inserted yet


@dataclass(frozen=True, eq=False)
class Faithfulness(Tabulated):
    """Areas under the curves of the target's probability, (image,) in [0, 1] each.

    Attributes:
        deletion: the area as patches are deleted, highest value first; lower is better.
        insertion: the area as patches are inserted, highest value first; higher is better.
        random_deletion: ``deletion`` in a random order, for comparison.
        random_insertion: ``insertion`` in a random order, for comparison.
    """

    deletion: Float[np.ndarray, " image"]
    insertion: Float[np.ndarray, " image"]
    random_deletion: Float[np.ndarray, " image"]
    random_insertion: Float[np.ndarray, " image"]

    def __repr__(self) -> str:
        deletion, insertion, random_deletion, random_insertion = (
            f"{area.mean():.3f}"
            for area in (self.deletion, self.insertion, self.random_deletion, self.random_insertion)
        )
        return one_line(
            f"Faithfulness: {counted(len(self.deletion), 'image')}",
            f"deletion {deletion} ({random_deletion} in random order)",
            f"insertion {insertion} ({random_insertion})",
        )


def faithfulness(
    model: VisionModel | nn.Module,
    images: Any,
    result: Attribution,
    *,
    target: Target | None = None,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> Faithfulness:
    """Measure how fast a probability drops as the highest patches are deleted, and rises as they are inserted.

    Patches (in a window transformer: tokens of the last stage) are ranked by the mean of the map in each. Deleted
    patches become grey; inserted patches appear in a blurred image. The area is the trapezoidal integral of the
    probability over the share of patches.

    Reference: RISE, Petsiuk et al., 2018 (arXiv 1806.07421).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: the images that ``result`` explains.
        result: an attribution of these images on patches, as :func:`vitscope.rollout` returns it.
        target: what is measured, see :data:`~vitscope.typing.Target`, as a probability if it is a class; by default the
            most probable class of each image.
        steps: number of steps in which the patches are deleted or inserted; limited to the number of patches.
        seed: seed of the random order.
        batch_size: maximum number of images per forward pass.

    Returns:
        the areas of each image, in the order of the attribution and in a random order.

    Raises:
        CallError: ``result`` is not an attribution of these images, or an option is out of range.
        WorkError: an image cannot be read, the model's output is NaN or infinity, or there is not enough memory.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model, photo = vs.load("vit-nano"), skimage.data.chelsea()
        >>> areas = vs.faithfulness(model, photo, vs.occlusion(model, photo), target="cat")
        >>> bool(areas.deletion[0] < areas.random_deletion[0])
        True
    """
    if not isinstance(result, Attribution):
        raise CallError(f"result is {result!r}: an attribution is expected, as vitscope.rollout returns it")
    vision = as_vision_model(model)
    inputs = subjects(vision, images)
    if len(inputs) != len(result):
        raise CallError(
            f"{len(inputs)} images and an attribution of {len(result)}: pass the images that the attribution explains"
        )
    targets = one_per_image(target, len(inputs))
    steps = require_at_least(1, steps, "steps")
    deletion = PerturbationOptions(hide=DELETED, seed=seed, batch_size=batch_size)
    insertion = PerturbationOptions(hide=INSERTED, seed=seed, batch_size=batch_size)
    generator = np.random.default_rng(deletion.seed)
    areas = np.zeros((len(inputs), 4))
    for row, (subject, image_target) in enumerate(zip(inputs, targets, strict=True)):
        deleting, inserting = (
            MaskedModel(vision, subject, options, segments="patches") for options in (deletion, insertion)
        )
        _, cells = cells_of(vision, subject)
        assert cells is not None, "the segments are patches, so their grid is known"
        means = F.adaptive_avg_pool2d(result[row].values[None], (cells.height, cells.width))
        ranked = np.argsort(-means.flatten().cpu().numpy(), kind="stable")
        shuffled = generator.permutation(len(ranked))
        # Both have the same columns, because both add that of a target that is not a class.
        column, _ = (masked_model.target(image_target) for masked_model in (deleting, inserting))
        areas[row] = [
            _area(masked_model, order, column, steps, deleted=deleted)
            for order in (ranked, shuffled)
            for masked_model, deleted in ((deleting, True), (inserting, False))
        ]
    return Faithfulness(*areas.T)


def _area(masked_model: MaskedModel, order: np.ndarray, column: int, steps: int, *, deleted: bool) -> float:
    """Return the area under the curve of the output while patches are deleted or inserted in this order."""
    counts = np.linspace(0, len(order), min(steps, len(order)) + 1).round().astype(int)
    visible: Bool[np.ndarray, "step patch"] = np.full((len(counts), len(order)), deleted)
    for row, count in zip(visible, counts, strict=True):
        row[order[:count]] = not deleted
    curve = masked_model.evaluate(masked_model.masks(visible), [column]).outputs[:, 0]
    return float(trapezoid(curve) / (len(curve) - 1))

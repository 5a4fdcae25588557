"""Deletion and insertion: does the answer follow what an attribution marks?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import nn

from vitscope.errors import CallError
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.masked_model import MaskedModel, cells_of
from vitscope.perturb.rendering import subjects
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model
from vitscope.validation import at_least, seed_number

DELETED, INSERTED = "grey", "blur"  # what stands for what was taken, and for what is not there yet


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Areas under the curves of the target's probability, (image,) in [0, 1] each.

    Attributes:
        deletion: patches taken away, the highest first; the lower the better.
        insertion: patches put in, the highest first; the higher the better.
        random_deletion, random_insertion: the same in an order that nobody chose.
    """

    deletion: Float[np.ndarray, " image"]
    insertion: Float[np.ndarray, " image"]
    random_deletion: Float[np.ndarray, " image"]
    random_insertion: Float[np.ndarray, " image"]


def faithfulness(
    model: VisionModel | nn.Module,
    images: Any,
    result: Attribution,
    *,
    target: int | str | None = None,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> Faithfulness:
    """How soon the answer falls when the patches that a map marks are hidden, and rises when they are shown.

    Patches (of a window transformer: tokens of the last stage) are ranked by the map's mean in them. Deleted ones turn
    grey, inserted ones come out of a blurred image. auc = (Σ − ½ ends) / steps of the curve over the share of
    patches.

    Reference: RISE, Petsiuk et al., 2018 (arXiv 1806.07421).

    Args:
        result: an attribution of these images on patches, as :func:`vitscope.rollout` gives.
        target: the class whose probability is followed; by default the likeliest of each whole image. Of a model
            without a classifier ``"similarity"``: the cosine between its features and those of the whole image.
        steps: how many times a share of the patches is taken; no more than there are patches.
        seed: of the random order.
    """
    if not isinstance(result, Attribution):
        raise CallError(f"result is {result!r}: an attribution is expected, as vitscope.rollout returns it")
    vision = as_vision_model(model)
    given = subjects(vision, images)
    if len(given) != len(result):
        raise CallError(f"{len(given)} images and an attribution of {len(result)}: pass the images it was made of")
    steps, generator = at_least(1, steps, "steps"), np.random.default_rng(seed_number(seed))
    areas = []
    for at, subject in enumerate(given):
        options: dict[str, Any] = {"segments": "patches", "batch_size": batch_size}
        deleting, inserting = (MaskedModel(vision, subject, hide=hide, **options) for hide in (DELETED, INSERTED))
        _, cells = cells_of(vision, subject)
        assert cells is not None, "segments of patches were made from them"
        means = F.adaptive_avg_pool2d(result.values[at][None, None], (cells.height, cells.width))
        ranked = np.argsort(-means.flatten().cpu().numpy(), kind="stable")
        drawn = generator.permutation(len(ranked))
        column = deleting.target(target)
        areas.append(
            [
                _area(masked_model, order, column, steps, taken=taken)
                for order in (ranked, drawn)
                for masked_model, taken in ((deleting, True), (inserting, False))
            ]
        )
    found = np.asarray(areas).reshape(-1, 4)
    return Faithfulness(found[:, 0], found[:, 1], found[:, 2], found[:, 3])


def _area(masked_model: MaskedModel, order: np.ndarray, column: int, steps: int, *, taken: bool) -> float:
    """Under the curve of the answer, patches in this order taken away or put in."""
    counts = np.linspace(0, len(order), min(steps, len(order)) + 1).round().astype(int)
    shown: Bool[np.ndarray, "step patch"] = np.full((len(counts), len(order)), taken)
    for row, count in zip(shown, counts, strict=True):
        row[order[:count]] = not taken
    curve = masked_model.ask(masked_model.masks(shown), [column]).outputs[:, 0]
    return float((curve.sum() - (curve[0] + curve[-1]) / 2) / (len(curve) - 1))

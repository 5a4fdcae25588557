"""KernelSHAP (Lundberg & Lee, 2017): Shapley values of segments, from a regression over coalitions."""

from itertools import combinations
from math import comb
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import nn

from vitscope.errors import warn
from vitscope.methods._perturbation import PerturbationOptions, explain_each, segment_result, warn_if_interrupted
from vitscope.methods.surrogate import r_squared
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.validation import at_least, seed_number


def kernel_shap(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: int | str | None = None,
    num_samples: int = 2048,
    segments: Any = "quickshift",
    hide: Any = "mean",
    seed: int = 0,
    batch_size: int = 64,
    output: Literal["probability", "logit"] = "probability",
    top_labels: int = 5,
    progress: Any = False,
) -> SegmentAttribution:
    """The share of each segment in the answer: a fair one, in the sense of Shapley.

    The weights and the intercept (the answer to nothing but baseline) add up to the answer to the whole image.
    Coalitions are asked for in whole sizes while the samples last, smallest and largest first, for they weigh most; the
    rest are drawn from the kernel with their complements. With 2ᵏ − 2 samples or more for k segments the values are
    exact.

    Reference: Lundberg & Lee, 2017 (arXiv 1705.07874); complements: Covert & Lee, 2021 (arXiv 2012.01536).

    Args:
        num_samples: coalitions, besides the whole image and nothing.
        segments, hide, target, seed, batch_size, output, top_labels, progress: see :func:`vitscope.lime`.

    Returns:
        as :func:`vitscope.lime`; ``intervals`` is None.

    Raises:
        CallError: as for :func:`vitscope.lime`.
    """
    options = PerturbationOptions(hide, output, batch_size, seed_number(seed), progress)
    count, top_labels = at_least(2, num_samples, "num_samples"), at_least(0, top_labels, "top_labels")

    def explain(masked_model: MaskedModel) -> SegmentAttribution:
        columns = masked_model.columns(target, top_labels)
        players = masked_model.require_segments().count
        rows, kernel = coalitions(players, count, options.seed)
        if len(rows) < players:
            warn(
                f"num_samples is {count} for {players} segments: fewer questions than unknowns, so the "
                "values are the smallest that fit; take more samples or fewer segments"
            )
        ends = np.stack([np.zeros(rows.shape[1], dtype=bool), np.ones(rows.shape[1], dtype=bool)])
        asked = masked_model.ask(masked_model.masks(np.concatenate([ends, rows])), columns)
        answered = asked.asked[2:]
        warn_if_interrupted(asked.interrupted, int(asked.asked.sum()), len(rows) + 2)
        masked_model.warn_if_constant(asked, columns[0])
        if not asked.asked[:2].all():
            raise KeyboardInterrupt
        values, scores = shapley(rows[answered], kernel[answered], asked.outputs[2:][answered], asked.outputs[:2])
        return segment_result(
            masked_model,
            "kernel_shap",
            {"num_samples": count, "seed": options.seed},
            columns,
            values,
            None,
            asked.outputs[0],
            scores,
            samples=int(asked.asked.sum()),
            interrupted=asked.interrupted,
        )

    return explain_each(model, images, segments, options, explain)


def coalitions(
    players: int, count: int, seed: int
) -> tuple[Bool[np.ndarray, "coalition segment"], Float[np.ndarray, " coalition"]]:
    """Coalitions, neither empty nor whole, and the Shapley kernel's weight of each."""
    random = np.random.default_rng(seed)
    sizes = np.arange(1, players)
    # The kernel's weight of all coalitions of a size together: (k − 1) / (size · (k − size)).
    mass = (players - 1) / (sizes * (players - sizes))
    mass /= mass.sum()
    rows: list[np.ndarray] = []
    weights: list[float] = []
    whole: set[int] = set()
    for size in range(1, players // 2 + 1):
        both = {size, players - size}
        number = comb(players, size) * len(both)
        if len(rows) + number > count:
            break
        for chosen in combinations(range(players), size):
            row = np.zeros(players, dtype=bool)
            row[list(chosen)] = True
            rows += [row, ~row] if len(both) == 2 else [row]
        weights += [mass[size - 1] / comb(players, size)] * number
        whole |= both
    left = [size for size in sizes if size not in whole and size <= players - size]
    pairs = (count - len(rows)) // 2
    if left and pairs:
        # A size and its mirror are drawn together, so the middle one by itself.
        chances = np.array([mass[size - 1] * (2 if 2 * size != players else 1) for size in left])
        for size in random.choice(left, size=pairs, p=chances / chances.sum()):
            row = np.zeros(players, dtype=bool)
            row[random.choice(players, size=size, replace=False)] = True
            rows += [row, ~row]
        weights += [chances.sum() / (2 * pairs)] * (2 * pairs)
    return np.stack(rows) if rows else np.zeros((0, players), dtype=bool), np.array(weights)


def shapley(
    rows: Bool[np.ndarray, "coalition segment"],
    kernel: Float[np.ndarray, " coalition"],
    answers: Float[np.ndarray, "coalition label"],
    ends: Float[np.ndarray, "2 label"],
) -> tuple[Float[np.ndarray, "label segment"], Float[np.ndarray, " label"]]:
    """Least squares under the constraint that the values add up to ends[1] − ends[0], and its weighted R²."""
    nothing, everything = ends
    masks, gains = rows.astype(np.float64), answers - nothing
    # Equal shares, and what departs from them, which adds up to nothing: the smallest departures that fit do.
    equal = (everything - nothing) / masks.shape[1]
    root = np.sqrt(kernel)[:, None]
    sizes = masks.sum(1, keepdims=True)
    design = masks - sizes / masks.shape[1]
    departures, *_ = np.linalg.lstsq(root * design, root * (gains - sizes * equal), rcond=None)
    values = equal + departures
    residuals = gains - masks @ values
    total = kernel.sum()
    moved = answers - (kernel @ answers / total if total > 0 else 0.0)
    return values.T, r_squared(residuals, moved, kernel)

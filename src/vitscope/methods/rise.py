"""RISE (Petsiuk et al., 2018): the mean of random soft masks, weighed by what the model says to each."""

from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import nn

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.methods._perturbation import PerturbationOptions, about, explain_each, warn_if_interrupted, whole
from vitscope.models.vision_model import VisionModel
from vitscope.perturb import MaskedModel, PixelMasks
from vitscope.perturb.masks import check_count
from vitscope.results.attribution import Attribution
from vitscope.validation import at_least, ratio, seed_number

# Maps are as smooth as the masks: more pixels than these a side would hold nothing new.
MAX_SIDE = 512


def rise(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: int | str | None = None,
    num_samples: int = 4000,
    cells: int = 7,
    shown: float = 0.5,
    hide: Any = "black",
    seed: int = 0,
    batch_size: int = 64,
    output: Literal["probability", "logit"] = "probability",
    progress: Any = False,
) -> Attribution:
    """Which places of an image, when they are seen, go with a high answer.

    A grid of ``cells`` × ``cells`` coin tosses is blown up bilinearly, moved by a random part of a cell, and laid over
    the image; the map is Σ answer · mask / (samples · shown).

    Reference: Petsiuk, Das & Saenko, 2018 (arXiv 1806.07421).

    Args:
        num_samples: how many masks; the paper takes 4,000 to 8,000.
        cells: of the coarse grid, a side.
        shown: the chance of a cell to be seen.
        hide, target, seed, batch_size, output, progress: see :func:`vitscope.lime`. With ``"drop"`` patches whose mask
            is below a half are left out.

    Returns:
        values (batch, height, width) over the photo, at most 512 a side: an expected answer given that the place is
        seen, not a difference.

    Raises:
        CallError: an option is out of range, or as for :func:`vitscope.lime`.
    """
    options = PerturbationOptions(hide, output, batch_size, seed_number(seed), progress)
    count, cells = at_least(1, num_samples, "num_samples"), at_least(2, cells, "cells")
    check_count(count, cells * cells)
    shown = ratio(shown, "shown")
    if not 0 < shown < 1:
        raise CallError(f"shown is {shown}: a chance between 0 and 1 is expected")

    def explain(masked_model: MaskedModel) -> Attribution:
        column = masked_model.target(target)
        random = np.random.default_rng(options.seed)
        tossed = random.random((count, cells, cells)) < shown
        shifts = random.random((count, 2))
        make = partial(_mask, tossed, shifts)
        asked = masked_model.ask(PixelMasks(count, lambda at: make(at, masked_model.subject.size)), [column])
        answered = int(asked.asked.sum())
        warn_if_interrupted(asked.interrupted, answered, count)
        size = _within(masked_model.subject.size)
        summed = np.zeros(size)
        if masked_model.warn_if_constant(asked, column):
            # The mean of random masks has a pattern of its own, which would be all that the map shows.
            summed += masked_model.original[column] * answered * shown
        else:
            for at in np.flatnonzero(asked.asked).tolist():
                summed += asked.outputs[at, 0] * make(at, size)
        parameters = {"num_samples": count, "cells": cells, "shown": shown, "seed": options.seed}
        return Attribution(
            torch.from_numpy(summed / (answered * shown)).float()[None],
            Grid(*size),
            [whole(masked_model.subject.view)],
            about(masked_model, "rise", parameters, samples=answered, interrupted=asked.interrupted),
            masked_model.label(column),
        )

    return explain_each(model, images, None, options, explain)


def _mask(
    tossed: np.ndarray, shifts: np.ndarray, at: int, size: tuple[int, int]
) -> Float[np.ndarray, "pixel_height pixel_width"]:
    """One mask in [0, 1]: the coarse grid blown up to one cell more a side than the image holds, then cut."""
    cells = tossed.shape[1]
    cell = [-(-side // cells) for side in size]
    coarse = Image.fromarray(tossed[at].astype(np.float32))
    blown = coarse.resize(((cells + 1) * cell[1], (cells + 1) * cell[0]), Image.Resampling.BILINEAR)
    top, left = (int(shift * side) for shift, side in zip(shifts[at], cell, strict=True))
    return np.asarray(blown)[top : top + size[0], left : left + size[1]]


def _within(size: tuple[int, int]) -> tuple[int, int]:
    shrink = min(MAX_SIDE / max(size), 1)
    return max(round(size[0] * shrink), 1), max(round(size[1] * shrink), 1)

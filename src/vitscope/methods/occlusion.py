"""Occlusion (Zeiler & Fergus, 2014): what is lost when a window of patches is hidden."""

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.methods._perturbation import PerturbationOptions, about, explain_each, warn_if_interrupted
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.masked_model import MaskedModel, cells_of
from vitscope.results.attribution import Attribution
from vitscope.validation import seed_number, whole_number


def occlusion(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: int | str | None = None,
    window: int = 1,
    stride: int = 1,
    hide: Any = "grey",
    seed: int = 0,
    batch_size: int = 64,
    output: Literal["probability", "logit"] = "probability",
    progress: Any = False,
) -> Attribution:
    """How much the answer falls when each patch is hidden.

    A window slides over the patches and hides what it covers; a patch's value is the mean fall over the windows that
    cover it. Cost: one forward a window.

    Reference: Zeiler & Fergus, 2014 (arXiv 1311.2901).

    Args:
        window: its side, in patches of a plain transformer, or tokens of the last stage of a window transformer.
        stride: by how many patches it moves on; no larger than the window, so that every patch is covered.
        hide, target, seed, batch_size, output, progress: see :func:`vitscope.lime`.

    Returns:
        values (batch, height, width) on the grid of patches, answer of the whole image minus answer without.

    Raises:
        CallError: the window does not fit, or as for :func:`vitscope.lime`.
    """
    options = PerturbationOptions(hide, output, batch_size, seed_number(seed), progress)
    window, stride = whole_number(window, "window"), whole_number(stride, "stride")
    if not 1 <= stride <= window:
        raise CallError(f"stride is {stride} and window is {window}: 1 ≤ stride ≤ window is expected")

    def explain(masked_model: MaskedModel) -> Attribution:
        view, cells = cells_of(masked_model.model, masked_model.subject)
        assert cells is not None, "segments of patches were made from them"
        column = masked_model.target(target)
        covers = _windows(cells, window, stride)
        asked = masked_model.ask(masked_model.masks(~covers), [column])
        warn_if_interrupted(asked.interrupted, int(asked.asked.sum()), len(covers))
        masked_model.warn_if_constant(asked, column)
        falls = np.where(asked.asked, masked_model.original[column] - asked.outputs[:, 0], 0.0)
        covered = covers[asked.asked].sum(0)
        values = torch.from_numpy(falls @ covers / np.maximum(covered, 1)).float()
        parameters = {"window": window, "stride": stride}
        answered = int(asked.asked.sum())
        return Attribution(
            values.view(1, cells.height, cells.width),
            cells,
            [view],
            about(masked_model, "occlusion", parameters, samples=answered, interrupted=asked.interrupted),
            masked_model.label(column),
            True,
        )

    return explain_each(model, images, "patches", options, explain, on_pixels=False)


def _windows(cells: Grid, window: int, stride: int) -> np.ndarray:
    """(window, patch), True where a window covers a patch; the last ones are moved in to end at the edge."""
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
    last = side - window
    return sorted({*range(0, last + 1, stride), last})

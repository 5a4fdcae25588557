"""The attention of one query in each window, combined into one map."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from skimage.measure import label
from torch import nn

from vitscope.attention.scores import Head
from vitscope.attention.trace import AttentionStep, Trace
from vitscope.attention.windows import window_of_token
from vitscope.errors import UnsupportedModelError
from vitscope.methods.attention_map import trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import capture
from vitscope.validation import require_finite_tensor, require_ratio

Regions = Int[np.ndarray, "height width"]


def window_attention(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    layer: int = -1,
    head: Head = "mean",
    place: tuple[float, float] = (0.5, 0.5),
) -> Attribution:
    """Return the attention of one patch in each window, with all windows in one map.

    A window of a shifted block that wraps around the image's edge consists of several regions, and each region has
    its own query. The block's mask prevents attention between regions, except in timm on grids that need padding:
    there some regions attend to each other, so the attention of their queries adds up.

    Reference: Liu et al., 2021 (arXiv 2103.14030).

    Args:
        model: a window transformer, from :func:`vitscope.load` or as a live module; or a :class:`~vitscope.Trace`,
            without ``images``.
        images: see :func:`vitscope.capture`; None for a trace, which has its own.
        layer: index of the attention block, from 0; negative from the end.
        head: index of the head, or ``"mean"``, ``"max"``, ``"min"`` over heads.
        place: position of the query in each region, as fractions (down, across) from 0 to 1; by default the centre.

    Returns:
        an attribution whose ``values`` (batch, height, width) on the block's grid are the sum of all queries' rows.
        Each region that attends to itself alone sums to one, less the attention on padding.
        ``provenance["queries"]`` lists the query patches as [row, column].

    Raises:
        CallError: the model has no such layer or head, ``place`` is out of range, or ``images`` are missing or not
            valid.
        UnsupportedModelError: the block has no windows, or its windows are not regions of the image.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.window_attention(vs.load("swin-nano"), skimage.data.chelsea(), layer=1).values.shape
        torch.Size([1, 16, 16])
    """
    trace = trace_of(model, images, lambda m, i: capture(m, i, layers=[layer]))
    step = trace.step(layer)
    grid = step.require_grid()
    queries = region_queries(window_regions(step), place)
    row = torch.zeros(step.scores.shape[0], 1, grid.num_tokens, dtype=torch.float32, device=step.scores.device)
    row[:, 0, [grid.token(*query) for query in queries]] = 1
    values, padding = step.pull_head(row, head)
    provenance = {
        **trace.provenance,
        "method": "window_attention",
        "parameters": {"layer": step.layer, "head": step.require_head(head), "place": list(place)},
        "queries": [list(query) for query in queries],
        "rows_sum_to_one": False,
        "padding_mass": (padding[:, 0] / len(queries)).tolist(),
    }
    return Attribution(require_finite_tensor(grid.patches(values[:, 0]), "attention"), grid, trace.images, provenance)


def window_regions(step: AttentionStep) -> Regions:
    """Return the region of each patch: the connected regions of all windows, numbered from 0."""
    grid, slots = step.require_grid(), step.require_slots()
    if grid.prefix:
        raise UnsupportedModelError(f"layer {step.layer} attends over all tokens at once: it has no windows")
    owners = window_of_token(slots.cpu(), grid.num_tokens).view(grid.height, grid.width)
    regions: Regions = label(owners.numpy(), background=-1, connectivity=1) - 1
    # Wrapping divides a shifted window into regions. If the block is not shifted, the window's patches are scattered.
    if not is_shifted(step) and regions.max() + 1 > int((slots >= 0).any(1).sum()):
        raise UnsupportedModelError(
            f"the windows of layer {step.layer} are spread over the image: use attention_map with a patch as query"
        )
    return regions


def is_shifted(step: AttentionStep) -> bool:
    """Return whether a block's windows are shifted: the first window then does not begin at the first patch."""
    return step.slots is not None and int(step.slots[0, 0]) != 0


def region_queries(regions: Regions, place: tuple[float, float] = (0.5, 0.5)) -> list[tuple[int, int]]:
    """Return one patch, (row, column), of each region, at the same relative place in all of them."""
    down, across = require_ratio(place[0], "place"), require_ratio(place[1], "place")
    queries = []
    for number in range(regions.max() + 1):
        rows, columns = np.nonzero(regions == number)
        queries.append((_between(rows, down), _between(columns, across)))
    return queries


def _between(numbers: np.ndarray, share: float) -> int:
    """Return the number at this share of the way from the smallest to the largest."""
    low, high = int(numbers.min()), int(numbers.max())
    return low + int((high - low) * share)

"""One query in each window, put together to a whole image: what windows look like from inside."""

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
from vitscope.validation import only_finite, ratio

Regions = Int[np.ndarray, "height width"]


def window_attention(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    layer: int = -1,
    head: Head = "mean",
    place: tuple[float, float] = (0.5, 0.5),
) -> Attribution:
    """What one patch of every window looks at, all windows in one image.

    A shifted block's windows are cut apart where they wrap around the image's edge, and each part has a query of its
    own. The block's mask keeps parts from seeing each other, but for timm on grids that need padding: there some see
    each other, and what their queries look at adds up.

    Reference: Liu et al., 2021 (arXiv 2103.14030).

    Args:
        model: a window transformer and ``images``, or a :class:`~vitscope.Trace` alone.
        layer: counts attention blocks from 0, negative from the end.
        head: a head's number, or ``"mean"``, ``"max"``, ``"min"`` over heads.
        place: where in each window the query is, (down, across) from 0 to 1; the middle by default.

    Returns:
        values (batch, height, width) on the block's grid, the sum of all queries' rows: where parts do not see each
        other, each region sums to one, less what falls on padding. ``provenance["queries"]`` lists the patches that
        look, as [row, column].

    Raises:
        CallError: the layer or head is not there, or the block's windows are not areas of the image.

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
    values, fallen = step.looked_at(row, head)
    about = {
        **trace.provenance,
        "method": "window_attention",
        "parameters": {"layer": step.layer, "head": step.require_head(head), "place": list(place)},
        "queries": [list(query) for query in queries],
        "rows_sum_to_one": False,
        "padding_mass": (fallen[:, 0] / len(queries)).tolist(),
    }
    return Attribution(only_finite(grid.patches(values[:, 0]), "attention"), grid, trace.images, about)


def window_regions(step: AttentionStep) -> Regions:
    """Which part of which window each patch belongs to, numbered from 0; parts that do not touch are apart."""
    grid, slots = step.require_grid(), step.require_slots()
    if grid.prefix:
        raise UnsupportedModelError(f"layer {step.layer} attends over all tokens at once: there are no windows to show")
    owners = window_of_token(slots.cpu(), grid.num_tokens).view(grid.height, grid.width)
    regions: Regions = label(owners.numpy(), background=-1, connectivity=1) - 1
    # Only wrapping cuts a window into parts; otherwise its patches lie apart.
    if not is_shifted(step) and regions.max() + 1 > int((slots >= 0).any(1).sum()):
        raise UnsupportedModelError(f"layer {step.layer} attends to patches spread over the image: name one as query")
    return regions


def is_shifted(step: AttentionStep) -> bool:
    """Whether a block's windows are shifted: the first does not begin at the first patch."""
    return step.slots is not None and int(step.slots[0, 0]) != 0


def region_queries(regions: Regions, place: tuple[float, float] = (0.5, 0.5)) -> list[tuple[int, int]]:
    """A patch of each region, at the same place in all of them."""
    down, across = ratio(place[0], "place"), ratio(place[1], "place")
    queries = []
    for number in range(regions.max() + 1):
        rows, columns = np.nonzero(regions == number)
        queries.append((_between(rows, down), _between(columns, across)))
    return queries


def _between(numbers: np.ndarray, share: float) -> int:
    low, high = int(numbers.min()), int(numbers.max())
    return low + int((high - low) * share)

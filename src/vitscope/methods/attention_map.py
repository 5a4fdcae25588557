"""Raw attention: what one query looks at in one block."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vitscope.attention.scores import Head
from vitscope.attention.trace import Query, Trace
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import capture


def attention_map(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    layer: int = -1,
    head: Head = "mean",
    query: Query = "readout",
) -> Attribution:
    """What one query looks at in one attention block.

    ``A[layer, head, query]`` of softmax(q·kᵀ/√d), the row of the patch or prefix token asked for; for the readout of
    a model that pools, the pooled rows.

    Reference: Vaswani et al., 2017 (arXiv 1706.03762); for images Dosovitskiy et al., 2020 (arXiv 2010.11929).

    Args:
        model: a model and ``images``, or a :class:`~vitscope.Trace` alone.
        layer: counts attention blocks from 0, negative from the end.
        head: a head's number, or ``"mean"``, ``"max"``, ``"min"`` over heads.
        query: ``"readout"``, the name of a prefix token such as ``"cls"``, or a patch as (row, column) of the
            block's own grid.

    Returns:
        values (batch, height, width) in [0, 1] on the block's grid, the patches' part of a row that sums to one (for
        max and min fusion it does not), not rescaled. In a window transformer it is zero outside the query's window;
        what fell on padding is ``provenance["padding_mass"]``.

    Raises:
        CallError: the layer, head or query is not there.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.attention_map(vs.load("vit-nano"), skimage.data.chelsea(), head=4).values.shape
        torch.Size([1, 8, 8])
    """
    trace = trace_of(model, images, lambda m, i: capture(m, i, layers=[layer]))
    step = trace.step(layer)
    values, fallen = trace.map_and_padding(layer, head, query)
    asked = query if isinstance(query, str) else [int(part) for part in query]
    parameters = {"layer": step.layer, "head": step.require_head(head), "query": asked}
    about = {**trace.provenance, "method": "attention_map", "parameters": parameters}
    about["padding_mass"] = fallen.tolist()
    about["rows_sum_to_one"] = parameters["head"] not in ("max", "min") and not bool((fallen > 1e-4).any())
    return Attribution(values, step.require_grid(), trace.images, about)


def trace_of(
    model: VisionModel | nn.Module | Trace, images: Any, run: Callable[[VisionModel | nn.Module, Any], Trace]
) -> Trace:
    """The trace that was passed, or the one of ``run(model, images)``."""
    if isinstance(model, Trace):
        if images is not None:
            raise CallError("a trace has its images already: pass a trace alone, or a model with images")
        return model
    if images is None:
        raise CallError("images are missing: pass a model with images, or a trace alone")
    return run(model, images)


def grid_of(trace: Trace) -> Grid:
    """The token grid that the results of a trace live on."""
    grid = trace.grid
    if grid is None:
        raise CallError(
            "this model has a token grid vitscope does not know; for a live module of your own, pass patch_size, "
            "prefix and readout to vitscope.load"
        )
    return grid

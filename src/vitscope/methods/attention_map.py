"""Raw attention: which patches one query attends to in one block."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vitscope.attention.scores import Head
from vitscope.attention.trace import Query, Trace
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.grid import Grid
from vitscope.interventions.artefact_dropping import DropArtefacts, dropped_artefacts, require_drop_artefacts
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import capture
from vitscope.validation import require_integer


def attention_map(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    layer: int = -1,
    head: Head = "mean",
    query: Query = "readout",
    drop_artefacts: DropArtefacts = False,
) -> Attribution:
    """Return the attention of one query to each patch, in one attention block.

    This is ``A[layer, head, query]`` of softmax(q·kᵀ/√d): the row of a patch or a prefix token. If the model pools
    tokens, ``query="readout"`` is the mean of their rows.

    Reference: Vaswani et al., 2017 (arXiv 1706.03762); for images Dosovitskiy et al., 2020 (arXiv 2010.11929).

    Args:
        model: from :func:`vitscope.load`, or a live module; or a :class:`~vitscope.Trace`, without ``images``.
        images: see :func:`vitscope.capture`; None for a trace, which has its own.
        layer: index of the attention block, from 0; negative from the end.
        head: index of the head, or ``"mean"``, ``"max"``, ``"min"`` over heads.
        query: ``"readout"``, the name of a prefix token such as ``"cls"``, or a patch as (row, column) of the
            block's own grid.
        drop_artefacts: whether artefact tokens are left out as keys, so that the row is the softmax over the other
            tokens. True finds them by :func:`vitscope.artefact_tokens` in these images, a number is the norm above
            which a patch is an artefact after the last block, and an :class:`~vitscope.Artefacts` has its threshold
            and block from other images. A trace takes the artefacts of the same images. If norms have no valley,
            nothing is dropped.

    Returns:
        an attribution with ``values`` (batch, height, width) in [0, 1] on the block's grid. They are the patches' part
        of the row, not rescaled; the whole row sums to one, except for ``"max"`` and ``"min"``. In a window
        transformer they are zero outside the query's window; ``provenance["padding_mass"]`` is the attention on
        padding. Dropped patches are zero and True in ``dropped``; ``provenance["dropped_artefacts"]`` names them and
        their share of the map with them.

    Raises:
        CallError: the model has no such layer, head or query, ``images`` are missing or not valid, or
            ``drop_artefacts`` does not fit the images.
        UnsupportedModelError: as for :func:`vitscope.capture`; for dropping, as for :func:`vitscope.artefact_tokens`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.attention_map(vs.load("vit-nano"), skimage.data.chelsea(), head=4).values.shape
        torch.Size([1, 8, 8])
    """
    drop = require_drop_artefacts(drop_artefacts)
    trace = trace_of(model, images, lambda m, i: capture(m, i, layers=[layer]))
    step = trace.step(layer)
    values, padding = trace.map_and_padding(layer, head, query)
    dropped = dropped_artefacts(trace, drop, model, images)
    record: dict[str, Any] = {}
    if dropped is not None:
        record = {"dropped_artefacts": {**dropped.record, "share_of_map": dropped.shares(values)}}
        values, padding = dropped.masked(trace).map_and_padding(layer, head, query)
    parameters = {
        "layer": step.layer,
        "head": step.require_head(head),
        "query": query if isinstance(query, str) else [int(index) for index in query],
    }
    provenance = {
        **trace.provenance,
        "method": "attention_map",
        "parameters": parameters,
        "padding_mass": padding.tolist(),
        "rows_sum_to_one": parameters["head"] not in ("max", "min") and not bool((padding > 1e-4).any()),
        **record,
    }
    places = None if dropped is None else dropped.places_or_none
    return Attribution(values, step.require_grid(), trace.images, provenance, dropped=places)


def trace_of(
    model: VisionModel | nn.Module | Trace, images: Any, run: Callable[[VisionModel | nn.Module, Any], Trace]
) -> Trace:
    """Return ``model`` if it is a trace, otherwise the trace of ``run(model, images)``.

    Raises:
        CallError: a trace was passed with images, or a model without images.
    """
    if isinstance(model, Trace):
        if images is not None:
            raise CallError("a trace has its images already: pass a trace alone, or a model with images")
        return model
    if images is None:
        raise CallError("images are missing: pass a model with images, or a trace alone")
    return run(model, images)


def grid_of(trace: Trace) -> Grid:
    """Return the token grid of a trace's results.

    Raises:
        UnsupportedModelError: the grid is unknown.
    """
    grid = trace.grid
    if grid is None:
        raise UnsupportedModelError(
            "the token grid of this model is unknown: for a live module of your own, pass patch_size, prefix and "
            "readout to vitscope.load"
        )
    return grid


def require_start_layer(start_layer: Any, num_layers: int) -> int:
    """Return the index of the first block, not negative.

    Raises:
        CallError: it is not a whole number or out of range.
    """
    start = require_integer(start_layer, "start_layer")
    if not -num_layers <= start < num_layers:
        raise CallError(f"start_layer is {start}: the model has layers 0 to {num_layers - 1}")
    return start % num_layers

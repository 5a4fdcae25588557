"""Scenes of window transformers: windows and their queries, shifted windows, stages, and CLS tokens in windows."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vitscope.attention.scores import Head
from vitscope.attention.trace import AttentionStep, Query, Trace
from vitscope.display import ordinal
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.methods.window_attention import is_shifted, region_queries, window_attention, window_regions
from vitscope.results.attribution import Attribution
from vitscope.views.scene import (
    LAYER_AXIS,
    OVERLAY,
    Panel,
    Row,
    Scene,
    columns_for,
    head_grid,
    head_overlays,
    map_panel,
    marks_of,
    name_of,
    rows_of,
    uniform_attention,
)
from vitscope.window_tokens.window_cls import WindowCls


def attends_in_windows(step: AttentionStep) -> bool:
    """Return whether a block computes attention within several windows that can be shown on the image."""
    return step.grid is not None and step.slots is not None and len(step.slots) > 1


def attention_scene(trace: Trace, layer: int | None, query: Query, *, index: int = 0) -> Scene:
    """Return raw attention: heads for global attention, windows with their queries for window attention."""
    if not any(attends_in_windows(step) for step in trace.blocks):
        if layer is None:
            return head_grid(trace, query, index=index)
        return head_overlays(trace, layer, query, index=index)
    if layer is None:
        return block_grid(trace, query, index=index)
    if not attends_in_windows(trace.step(layer)):
        return head_overlays(trace, layer, query, index=index)
    if query == "readout":
        return window_heads(trace, layer, index=index)
    return query_heads(trace, layer, query, index=index)


def mean_attention(trace: Trace, layer: int | None, query: Query, *, index: int = 0) -> dict[int, torch.Tensor]:
    """Return the mean of heads that :func:`attention_scene` shows, by layer."""
    if layer is None:
        return {step.layer: trace.map(step.layer, "mean", query_in(trace, step, query))[index] for step in trace.blocks}
    step = trace.step(layer)
    if query == "readout" and attends_in_windows(step):
        return {step.layer: window_attention(trace, layer=layer).values[index]}
    return {step.layer: trace.map(layer, "mean", query)[index]}


def window_heads(trace: Trace, layer: int, *, index: int = 0) -> Scene:
    """Return the windows of one block with a query in each, and its attention: the mean of heads, then each head."""
    step = trace.step(layer)
    marks = region_queries(window_regions(step))

    def values(head: Head) -> torch.Tensor:
        return window_attention(trace, layer=layer, head=head).values

    panels = [Panel(trace.images[index], title="photo, windows and queries", regions=_regions(step), marks=marks)]
    panels += _mean_and_heads(trace, step, values, marks, index)
    return Scene(
        rows=rows_of(panels, columns_for(len(panels))),
        title=f"Windows of {trace.provenance['model']}, {_block(trace, step)}",
        note="red: the windows, and the query in each; maps: attention of the query in each window",
    )


def query_heads(trace: Trace, layer: int, query: Query, *, index: int = 0) -> Scene:
    """Return the window of one patch in one block, and its attention: the mean of heads, then each head."""
    step = trace.step(layer)
    panels = [Panel(trace.images[index], title="photo", regions=_regions(step), marks=marks_of(query))]
    panels += _query_panels(trace, step, query, index)
    return Scene(
        rows=rows_of(panels, columns_for(len(panels))),
        title=f"Heads of {trace.provenance['model']}, {_block(trace, step)}",
        note=f"query: {name_of(query)}",
    )


def shift_effect(trace: Trace, layer: int, query: tuple[int, int], *, index: int = 0, heads: int = 4) -> Scene:
    """Return the attention of one query in a block with regular windows, and below it that in the shifted partner."""
    pair = shifted_pair(trace, layer)
    rows = []
    for step in pair:
        panels = [Panel(trace.images[index], title="photo", regions=_regions(step), marks=[query])]
        panels += _query_panels(trace, step, query, index)[: heads + 1]
        rows.append(Row(panels, len(panels)))
    stage = next(number for number, stage in enumerate(trace.stages) if pair[0] in stage)
    grid = pair[0].require_grid()
    return Scene(
        rows=rows,
        title=f"Regular and shifted windows of {trace.provenance['model']}",
        note=f"query: {name_of(query)}; {ordinal('stage', stage)}, {grid.height} × {grid.width} patches; "
        "above: regular windows, below: shifted ones",
        row_names=[f"{step.layer + 1} ({step.layer})" for step in pair],
        row_axis=LAYER_AXIS,
    )


def shifted_pair(trace: Trace, layer: int) -> tuple[AttentionStep, AttentionStep]:
    """Return a block with regular windows and its partner with shifted ones; ``layer`` is either.

    Raises:
        CallError: the layer has no partner.
    """
    step = trace.step(layer)
    stage = next(stage for stage in trace.stages if step in stage)
    index = stage.index(step)
    partners = stage[max(index - 1, 0) : index] if is_shifted(step) else stage[index + 1 : index + 2]
    for partner in partners:
        if is_shifted(partner) != is_shifted(step):
            return (step, partner) if is_shifted(partner) else (partner, step)
    raise CallError(
        f"layer {step.layer} has no shifted partner, because its grid is a single window or its stage a single block: "
        "choose another layer"
    )


def block_grid(trace: Trace, query: Query = "readout", *, index: int = 0) -> Scene:
    """Return the mean of heads of every block on its own grid, with its windows; a row for each stage.

    If the query is a patch, it is given on the finest grid; in later stages, the patch that contains it is used.
    """

    def panel(step: AttentionStep) -> Panel:
        block_query = query_in(trace, step, query)
        values = _numpy(trace.map(step.layer, "mean", block_query)[index])
        return Panel(
            trace.images[index],
            values,
            _short_name(step),
            1.0,
            _regions(step),
            marks_of(block_query),
            uniform=uniform_attention(step, block_query),
        )

    attention = "attention that each patch receives within its window"
    description = attention if query == "readout" else f"query: {name_of(query)}"
    return Scene(
        rows=_by_stage(trace, panel),
        title=f"Attention of {trace.provenance['model']}, layer by layer and stage by stage",
        note=f"mean of heads; {description}",
    )


def query_in(trace: Trace, step: AttentionStep, query: Query) -> Query:
    """Return the query on a block's own grid, given a query on the finest grid."""
    if isinstance(query, str) or trace.grid is None:
        return query
    finest, grid = trace.grid, step.require_grid()
    finest.token(*query)  # raises an error if the patch lies outside the grid
    return query[0] * grid.height // finest.height, query[1] * grid.width // finest.width


def stage_evolution(trace: Trace, rollouts: Sequence[Attribution], *, index: int = 0) -> Scene:
    """Return the photo and the rollout after each stage."""
    ends = {stage[-1].layer: number for number, stage in enumerate(trace.stages) if stage}
    panels = [Panel(trace.images[index], title="photo")]
    for rollout in rollouts:
        end = rollout.provenance["parameters"]["end_layer"]
        if end in ends:
            panels.append(map_panel(rollout, f"after {ordinal('stage', ends[end])}", index=index))
    return Scene(
        rows=rows_of(panels, len(panels)),
        title=f"Attention rollout of {trace.provenance['model']}, stage by stage",
        note="attention that has reached the tokens of each stage, on the finest grid",
    )


def cls_comparison(result: WindowCls, rollout: Attribution | None, layer: int, *, index: int = 0) -> Scene:
    """Return the attention of a CLS token in every window of one block, the block's own attention, and the rollout."""
    trace, step = result.trace, result.trace.step(layer)
    image, regions = trace.images[index], _regions(step)
    top = [
        Panel(image, title="photo"),
        Panel(image, _numpy(result.map(layer)[index]), "CLS token in each window", regions=regions, flat=True),
    ]
    if rollout is not None:
        mean = _numpy(trace.map(layer, "mean", "readout")[index])
        uniform = uniform_attention(step, "readout")
        top.append(Panel(image, mean, "mean attention of the layer", regions=regions, flat=True, uniform=uniform))
        top.append(map_panel(rollout, "rollout", index=index))
    heads = [
        Panel(image, _numpy(result.map(layer, head)[index]), f"CLS, head {head}", OVERLAY, regions, flat=True)
        for head in range(step.num_heads)
    ]
    return Scene(
        rows=[Row(top, len(top)), *rows_of(heads, min(max(len(heads), len(top)), 8))],
        title=f"A CLS token in every window of {trace.provenance['model']}, {_block(trace, step)}",
        note="each CLS token starts as the mean of its window and attends to it with the layer's own weights",
    )


def cls_grid(result: WindowCls, *, index: int = 0) -> Scene:
    """Return the attention of a CLS token in every window of every block, heads averaged; a row for each stage."""
    trace = result.trace

    def panel(step: AttentionStep) -> Panel:
        return Panel(trace.images[index], _numpy(result.map(step.layer)[index]), _short_name(step), 1.0, _regions(step))

    return Scene(
        rows=_by_stage(trace, panel, [Panel(trace.images[index], title="photo")]),
        title=f"A CLS token in every window of {trace.provenance['model']}",
        note="mean of heads; each CLS token attends to its window with the layer's own weights",
    )


def _query_panels(trace: Trace, step: AttentionStep, query: Query, index: int) -> list[Panel]:
    return _mean_and_heads(trace, step, lambda head: trace.map(step.layer, head, query), marks_of(query), index)


def _mean_and_heads(
    trace: Trace,
    step: AttentionStep,
    values: Callable[[Head], torch.Tensor],
    marks: Sequence[tuple[int, int]],
    index: int,
) -> list[Panel]:
    """Return the mean of heads and each head, with windows outlined and queries marked."""
    heads: list[Head] = ["mean", *range(step.num_heads)]
    titles = ["mean of heads", *(f"head {head}" for head in range(step.num_heads))]
    image, regions = trace.images[index], _regions(step)
    uniform = 1 / step.scores.shape[-1]  # each query attends to its window
    return [
        Panel(image, _numpy(values(head)[index]), title, OVERLAY, regions, marks, flat=True, uniform=uniform)
        for head, title in zip(heads, titles, strict=True)
    ]


def _by_stage(trace: Trace, panel: Callable[[AttentionStep], Panel], first: Sequence[Panel] = ()) -> list[Row]:
    """Return a panel for each block, a row or more for each stage; ``first`` comes before all others."""
    stages = [[panel(step) for step in stage] for stage in trace.stages]
    stages[0][:0] = first
    columns = min(max(map(len, stages)), 6)
    return [row for stage in stages for row in rows_of(stage, columns)]


def _regions(step: AttentionStep) -> np.ndarray:
    """Return the windows on the block's grid; only its frame if the windows are not areas of the image."""
    try:
        return window_regions(step)
    except UnsupportedModelError:
        grid = step.require_grid()
        return np.zeros((grid.height, grid.width), dtype=int)


def _block(trace: Trace, step: AttentionStep) -> str:
    """Return the name of a block, with its stage and grid."""
    stage = next(number for number, stage in enumerate(trace.stages) if step in stage)
    shifted = ", shifted" if is_shifted(step) else ""
    grid = step.require_grid()
    return f"{ordinal('layer', step.layer)} in {ordinal('stage', stage)}{shifted}, {grid.height} × {grid.width} patches"


def _short_name(step: AttentionStep) -> str:
    return f"{ordinal('layer', step.layer)}{', shifted' if is_shifted(step) else ''}"


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()

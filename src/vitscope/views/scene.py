"""Scenes: what a figure shows, as plain data. Drawing them is :mod:`vitscope.views.figure`'s work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from vitscope.attention.trace import Query, Trace
from vitscope.images.image import InputImage
from vitscope.results.attribution import Attribution

OVERLAY = 0.6
UNSIGNED_CAPTION = "colours: each map from its lowest to its highest value"
SIGNED_CAPTION = "colours: against the class, nothing, for the class, by the largest weight of each map"


@dataclass(frozen=True, eq=False)
class Panel:
    """A photo (``values`` None), a map over its photo, or a map alone (``alpha`` 1).

    ``regions`` are outlined and ``marks``, patches as (row, column), get a square; both count on the token grid. A map
    with ``flat`` shows every patch as one block, one that is ``signed`` has zero in the middle of its colours. Where
    ``lit`` is False the photo is faded. ``numbers`` are written at (row, column) of the token grid. ``limits`` are the
    values at the ends of the colours, the map's own by default. ``lines`` are written under the panel.
    """

    image: InputImage
    values: Float[np.ndarray, "height width"] | None = None
    title: str = ""
    alpha: float = OVERLAY
    regions: Int[np.ndarray, "rows columns"] | None = None
    marks: Sequence[tuple[int, int]] = ()
    flat: bool = False
    signed: bool = False
    lit: Bool[np.ndarray, "rows columns"] | None = None
    numbers: Sequence[tuple[float, float, str]] = ()
    limits: tuple[float, float] | None = None
    lines: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Bars:
    """Values with their intervals, one bar each, from top to bottom."""

    names: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float]] | None = None
    title: str = ""


@dataclass(frozen=True, eq=False)
class Dots:
    """Shares with their intervals, a line each from top to bottom; names that share a group share a colour."""

    names: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float]]
    groups: Sequence[int]
    title: str = ""
    signed: bool = False  # differences: a line at zero, values with their sign


@dataclass(frozen=True, eq=False)
class Matrix:
    """Counts by row and column, each row's share of its sum as a shade."""

    values: Int[np.ndarray, "row column"]
    names: Sequence[str]
    title: str = ""
    row_axis: str = ""
    column_axis: str = ""


@dataclass(frozen=True, eq=False)
class Curves:
    """Lines over a common axis: for each name its x and y. ``limits`` are the ends of the y axis.

    The x axis is one of shares, each twice the one before, or ``counted``: whole numbers. ``series`` are the numbers of
    the names' colours and marks, by default in turn.
    """

    names: Sequence[str]
    xs: Sequence[Sequence[float | int]]
    ys: Sequence[Sequence[float | int]]
    title: str = ""
    x_axis: str = ""
    limits: tuple[float, float] | None = None
    percent: bool = False
    counted: bool = False
    series: Sequence[int] | None = None


Shown = Panel | Bars | Dots | Matrix | Curves


@dataclass(frozen=True, eq=False)
class Row:
    """Panels from left to right, each one of ``columns`` equal parts of the page, or ``width`` inches wide."""

    panels: Sequence[Shown]
    columns: int
    width: float | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """Rows of panels with a title, a line that says how the maps were made, and names for rows and columns."""

    rows: Sequence[Row]
    title: str
    note: str = ""
    row_names: Sequence[str] = ()
    column_names: Sequence[str] = ()
    row_axis: str = ""
    column_axis: str = ""
    caption: str = UNSIGNED_CAPTION


def explanation(trace: Trace, rollouts: Sequence[Attribution], *, index: int = 0) -> Scene:
    """The photo, its rollouts, and under them the heads of the last layer over the photo."""
    top = [Panel(trace.images[index], title="photo"), *_rollout_panels(rollouts, index)]
    heads = _head_panels(trace, -1, "readout", index, OVERLAY)
    return Scene(
        rows=[Row(top, len(top)), *wrapped(heads, min(len(heads), 2 * len(top)))],
        title=f"What {trace.provenance['model']} looks at",
        note=f"attention rollout; below it the heads of the last layer ({trace.num_layers - 1}), readout as query",
    )


def head_grid(trace: Trace, query: Query = "readout", *, index: int = 0) -> Scene:
    """Layers × heads, each the map of one head by itself."""
    layers = [step.layer for step in trace.blocks]
    heads = max(step.num_heads for step in trace.blocks)
    return Scene(
        rows=[Row(_head_panels(trace, layer, query, index, alpha=1.0, titled=False), heads) for layer in layers],
        title=f"Attention of {trace.provenance['model']}, layer by layer and head by head",
        note=f"query: {name_of(query)}",
        row_names=[str(layer) for layer in layers],
        column_names=[str(head) for head in range(heads)],
        row_axis="layer",
        column_axis="head",
    )


def head_overlays(trace: Trace, layer: int = -1, query: Query = "readout", *, index: int = 0) -> Scene:
    """The heads of one layer over the photo, their mean and the photo itself first."""
    step = trace.step(layer)
    image = trace.images[index]
    mean = trace.map(layer, "mean", query)[index].cpu().numpy()
    panels = [Panel(image, title="photo"), Panel(image, mean, "mean of heads")]
    panels += _head_panels(trace, layer, query, index, OVERLAY)
    marks = marks_of(query)
    if marks:
        frame = np.zeros(mean.shape, dtype=int)
        panels = [replace(panel, regions=frame, marks=marks) for panel in panels]
    return Scene(
        rows=wrapped(panels, columns_for(len(panels))),
        title=f"Heads of layer {step.layer} of {trace.provenance['model']}",
        note=f"query: {name_of(query)}",
    )


def rollout_panels(rollouts: Sequence[Attribution], *, index: int = 0) -> Scene:
    """The photo and its rollouts side by side, one for each head fusion."""
    panels = [Panel(rollouts[0].images[index], title="photo"), *_rollout_panels(rollouts, index)]
    return Scene(
        rows=[Row(panels, len(panels))],
        title=f"Attention rollout of {rollouts[0].provenance['model']}",
        note=_recipe(rollouts[0]),
    )


def evolution(rollouts: Sequence[Attribution], *, index: int = 0) -> Scene:
    """The rollout after each block, over the photo."""
    panels = [Panel(rollouts[0].images[index], title="photo")]
    for rollout in rollouts:
        end = rollout.provenance["parameters"]["end_layer"]
        panels.append(Panel(rollout.images[index], rollout.values[index].cpu().numpy(), f"after block {end}"))
    parameters = rollouts[0].provenance["parameters"]
    return Scene(
        rows=wrapped(panels, columns_for(len(panels))),
        title=f"Attention rollout of {rollouts[0].provenance['model']}, block by block",
        note=f"{parameters['head_fusion']} of heads, {_recipe(rollouts[0])}",
    )


def name_of(query: Query) -> str:
    """A query as people say it."""
    return query if isinstance(query, str) else f"patch in row {query[0]}, column {query[1]}"


def marks_of(query: Query) -> list[tuple[int, int]]:
    """The patch to mark, where a patch is asked for."""
    return [] if isinstance(query, str) else [query]


def _rollout_panels(rollouts: Sequence[Attribution], index: int) -> list[Panel]:
    return [
        Panel(
            rollout.images[index],
            rollout.values[index].cpu().numpy(),
            f"rollout, {rollout.provenance['parameters']['head_fusion']} of heads",
        )
        for rollout in rollouts
    ]


def _head_panels(
    trace: Trace, layer: int, query: Query, index: int, alpha: float, *, titled: bool = True
) -> list[Panel]:
    step = trace.step(layer)
    image = trace.images[index]
    return [
        Panel(image, trace.map(layer, head, query)[index].cpu().numpy(), f"head {head}" if titled else "", alpha)
        for head in range(step.num_heads)
    ]


def _recipe(rollout: Attribution) -> str:
    parameters = rollout.provenance["parameters"]
    parts = ["rows normalised" if parameters["normalize"] else "rows not normalised"]
    if parameters["discard_ratio"]:
        parts.append(f"lowest {parameters['discard_ratio']:.0%} discarded")
    if parameters["start_layer"]:
        parts.append(f"from block {parameters['start_layer']} on")
    return ", ".join(parts)


def columns_for(panels: int) -> int:
    """How many panels to a row: near a square, wider than high."""
    return next(columns for columns in range(1, panels + 1) if columns * columns >= panels * 1.3 or columns == panels)


def wrapped(panels: Sequence[Shown], columns: int) -> list[Row]:
    return [Row(panels[start : start + columns], columns) for start in range(0, len(panels), columns)]

"""Scenes: the content of a figure as plain data. :mod:`vitscope.views.figure` renders them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from vitscope.attention.trace import AttentionStep, Query, Trace
from vitscope.display import ordinal
from vitscope.images.image import InputImage
from vitscope.results.attribution import Attribution
from vitscope.results.colours import ColourScale, colour_scale
from vitscope.validation import short_label as short_label
from vitscope.views.palette import OutlineName

OVERLAY = 0.6  # opacity of a map over its photo
PANEL_RATIO = 1.3  # columns to rows of a grid of panels
PALE_CAPTION = "pale: interval holds 0"
UNSIGNED_CAPTION = "colours: each map from its lowest to its highest value"
SIGNED_CAPTION = "white: no effect; each map is scaled to its largest absolute value"


@dataclass(frozen=True, eq=False)
class Outline:
    """A region of the photo, outlined and named: ``mask`` is True inside."""

    name: str
    mask: Bool[np.ndarray, "pixel_height pixel_width"]


LAYER_AXIS, HEAD_AXIS = "layer (index)", "index of the head"


@dataclass(frozen=True, eq=False)
class Panel:
    """A photo, a map over its photo, or a map alone.

    Attributes:
        image: the photo.
        values: (height, width) of the map; None for a photo alone.
        title: written above.
        alpha: opacity of the map; at 1 the map is shown alone.
        regions: numbers on the token grid, or on the pixels; the borders between them are outlined.
        marks: patches as (row, column) of ``regions``, each outlined by a square.
        flat: show every patch as a block of one colour, without interpolation.
        signed: red for positive values (supporting a class), white for zero, blue for negative ones (opposing it).
        lit: False for parts of the photo that are faded.
        numbers: short texts as (row, column, text), placed on ``regions``.
        limits: the values at the ends of the colour scale; by default those of
            :func:`~vitscope.results.colours.colour_scale`.
        uniform: for a map of attention, the attention of each patch if it was the same for all tokens. The numbers at
            the ends of the colours are then multiples of it.
        lines: written below.
        explained: whether a large panel has a colour bar with numbers, and a note on outliers, below it.
        dropped: True for patches that the map leaves out, which are grey and hatched.
        outline: the colour of outlines and numbers: ``"mark"`` (bright red), ``"plain"`` (black), ``"supports"`` or
            ``"opposes"``.
        colormap: name of the map's colours; by default inferno, and RdBu_r if it is signed.
        pale: True for parts of a map that cannot be told from zero, in pale colours; None for none.
        outlines: regions of the photo, drawn over the map.
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
    dropped: Bool[np.ndarray, "height width"] | None = None
    outline: OutlineName = "mark"
    uniform: float | None = None
    explained: bool = True
    colormap: str = ""
    pale: Bool[np.ndarray, "height width"] | None = None
    outlines: Sequence[Outline] = ()

    @cached_property
    def scale(self) -> ColourScale:
        """The ends of the colours of the map. A single segment or window is no outlier."""
        if self.values is None or self.limits is not None:
            return ColourScale(self.limits)
        values = self.values if self.dropped is None else np.where(self.dropped, np.nan, self.values)
        return colour_scale(values, signed=self.signed, uniform=self.uniform, clip=not self.flat)


@dataclass(frozen=True, eq=False)
class Bars:
    """Values as horizontal bars, from top to bottom: red above zero, blue below; optionally with intervals.

    A bar whose interval holds zero is pale.
    """

    names: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float]] | None = None
    title: str = ""


@dataclass(frozen=True, eq=False)
class Dots:
    """Shares with their intervals, one per line from top to bottom.

    Attributes:
        groups: a number for each name; names with the same number have the same colour.
        signed: the values are differences: shown with their sign, and with a line at zero.
    """

    names: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float]]
    groups: Sequence[int]
    title: str = ""
    signed: bool = False


@dataclass(frozen=True, eq=False)
class Matrix:
    """Counts by row and column; the shade of a cell is its share of the row's sum."""

    values: Int[np.ndarray, "row column"]
    names: Sequence[str]
    title: str = ""
    row_axis: str = ""
    column_axis: str = ""


@dataclass(frozen=True, eq=False)
class Cells:
    """Values by row and column as coloured cells with their numbers: red above zero, blue below, grey for NaN.

    Attributes:
        limit: the absolute value at the ends of the colours; by default the largest.
    """

    values: Float[np.ndarray, "row column"]
    row_names: Sequence[str]
    column_names: Sequence[str]
    title: str = ""
    row_axis: str = ""
    column_axis: str = ""
    limit: float | None = None


@dataclass(frozen=True, eq=False)
class Curves:
    """Lines over a common x axis.

    Attributes:
        names: of the lines; if all are empty, there is no legend.
        xs, ys: the points of each line.
        x_axis: the title of the x axis.
        limits: the ends of the y axis; None to derive them from the values.
        percent: the y axis is in percent.
        counted: the x axis has whole numbers; otherwise it has shares on a logarithmic scale.
        series: for each line the number of its colour and marker; by default in order.
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


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of positive values in bins of equal ratio, on logarithmic axes.

    Attributes:
        threshold: value at a vertical line; None for no line.
        x_axis: the title of the x axis.
    """

    values: Float[np.ndarray, " value"]
    threshold: float | None = None
    title: str = ""
    x_axis: str = ""


AnyPanel = Panel | Bars | Dots | Matrix | Cells | Curves | Histogram


@dataclass(frozen=True, eq=False)
class Row:
    """Panels from left to right, each ``width`` inches wide, by default one of ``columns`` equal shares of the page."""

    panels: Sequence[AnyPanel]
    columns: int
    width: float | None = None


@dataclass(frozen=True, eq=False)
class Frames:
    """A value for each panel, drawn as the colour of its frame and as a number: red above zero, blue below.

    Attributes:
        values: by row and panel; NaN for a grey frame, and for panels that a row lacks.
        scale: name of the values with their unit, next to their colour bar.
    """

    values: Float[np.ndarray, "row column"]
    scale: str


@dataclass(frozen=True, eq=False)
class Scene:
    """The content of a figure: rows of panels.

    Attributes:
        subject: below the title: the photo, what the model predicts for it, and the explained class.
        note: below that: how the maps were computed.
        row_names, column_names: written next to the rows and above the columns.
        row_axis, column_axis: the titles of these names.
        caption: of the legend of the maps' colours; without one, there is no legend.
        frames: a value for each panel.
    """

    rows: Sequence[Row]
    title: str
    note: str = ""
    row_names: Sequence[str] = ()
    column_names: Sequence[str] = ()
    row_axis: str = ""
    column_axis: str = ""
    caption: str = UNSIGNED_CAPTION
    frames: Frames | None = None
    subject: str = ""

    @property
    def photo(self) -> Image.Image:
        """The photo of the first panel that has one."""
        return next(panel.image.photo for row in self.rows for panel in row.panels if isinstance(panel, Panel))


def head_grid(trace: Trace, query: Query = "readout", *, index: int = 0) -> Scene:
    """Return a grid of layers × heads, each cell the map of one head alone."""
    layers = [step.layer for step in trace.blocks]
    heads = max(step.num_heads for step in trace.blocks)
    return Scene(
        rows=[Row(_head_panels(trace, layer, query, index, alpha=1.0, titled=False), heads) for layer in layers],
        title=f"Attention of {trace.provenance['model']}, by layer and head",
        note=f"query: {name_of(query)}",
        row_names=[f"{layer + 1} ({layer})" for layer in layers],
        column_names=[str(head) for head in range(heads)],
        row_axis=LAYER_AXIS,
        column_axis=HEAD_AXIS,
    )


def head_overlays(trace: Trace, layer: int = -1, query: Query = "readout", *, index: int = 0) -> Scene:
    """Return the photo, the mean of one layer's heads over the photo, and each of these heads over the photo."""
    step = trace.step(layer)
    image = trace.images[index]
    mean = trace.map(layer, "mean", query)[index].cpu().numpy()
    panels = [Panel(image, title="photo"), Panel(image, mean, "mean of heads", uniform=uniform_attention(step, query))]
    panels += _head_panels(trace, layer, query, index, OVERLAY)
    marks = marks_of(query)
    if marks:
        frame = np.zeros(mean.shape, dtype=int)
        panels = [replace(panel, regions=frame, marks=marks) for panel in panels]
    return Scene(
        rows=rows_of(panels, columns_for(len(panels))),
        title=f"Heads of {ordinal('layer', step.layer)} of {trace.provenance['model']}",
        note=f"query: {name_of(query)}",
    )


def map_panel(result: Attribution, title: str = "", *, index: int = 0) -> Panel:
    """Return the map of a result on patches, over its photo."""
    values = result.values[index].cpu().numpy()
    dropped = None if result.dropped is None else result.dropped[index].cpu().numpy()
    return Panel(result.images[index], values, title, signed=result.signed, uniform=result.uniform, dropped=dropped)


def rollout_maps(rollouts: Sequence[Attribution], index: int) -> list[Panel]:
    """Return the map of each rollout of one image, named by its head fusion."""
    return [
        map_panel(rollout, f"rollout, {rollout.provenance['parameters']['head_fusion']} of heads", index=index)
        for rollout in rollouts
    ]


def uniform_attention(step: AttentionStep, query: Query) -> float:
    """Return the attention of each token if it was the same for all tokens that the query can attend to.

    The readout attends to all windows, and a patch to its own.
    """
    return 1 / (step.grid.num_tokens if query == "readout" and step.grid is not None else step.scores.shape[-1])


def name_of(query: Query) -> str:
    """Return a query as text."""
    return query if isinstance(query, str) else f"patch in row {query[0]}, column {query[1]}"


def marks_of(query: Query) -> list[tuple[int, int]]:
    """Return the patch to mark, if the query is a patch."""
    return [] if isinstance(query, str) else [query]


def _head_panels(
    trace: Trace, layer: int, query: Query, index: int, alpha: float, *, titled: bool = True
) -> list[Panel]:
    step = trace.step(layer)
    image = trace.images[index]
    return [
        Panel(
            image,
            trace.map(layer, head, query)[index].cpu().numpy(),
            f"head {head}" if titled else "",
            alpha,
            uniform=uniform_attention(step, query),
        )
        for head in range(step.num_heads)
    ]


def columns_for(panels: int) -> int:
    """Return the number of columns for a number of panels, so that the grid is slightly wider than high."""
    choices = range(1, panels + 1)
    return next(columns for columns in choices if columns * columns >= panels * PANEL_RATIO or columns == panels)


def rows_of(panels: Sequence[AnyPanel], columns: int) -> list[Row]:
    """Return the panels in rows of ``columns``."""
    return [Row(panels[start : start + columns], columns) for start in range(0, len(panels), columns)]

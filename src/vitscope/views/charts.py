"""Charts of a scene, drawn with matplotlib: bars, dots, curves, and matrices of counts."""

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitscope.results.colours import SIGNED_COLORMAP
from vitscope.views.numbers import MINUS, signed_number
from vitscope.views.palette import FAINT, FRAME, GRID, INK, OPPOSES, SERIES, SUPPORTS, WHITE
from vitscope.views.scene import Bars, Cells, Curves, Dots, Histogram, Matrix

LETTER = 0.068  # inches for a letter of a name next to a bar
NUMBER = 0.62  # inches for a number next to a bar
PALE_BAR = 0.3  # opacity of a bar whose interval holds 0
MAX_MARKERS = 20  # on a line: more would overlap
MAX_SINGLE_COLUMN = 4  # names in a legend of one column; more are set in two
MAX_NUMBERED_ROWS = 16  # of a matrix: in more, the numbers do not fit into the cells
TICK_RATIO = 1.55  # between neighbouring labels of a logarithmic axis
BINS = 60  # of a histogram
MAX_TICKS = 5  # on the logarithmic axis of a histogram
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")


def draw_bars(axes: Any, bars: Bars) -> None:
    """Draw horizontal bars from zero, each with its interval as a line and its value next to it."""
    ends = bars.intervals or [(value, value) for value in bars.values]
    reach = max(*(abs(end) for interval in ends for end in interval), *(abs(value) for value in bars.values), 1e-300)
    lowest, highest = min(0.0, *(low for low, _ in ends)), max(0.0, *(high for _, high in ends))
    texts = [signed_number(value, minus=MINUS) for value in bars.values]
    for row, (name, value, (low, high)) in enumerate(zip(bars.names, bars.values, ends, strict=True)):
        alpha = PALE_BAR if bars.intervals is not None and low <= 0 <= high else 0.85
        axes.barh(row, value, height=0.62, color=SUPPORTS if value >= 0 else OPPOSES, alpha=alpha, linewidth=0)
        if bars.intervals is not None:
            axes.plot([low, high], [row, row], color=INK, linewidth=1.4, solid_capstyle="butt")
        side = 1.0 if value >= 0 else -1.0
        tip = max(value, high, 0.0) if side > 0 else min(value, low, 0.0)
        align = "left" if side > 0 else "right"
        axes.text(tip + side * 0.03 * reach, row, texts[row], fontsize=8, color=INK, va="center", ha=align)
        _write_name(axes, row, name)
    has_numbers = [min(bars.values) < 0, max(bars.values) >= 0]  # left and right of the bars
    inches = _width_in_inches(axes)
    number = max(NUMBER, LETTER * max(map(len, texts)) + 0.12)
    room = number * max(highest - lowest, 1e-300) / max(inches - number * sum(has_numbers), number)
    axes.set_xlim(lowest - room * has_numbers[0], highest + room * has_numbers[1])
    axes.set_ylim(len(bars.values) - 0.4, -0.6)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_axis_off()


def draw_dots(axes: Any, dots: Dots) -> None:
    """Draw a dot for each value, with its interval as a line and its value next to it."""
    ends = [end for interval in dots.intervals for end in interval] + ([0.0] if dots.signed else [])
    low, high = min(*ends, *dots.values), max(*ends, *dots.values)
    room = max(high - low, 1e-3) * 0.04
    for row, (name, value, interval) in enumerate(zip(dots.names, dots.values, dots.intervals, strict=True)):
        colour, marker = SERIES[dots.groups[row] % len(SERIES)]
        axes.plot(interval, [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([value], [row], color=colour, marker=marker, markersize=5)
        text = f"{100 * value:+.1f}".replace("-", MINUS) if dots.signed else f"{100 * value:.1f} %"
        axes.text(max(value, interval[1]) + room, row, text, fontsize=8, color=INK, va="center", ha="left")
        _write_name(axes, row, name)
    inches = _width_in_inches(axes)
    axes.set_xlim(low - room, high + room + (high - low + 2 * room) * NUMBER / max(inches - NUMBER, NUMBER))
    axes.set_ylim(len(dots.values) - 0.4, -0.6)
    if dots.signed:
        axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    signed = FuncFormatter(lambda value, _: f"{100 * value:+.0f}".replace("-", MINUS) if round(100 * value) else "0")
    axes.xaxis.set_major_formatter(signed if dots.signed else PERCENT)
    axes.tick_params(labelsize=7.5, colors=FAINT, length=0)
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_frame_on(False)


def _write_name(axes: Any, row: int, name: str) -> None:
    """Write a name to the left of the axes."""
    transform = axes.get_yaxis_transform()
    axes.text(-0.03, row, name, fontsize=9, color=INK, va="center", ha="right", transform=transform)


def _width_in_inches(axes: Any) -> float:
    return axes.get_window_extent().width / axes.get_figure().dpi


def draw_matrix(axes: Any, matrix: Matrix, side: float) -> None:
    """Draw a square of shades with its counts, ``side`` inches long, with names to the left and below."""
    shares = matrix.values / np.maximum(matrix.values.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    count = len(matrix.names)
    for row, column in np.ndindex(*matrix.values.shape) if count <= MAX_NUMBERED_ROWS else ():
        shade = WHITE if shares[row, column] > 0.55 else INK
        axes.text(column, row, f"{matrix.values[row, column]}", fontsize=7.5, color=shade, ha="center", va="center")
    letters = max(int(side / count / LETTER), 2)
    short_names = [name if len(name) <= letters else f"{name[: letters - 1]}…" for name in matrix.names]
    step = max(round(count / 20), 1)
    axes.set_xticks(range(0, count, step), short_names[::step], fontsize=7.5)
    axes.set_yticks(range(0, count, step), matrix.names[::step], fontsize=7.5)
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel(matrix.column_axis, fontsize=8, color=FAINT)
    axes.set_ylabel(matrix.row_axis, fontsize=8, color=FAINT)
    for spine in axes.spines.values():
        spine.set_color(FRAME)


@dataclass(frozen=True)
class SignedScale:
    """The colours and the numbers of signed values: red above zero, white at zero, blue below, grey for NaN.

    Attributes:
        limit: the absolute value at both ends of the colours.
        decimals: digits after the point of a number.
    """

    limit: float
    decimals: int

    @classmethod
    def of(cls, values: Float[np.ndarray, "row column"], limit: float | None = None) -> "SignedScale":
        """Return the scale that ends at a limit, by default the largest absolute value, or 1 if all are zero."""
        largest = float(np.nanmax(np.abs(values))) or 1.0
        return cls(limit or largest, max(1 - math.floor(math.log10(largest)), 0))

    @property
    def colormap(self) -> Any:
        """The colour map, from -limit to limit."""
        return matplotlib.colormaps[SIGNED_COLORMAP].with_extremes(bad=FRAME)

    def colour(self, value: float) -> Any:
        """Return the colour of a value."""
        return self.colormap(0.5 + 0.5 * value / self.limit) if math.isfinite(value) else FRAME

    def ink(self, value: float) -> str:
        """Return the colour of a text that is readable on the colour of a value."""
        return WHITE if abs(value) > 0.65 * self.limit else INK

    def text(self, value: float) -> str:
        """Return a number with its sign and two digits of the largest, or 0 if it is rounded to zero; NaN is empty."""
        if not math.isfinite(value):
            return ""
        text = f"{value:+.{self.decimals}f}"
        return text.replace("-", MINUS) if float(text) else "0"


def draw_cells(axes: Any, bar: Any, cells: Cells) -> None:
    """Draw values as coloured cells with their numbers, and a colour bar."""
    scale = SignedScale.of(cells.values, cells.limit)
    limit, colormap = scale.limit, scale.colormap
    axes.imshow(np.ma.masked_invalid(cells.values), cmap=colormap, vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.argwhere(np.isfinite(cells.values)):
        value = float(cells.values[row, column])
        axes.text(column, row, scale.text(value), fontsize=7, color=scale.ink(value), ha="center", va="center")
    axes.set_xticks(range(len(cells.column_names)), cells.column_names, fontsize=8)
    axes.set_yticks(range(len(cells.row_names)), cells.row_names, fontsize=8)
    axes.set_xticks(np.arange(cells.values.shape[1] - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(cells.values.shape[0] - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=WHITE, linewidth=1)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.set_xlabel(cells.column_axis, fontsize=8.5, color=FAINT)
    axes.set_ylabel(cells.row_axis, fontsize=8.5, color=FAINT)
    axes.set_frame_on(False)
    bar.imshow(np.linspace(1, 0, 256)[:, None], cmap=colormap, vmin=0, vmax=1, aspect="auto", extent=(0, 1, -1, 1))
    bar.set_yticks([-1, 0, 1], [scale.text(end) for end in (-limit, 0.0, limit)], fontsize=7.5)
    bar.yaxis.tick_right()
    bar.set_xticks([])
    bar.tick_params(length=0, colors=INK)
    bar.set_frame_on(False)


def draw_curves(axes: Any, curves: Curves) -> None:
    """Draw lines that differ in colour and marker; a marker at every point, unless these would overlap."""
    for index, (name, x, y) in enumerate(zip(curves.names, curves.xs, curves.ys, strict=True)):
        colour, marker = SERIES[(index if curves.series is None else curves.series[index]) % len(SERIES)]
        size = 4 if len(x) <= MAX_MARKERS else 0
        axes.plot(x, y, color=colour, marker=marker, markersize=size, linewidth=1.4, label=name, clip_on=False)
    if curves.limits is not None:
        axes.set_ylim(*curves.limits)
    _set_x_ticks(axes, curves)
    if curves.percent:
        axes.yaxis.set_major_formatter(PERCENT)
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, 1.0 + 0.02 * (1.0 - low)))
    axes.set_xlabel(curves.x_axis, fontsize=8, color=FAINT)
    axes.tick_params(labelsize=7.5, colors=INK, length=2)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if any(curves.names):
        columns = {"ncols": 2, "columnspacing": 1.0} if len(curves.names) > MAX_SINGLE_COLUMN else {}
        style = {"frameon": True, "framealpha": 0.8, "edgecolor": "none", "facecolor": "white"}
        axes.legend(fontsize=7.5, labelcolor=INK, loc="best", **style, **columns)


def draw_histogram(axes: Any, histogram: Histogram) -> None:
    """Draw counts in bins of equal ratio; values above the threshold have another colour."""
    logs = np.log(histogram.values[histogram.values > 0])
    if not len(logs):
        return
    counts, edges = np.histogram(logs, BINS)
    edges = np.exp(edges)
    threshold = np.inf if histogram.threshold is None else histogram.threshold
    colours = [SERIES[0][0] if left < threshold else SUPPORTS for left in edges[:-1]]
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, linewidth=0)
    if histogram.threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    ticks = MaxNLocator(MAX_TICKS, steps=[1, 2, 5, 10]).tick_values(edges[0], edges[-1])
    axes.set_xticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]], minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(histogram.x_axis, fontsize=8, color=FAINT)
    axes.tick_params(labelsize=7.5, colors=INK, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _set_x_ticks(axes: Any, curves: Curves) -> None:
    """Label the x axis of curves: whole numbers, or shares on a logarithmic scale."""
    values = sorted({value for x in curves.xs for value in x})
    if not curves.counted:
        axes.set_xscale("log", base=2)
        axes.set_xticks(_spaced(values), minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(PERCENT)
        return
    first, last = round(min(values, default=0)), round(max(values, default=0))
    axes.set_xticks(range(first, last + 1, max(-(-(last - first) // 8), 1)))
    if first == last:
        axes.set_xlim(first - 0.5, first + 0.5)


def _spaced(values: list[float]) -> list[float]:
    """Return the values whose labels do not overlap on a logarithmic axis."""
    spaced: list[float] = []
    for value in values:
        if not spaced or value >= TICK_RATIO * spaced[-1]:
            spaced.append(value)
    return spaced

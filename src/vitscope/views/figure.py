"""A Scene as a PNG: every panel at its photo's own proportions, nothing on the page that says nothing."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from vitscope.files import atomic_write
from vitscope.images.image import nearest_pixels
from vitscope.results.attribution import COLORMAP, SIGNED_COLORMAP, coloured
from vitscope.views.plain_text import visible
from vitscope.views.scene import SIGNED_CAPTION, Bars, Curves, Dots, Matrix, Panel, Row, Scene

PAGE_WIDTH, PAGE_HEIGHT = 12.0, 14.0  # inches
SMALLEST_PANEL, LARGEST_PANEL = 0.9, 4.0  # inches
GAP = 0.08
DPI = 160
MARK, CASING = "#e8001f", "#ffffff"  # red on a thin white edge, for the colour map has reds of its own
INK, FAINT, GRID = "#1b1b1f", "#6b6b76", "#e4e4ea"
FOR, AGAINST = "#2a6cad", "#b5293c"  # the ends of the signed colour map, a little darker
LINE = 0.155  # inches for a line of text under a panel
NAME = 0.068  # inches for a letter beside a bar
WITHOUT_PHOTO = 0.7  # height over width of a panel
BAR = 0.27  # inches for a bar in a row of bars alone
NUMBER = 0.62  # inches for a number beside a bar
MOST_MARKS = 20  # on a line: more would run together
MANY_NAMES = 4  # in a legend: more stand in two columns
MOST_NUMBERS = 16  # rows of a matrix whose cells can hold a number
AXIS = 0.42  # inches for the numbers under curves
TICKS = 0.26  # inches for the numbers under dots
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
SERIES = (
    *(("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v"), ("#e69f00", "P")),
    *(("#1b1b1f", "X"), ("#8c6bb1", "<"), ("#7f7f7f", ">"), ("#a65628", "*")),
)


def save_figure(scene: Scene, path: str | Path, *, overwrite: bool = True) -> Path:
    """Write a scene as PNG, beside first and then renamed.

    Raises:
        OutputExistsError: ``path`` is taken and ``overwrite`` is False.
        SaveError: it cannot be written; what stood at ``path`` is still there.
    """
    path = Path(path)
    with atomic_write(path, overwrite=overwrite) as beside:
        canvas = FigureCanvasAgg(draw(scene))
        canvas.print_png(str(beside))
    return path


def draw(scene: Scene) -> Figure:
    """The scene as a matplotlib figure, laid out in inches; names are written as they are, dollar signs too.

    Control characters, which fonts lack, are escaped.
    """
    with matplotlib.rc_context({"text.parse_math": False}):
        return _drawn(_visible(scene))


def _visible(part: Any) -> Any:
    """A part of a scene, with control characters escaped in all of its texts."""
    if isinstance(part, str):
        return visible(part)
    if isinstance(part, list | tuple):
        return type(part)(map(_visible, part))
    if isinstance(part, Scene | Row | Panel | Bars | Dots | Matrix | Curves):
        return replace(part, **{each.name: _visible(getattr(part, each.name)) for each in fields(part)})
    return part


def _drawn(scene: Scene) -> Figure:
    photos = (panel.image.photo for row in scene.rows for panel in row.panels if isinstance(panel, Panel))
    ratio = next((photo.height / photo.width for photo in photos), WITHOUT_PHOTO)
    left = 0.55 if scene.row_names else 0.2
    top, bottom = (1.12 if scene.column_names else 0.82), (0.5 if scene.caption else 0.15)
    widths = [row.width or _panel_width(row.columns, len(scene.rows), left, ratio) for row in scene.rows]
    title_heights = [0.26 if any(panel.title for panel in row.panels) else 0.0 for row in scene.rows]
    heights = [
        _height(row, width, ratio) + above + _below(row) + GAP
        for row, width, above in zip(scene.rows, widths, title_heights, strict=True)
    ]
    tops = [top + sum(heights[:i]) for i in range(len(heights))]
    right = max(left + row.columns * (width + GAP) for row, width in zip(scene.rows, widths, strict=True))
    page_width, page_height = max(right + 0.12, 6.4), top + sum(heights) + bottom
    figure = Figure(figsize=(page_width, page_height), dpi=DPI, facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """Inches from the top left as matplotlib's fractions from the bottom left."""
        return x / page_width, 1 - (y + h) / page_height, w / page_width, h / page_height

    def write(x: float, y: float, text: str, size: float, colour: str = INK, **style: Any) -> None:
        figure.text(x / page_width, 1 - y / page_height, text, fontsize=size, color=colour, **style)

    write(left, 0.36, scene.title, 13.0, weight="bold")
    write(left, 0.60, scene.note, 9.0, FAINT)
    for i, (row, width, above) in enumerate(zip(scene.rows, widths, title_heights, strict=True)):
        y, height = tops[i] + above, _height(row, width, ratio)
        for j, panel in enumerate(row.panels):
            x = left + j * (width + GAP)
            if isinstance(panel, Bars | Dots):
                margin = max(NAME * max(map(len, panel.names)) + 0.1, 0.35)  # inches for the names
                beside = figure.add_axes(place(x + margin, y, width - margin, height - _ticks(panel)))
                _bars(beside, panel) if isinstance(panel, Bars) else _dots(beside, panel)
                write(x + margin, y - 0.07, panel.title, 9.0)
                continue
            if isinstance(panel, Curves):
                _curves(figure.add_axes(place(x + AXIS, y, width - AXIS - 0.1, height - AXIS)), panel)
                write(x + AXIS, y - 0.07, panel.title, 9.0)
                continue
            if isinstance(panel, Matrix):
                _matrix(figure, place, (x, y, width, height), panel)
                write(x, y - 0.07, panel.title, 9.0)
                continue
            axes = figure.add_axes(place(x, y, width, height))
            pixels = (max(round(width * DPI), 2), max(round(height * DPI), 2))
            axes.imshow(render(panel, pixels), interpolation="none", aspect="auto")
            axes.set_axis_off()
            axes.autoscale(False)  # what is drawn beyond the photo is cut off
            _outline(axes, panel, pixels)
            write(x, y - 0.07, panel.title, 9.0)
            for line, text in enumerate(panel.lines):
                write(x, y + height + LINE * (line + 0.95), text, 7.5, INK if line == 0 else FAINT)
            if i == 0 and scene.column_names:
                write(x + width / 2, y - 0.07, scene.column_names[j], 9.0, ha="center")
        if scene.row_names:
            write(left - 0.09, y + height / 2, scene.row_names[i], 9.0, ha="right", va="center")
    write((left + right) / 2, top - 0.28, scene.column_axis, 9.0, FAINT, ha="center")
    write(0.2, top + sum(heights) / 2, scene.row_axis, 9.0, FAINT, ha="center", va="center", rotation="vertical")
    colours = SIGNED_COLORMAP if scene.caption == SIGNED_CAPTION else COLORMAP
    if scene.caption:
        _legend(figure, place(left, page_height - 0.31, 1.3, 0.1), colours)
    write(left + 1.4, page_height - 0.22, scene.caption, 8.0, FAINT)
    return figure


def _height(row: Row, width: float, ratio: float) -> float:
    """Inches of a row's panels; bars by themselves need no more than their number."""
    if all(isinstance(panel, Bars | Dots) for panel in row.panels):
        return max(BAR * len(panel.names) + _ticks(panel) for panel in row.panels if isinstance(panel, Bars | Dots))
    return width * ratio


def _ticks(panel: Bars | Dots) -> float:
    """Inches for the numbers under a panel's axis."""
    return TICKS if isinstance(panel, Dots) else 0.0


def _below(row: Row) -> float:
    """Inches for the lines under a row's panels."""
    lines = max((len(panel.lines) for panel in row.panels if isinstance(panel, Panel)), default=0)
    return lines * LINE + 0.12 if lines else 0.0


def _panel_width(columns: int, rows: int, left: float, ratio: float) -> float:
    """Inches of one of ``columns`` panels: the page divided, within what can be read and what fits."""
    width = (PAGE_WIDTH - left - 0.2 - GAP * (columns - 1)) / columns
    width = min(width, PAGE_HEIGHT / rows / ratio)
    return min(max(width, SMALLEST_PANEL), LARGEST_PANEL, LARGEST_PANEL / ratio)


def render(panel: Panel, size: tuple[int, int]) -> Image.Image:
    """A panel at ``size`` = (width, height) pixels."""
    photo = panel.image.photo.resize(size, Image.Resampling.LANCZOS)
    if panel.lit is not None:
        photo = _faded(photo, panel.image.paint(panel.lit.astype(np.float32), size, smooth=False) > 0.5)
    if panel.values is None:
        return photo
    smooth = not panel.flat and (panel.signed or panel.alpha < 1)
    heat = panel.image.paint(panel.values, size, smooth=smooth)
    return coloured(photo, heat, panel.alpha, signed=panel.signed, limits=None if panel.signed else panel.limits)


def _faded(photo: Image.Image, lit: np.ndarray) -> Image.Image:
    """The photo with all but its lit part grey and pale."""
    pixels = np.asarray(photo, dtype=np.float32)
    pale = pixels.mean(-1, keepdims=True) * 0.25 + 185
    return Image.fromarray(np.where(lit[..., None], pixels, pale).round().astype(np.uint8))


def _bars(axes: Any, bars: Bars) -> None:
    """Horizontal bars from zero, the interval of each as a line, the value beside it."""
    ends = bars.intervals or [(value, value) for value in bars.values]
    reach = max(*(abs(end) for pair in ends for end in pair), *(abs(value) for value in bars.values), 1e-12)
    lowest, highest = min(0.0, *(low for low, _ in ends)), max(0.0, *(high for _, high in ends))
    for at, (name, value, (low, high)) in enumerate(zip(bars.names, bars.values, ends, strict=True)):
        axes.barh(at, value, height=0.62, color=FOR if value >= 0 else AGAINST, alpha=0.85, linewidth=0)
        if bars.intervals is not None:
            axes.plot([low, high], [at, at], color=INK, linewidth=1.4, solid_capstyle="butt")
        side = 1.0 if value >= 0 else -1.0
        tip = max(value, high, 0.0) if side > 0 else min(value, low, 0.0)
        axes.text(
            tip + side * 0.03 * reach,
            at,
            f"{value:+.3f}".replace("-", "−"),
            fontsize=8,
            color=INK,
            va="center",
            ha="left" if side > 0 else "right",
        )
        axes.text(-0.03, at, name, fontsize=9, color=INK, va="center", ha="right", transform=axes.get_yaxis_transform())
    ends_with_numbers = [min(bars.values) < 0, max(bars.values) >= 0]
    inches = axes.get_window_extent().width / DPI
    room = NUMBER * max(highest - lowest, 1e-12) / max(inches - NUMBER * sum(ends_with_numbers), NUMBER)
    axes.set_xlim(lowest - room * ends_with_numbers[0], highest + room * ends_with_numbers[1])
    axes.set_ylim(len(bars.values) - 0.4, -0.6)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_axis_off()


def _dots(axes: Any, dots: Dots) -> None:
    """A dot for each value, its interval as a line, the value beside it."""
    ends = [end for pair in dots.intervals for end in pair] + ([0.0] if dots.signed else [])
    low, high = min(*ends, *dots.values), max(*ends, *dots.values)
    room = max(high - low, 1e-3) * 0.04
    for at, (name, value, interval) in enumerate(zip(dots.names, dots.values, dots.intervals, strict=True)):
        colour, mark = SERIES[dots.groups[at] % len(SERIES)]
        axes.plot(interval, [at, at], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([value], [at], color=colour, marker=mark, markersize=5)
        number = f"{100 * value:+.1f}".replace("-", "−") if dots.signed else f"{100 * value:.1f} %"
        axes.text(max(value, interval[1]) + room, at, number, fontsize=8, color=INK, va="center", ha="left")
        axes.text(-0.03, at, name, fontsize=9, color=INK, va="center", ha="right", transform=axes.get_yaxis_transform())
    inches = axes.get_window_extent().width / DPI
    axes.set_xlim(low - room, high + room + (high - low + 2 * room) * NUMBER / max(inches - NUMBER, NUMBER))
    axes.set_ylim(len(dots.values) - 0.4, -0.6)
    if dots.signed:
        axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    signed = FuncFormatter(lambda value, _: f"{100 * value:+.0f}".replace("-", "−") if round(100 * value) else "0")
    axes.xaxis.set_major_formatter(signed if dots.signed else PERCENT)
    axes.tick_params(labelsize=7.5, colors=FAINT, length=0)
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_frame_on(False)


def _matrix(figure: Figure, place: Any, room: tuple[float, float, float, float], matrix: Matrix) -> None:
    """A square of shades with its counts, names beside and below."""
    x, y, width, height = room
    beside = min(NAME * max(map(len, matrix.names)) + 0.25, width * 0.45)
    side = min(width - beside - 0.1, height - AXIS - 0.1)
    axes = figure.add_axes(place(x + beside, y, side, side))
    shares = matrix.values / np.maximum(matrix.values.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    count = len(matrix.names)
    for row, column in np.ndindex(*matrix.values.shape) if count <= MOST_NUMBERS else ():
        shade = "#ffffff" if shares[row, column] > 0.55 else INK
        axes.text(column, row, f"{matrix.values[row, column]}", fontsize=7.5, color=shade, ha="center", va="center")
    letters = max(int(side / count / NAME), 2)
    short = [name if len(name) <= letters else f"{name[: letters - 1]}…" for name in matrix.names]
    step = max(round(count / 20), 1)
    axes.set_xticks(range(0, count, step), short[::step], fontsize=7.5)
    axes.set_yticks(range(0, count, step), matrix.names[::step], fontsize=7.5)
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel(matrix.column_axis, fontsize=8, color=FAINT)
    axes.set_ylabel(matrix.row_axis, fontsize=8, color=FAINT)
    for spine in axes.spines.values():
        spine.set_color("#c8c8d0")


def _curves(axes: Any, curves: Curves) -> None:
    """Lines with a mark at every point where there is room, told apart by colour and by mark."""
    for at, (name, x, y) in enumerate(zip(curves.names, curves.xs, curves.ys, strict=True)):
        colour, mark = SERIES[(at if curves.series is None else curves.series[at]) % len(SERIES)]
        size = 4 if len(x) <= MOST_MARKS else 0
        axes.plot(x, y, color=colour, marker=mark, markersize=size, linewidth=1.4, label=name, clip_on=False)
    if curves.limits is not None:
        axes.set_ylim(*curves.limits)
    ticks = sorted({value for x in curves.xs for value in x})
    if curves.counted:
        first, last = round(min(ticks, default=0)), round(max(ticks, default=0))
        axes.set_xticks(range(first, last + 1, max(-(-(last - first) // 8), 1)))
        if first == last:
            axes.set_xlim(first - 0.5, first + 0.5)
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks(_apart(ticks), minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(PERCENT)
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
        several = {"ncols": 2, "columnspacing": 1.0} if len(curves.names) > MANY_NAMES else {}
        shades = {"frameon": True, "framealpha": 0.8, "edgecolor": "none", "facecolor": "white"}
        axes.legend(fontsize=7.5, labelcolor=INK, loc="best", **shades, **several)


def _apart(ticks: list[float]) -> list[float]:
    """Those that can be written beside each other on a logarithmic axis."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.55 * kept[-1]:
            kept.append(tick)
    return kept


def _outline(axes: Any, panel: Panel, size: tuple[int, int]) -> None:
    """The borders between a panel's regions, a square around each marked patch, numbers where they belong."""
    if panel.regions is None:
        return
    regions = _at_most(panel.regions, size)
    left, top, right, bottom = panel.image.box
    scale_x, scale_y = size[0] / panel.image.photo.width, size[1] / panel.image.photo.height
    cell_x, cell_y = (right - left) / regions.shape[1], (bottom - top) / regions.shape[0]

    def at(row: int | float, column: int | float) -> tuple[float, float]:
        """A corner of the grid in the panel's pixels, whose centres lie on whole numbers."""
        return (left + column * cell_x) * scale_x - 0.5, (top + row * cell_y) * scale_y - 0.5

    framed = np.pad(regions, 1, constant_values=-1)
    beside, below = framed[1:-1, 1:] != framed[1:-1, :-1], framed[1:, 1:-1] != framed[:-1, 1:-1]
    lines = [(at(row, column), at(row + 1, column)) for row, column in np.argwhere(beside).tolist()]
    lines += [(at(row, column), at(row, column + 1)) for row, column in np.argwhere(below).tolist()]
    for colour, width in ((CASING, 1.8), (MARK, 1.0)):
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting"))
    thick = min(
        max(min(cell_x * scale_x, cell_y * scale_y) * 72 / DPI * 0.12, 0.5), 1.5
    )  # points; patches may be small
    for row, column in panel.marks:
        (x, y), (far_x, far_y) = at(row, column), at(row + 1, column + 1)
        for colour, width in ((CASING, 1.8 * thick), (MARK, thick)):
            axes.add_patch(Rectangle((x, y), far_x - x, far_y - y, fill=False, edgecolor=colour, linewidth=width))
    down, across = (of / side for of, side in zip(regions.shape, panel.regions.shape, strict=True))
    for high, far, text in panel.numbers:
        _number(axes, *at((high + 0.5) * down, (far + 0.5) * across), text)


def _number(axes: Any, x: float, y: float, text: str) -> None:
    """White on ink, in a circle: readable on any photo."""
    circle = {"boxstyle": "circle,pad=0.22", "facecolor": INK, "edgecolor": CASING, "linewidth": 0.8}
    axes.text(x, y, text, fontsize=7.5, color=CASING, ha="center", va="center", weight="bold", bbox=circle)


def _at_most(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Regions with no more cells than the panel has pixels."""
    return nearest_pixels(regions, (min(size[1], regions.shape[0]), min(size[0], regions.shape[1])))


def _legend(figure: Figure, place: tuple[float, float, float, float], colours: str) -> None:
    axes = figure.add_axes(place)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=matplotlib.colormaps[colours], aspect="auto")
    axes.set_axis_off()

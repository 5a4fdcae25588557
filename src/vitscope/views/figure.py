"""Rendering of a :class:`Scene`: a page laid out in inches, with every panel in the proportions of its photo."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from PIL import Image

from vitscope.files import atomic_write
from vitscope.images.image import nearest_pixels, repeats_patches
from vitscope.results.colours import coloured
from vitscope.views.charts import LETTER, draw_bars, draw_cells, draw_curves, draw_dots, draw_histogram, draw_matrix
from vitscope.views.figure_file import png_bytes, write_figure
from vitscope.views.fonts import font_families
from vitscope.views.frames import border_height, draw_frame
from vitscope.views.legends import draw_legend, height_below, legends_of, scale_ends, write_below
from vitscope.views.page import MAX_SIDE, Box, Page, SceneFigure
from vitscope.views.palette import FAINT, INK, OUTLINES, WHITE
from vitscope.views.plain_text import escape, visible
from vitscope.views.region_outlines import draw_region_outlines
from vitscope.views.scene import (
    PALE_CAPTION,
    AnyPanel,
    Bars,
    Cells,
    Curves,
    Dots,
    Frames,
    Histogram,
    Matrix,
    Outline,
    Panel,
    Row,
    Scene,
)
from vitscope.views.style import DPI, FigureStyle

PAGE_WIDTH, PAGE_HEIGHT = 12.0, 14.0  # inches
SMALLEST_PAGE_WIDTH = 6.4  # inches
SMALLEST_PANEL, LARGEST_PANEL = 0.9, 4.0  # inches
GAP = 0.08  # inches between panels
TITLE = 0.26  # inches for the titles of a row
HEADING = 0.25  # inches for a line of the title of a page
NOTE = 0.2  # inches for a line below it
HEADING_LETTER, NOTE_LETTER = 0.118, 0.071  # inches for a letter
BAR = 0.27  # inches for a bar, in a row without photos
CELL_WIDTH, CELL_HEIGHT = 0.56, 0.36  # inches
CELL_MARGIN = 0.5  # inches to the left of cells, for short names of their rows
CELL_BAR = 1.2  # inches to the right of cells, for a colour bar
AXIS = 0.42  # inches for the numbers under curves
TICKS = 0.26  # inches for the numbers under dots
LEGEND = 0.25  # inches for another line of legends
WITHOUT_PHOTO = 0.7  # height over width of a panel
PLAIN = FigureStyle()

Drawable = TypeVar("Drawable", Scene, AnyPanel)


def save_figure(scene: Scene, path: str | Path, *, overwrite: bool = True, style: FigureStyle | None = None) -> Path:
    """Write a scene in the format that the suffix of ``path`` names: ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        CallError: the figure has too many pixels for a PNG.
        OutputExistsError: ``path`` exists and ``overwrite`` is False.
        SaveError: the file cannot be written; an older file at ``path`` is not changed.
    """
    path = Path(path)
    with atomic_write(path, overwrite=overwrite) as temporary_path:
        write_figure(draw(scene, style), temporary_path, style or PLAIN)
    return path


def figure_png(scene: Scene, style: FigureStyle | None = None) -> bytes:
    """Return a scene as the bytes of a PNG file."""
    return png_bytes(draw(scene, style), style or PLAIN)


def draw(scene: Scene, style: FigureStyle | None = None) -> SceneFigure:
    """Return the scene as a matplotlib figure of its natural width.

    Texts are written literally, dollar signs included; characters that no font has are escaped.
    """
    style = style or PLAIN
    with _readable(style.applied_to(scene)) as readable:
        return _draw(readable, style)


@contextmanager
def _readable(value: Drawable) -> Iterator[Drawable]:
    """Yield a scene or a panel that the fonts of this context can write.

    Control characters are escaped, as are those that no installed font has.
    """
    texts: list[str] = []

    def escape_controls(text: str) -> str:
        texts.append(visible(text))
        return texts[-1]

    value = _map_texts(value, escape_controls)
    families, missing = font_families("".join(texts))
    with matplotlib.rc_context({"text.parse_math": False, "font.family": families}):
        yield _map_texts(value, lambda text: "".join(escape(c) if c in missing else c for c in text))


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a scene, or anything in it, with all of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_texts(item, change) for item in value)
    if isinstance(value, Scene | Row | Frames | Panel | Outline | Bars | Dots | Matrix | Cells | Curves | Histogram):
        return replace(value, **{item.name: _map_texts(getattr(value, item.name), change) for item in fields(value)})
    return value


def _draw(scene: Scene, style: FigureStyle) -> SceneFigure:
    panels = [panel for row in scene.rows for panel in row.panels]
    photos = (panel.image.photo for panel in panels if isinstance(panel, Panel))
    ratio = next((photo.height / photo.width for photo in photos), WITHOUT_PHOTO)
    left = max(0.55, 0.33 + LETTER * max(map(len, scene.row_names))) if scene.row_names else 0.2
    top = 0.58 if scene.column_names else 0.28
    widths = [
        row.width or _width_of_cells(row) or _panel_width(row.columns, len(scene.rows), left, ratio)
        for row in scene.rows
    ]
    legends = legends_of(scene, widths)
    bottom = 0.5 + LEGEND * (len(legends) - 1) if legends else 0.15
    border = border_height(scene.frames, ratio)
    titles = [TITLE if any(panel.title for panel in row.panels) else 0.0 for row in scene.rows]
    heights = [
        _panel_height(row, width, ratio) + border + title + height_below(row, width) + GAP
        for row, width, title in zip(scene.rows, widths, titles, strict=True)
    ]
    content_right = left + max(row.columns * (width + GAP) for row, width in zip(scene.rows, widths, strict=True))
    width_of_page = max(content_right + 0.12, SMALLEST_PAGE_WIDTH)
    room = width_of_page - left - 0.1
    title_lines = wrap(scene.title, int(room / HEADING_LETTER))
    note_lines = [line for text in (scene.subject, scene.note) for line in wrap(text, int(room / NOTE_LETTER))]
    top += HEADING * len(title_lines) + NOTE * len(note_lines) + (0.09 if title_lines else 0.0)
    page = Page(width_of_page, top + sum(heights) + bottom, style.resolution(width_of_page))
    for line, text in enumerate(title_lines, 1):
        page.write(left, 0.11 + HEADING * line, text, 13.0, weight="bold")
    for line, text in enumerate(note_lines, 1):
        page.write(left, 0.14 + HEADING * len(title_lines) + NOTE * line, text, 9.0, FAINT)
    for i, (row, width, title) in enumerate(zip(scene.rows, widths, titles, strict=True)):
        y, height = top + sum(heights[:i]) + title, _panel_height(row, width, ratio)
        for j, panel in enumerate(row.panels):
            box = Box(left + j * (width + GAP), y, width, height + border)
            if scene.frames is not None:
                box = draw_frame(page, box, scene.frames, (i, j))
            _draw_panel(page, box, panel)
        if scene.row_names:
            page.write(left - 0.09, y + (height + border) / 2, scene.row_names[i], 9.0, ha="right", va="center")
    for j, name in enumerate(scene.column_names):
        x = left + j * (widths[0] + GAP) + widths[0] / 2
        page.write(x, top + titles[0] - 0.07, name, 9.0, ha="center")
    page.write((left + content_right) / 2, top - 0.28, scene.column_axis, 9.0, FAINT, ha="center")
    middle = top + sum(heights) / 2
    page.write(0.2, middle, scene.row_axis, 9.0, FAINT, ha="center", va="center", rotation="vertical")
    for line, legend in enumerate(reversed(legends)):
        draw_legend(page, left, page.height - 0.22 - LEGEND * line, legend)
    return page.figure


def _panel_height(row: Row, width: float, ratio: float) -> float:
    """Return the height of a row's panels in inches; a row of bars or cells alone is as high as these need."""
    if all(isinstance(panel, Cells) for panel in row.panels):
        return AXIS + CELL_HEIGHT * max(len(panel.values) for panel in row.panels if isinstance(panel, Cells))
    if all(isinstance(panel, Bars | Dots) for panel in row.panels):
        return max(
            BAR * len(panel.names) + _height_of_ticks(panel) for panel in row.panels if isinstance(panel, Bars | Dots)
        )
    return width * ratio


def _width_of_cells(row: Row) -> float | None:
    """Return the width of a row's panels in inches if these are cells, None otherwise."""
    widths = [
        _margin_of_cells(panel) + CELL_WIDTH * panel.values.shape[1] + CELL_BAR
        for panel in row.panels
        if isinstance(panel, Cells)
    ]
    return max(widths, default=None)


def _margin_of_cells(cells: Cells) -> float:
    """Return the inches to the left of cells, for the names of their rows."""
    return max(CELL_MARGIN, LETTER * max(map(len, cells.row_names)) + 0.1)


def _height_of_ticks(panel: Bars | Dots) -> float:
    """Return the inches for the numbers under a panel's axis."""
    return TICKS if isinstance(panel, Dots) else 0.0


def _panel_width(columns: int, rows: int, left: float, ratio: float) -> float:
    """Return the width of one of ``columns`` panels in inches: an equal share of the page, large enough to read."""
    width = (PAGE_WIDTH - left - 0.2 - GAP * (columns - 1)) / columns
    width = min(width, PAGE_HEIGHT / rows / ratio)
    return min(max(width, SMALLEST_PANEL), LARGEST_PANEL, LARGEST_PANEL / ratio)


def _draw_panel(page: Page, box: Box, panel: AnyPanel) -> None:
    """Draw a panel with its title."""
    x, y, width, height = box.x, box.y, box.width, box.height
    if isinstance(panel, Panel):
        _draw_image(page, box, panel)
    elif isinstance(panel, Bars | Dots):
        margin = max(LETTER * max(map(len, panel.names)) + 0.1, 0.35)  # inches for the names
        x += margin
        _draw_chart(page.axes(Box(x, y, width - margin, height - _height_of_ticks(panel))), panel)
    elif isinstance(panel, Cells):
        left, cells_height = _margin_of_cells(panel), height - AXIS
        cells = page.axes(Box(x + left, y, width - left - CELL_BAR, cells_height))
        bar = page.axes(Box(x + width - CELL_BAR + 0.15, y + 0.1 * cells_height, 0.12, 0.8 * cells_height))
        draw_cells(cells, bar, panel)
    elif isinstance(panel, Curves | Histogram):
        x += AXIS
        _draw_chart(page.axes(Box(x, y, width - AXIS - 0.1, height - AXIS)), panel)
    else:
        margin = min(LETTER * max(map(len, panel.names)) + 0.25, width * 0.45)  # inches for the names
        side = min(width - margin - 0.1, height - AXIS - 0.1)
        draw_matrix(page.axes(Box(x + margin, y, side, side)), panel, side)
    page.write(x, y - 0.07, panel.title, 9.0)


def _draw_image(page: Page, box: Box, panel: Panel) -> None:
    """Draw a photo or map, its outlines, and the lines of text below it."""
    axes = page.axes(box)
    dpi = page.figure.dpi
    size = (max(round(box.width * dpi), 2), max(round(box.height * dpi), 2))
    axes.imshow(render(panel, size), interpolation="none", aspect="auto")
    axes.set_axis_off()
    axes.autoscale(False)  # clips what is drawn beyond the photo
    _draw_hatching(axes, panel, size, dpi)
    _draw_outlines(axes, panel, size, dpi)
    draw_region_outlines(axes, panel, size)
    write_below(page, box, panel)


def draw_on_axes(panel: AnyPanel, axes: Any) -> None:
    """Draw a panel into axes of the caller's figure, with its title and with the notes on its colours below."""
    with _readable(panel) as panel:
        axes.set_title(panel.title, fontsize=9, color=INK, loc="left")
        if isinstance(panel, Panel):
            _draw_image_on_axes(panel, axes)
        elif isinstance(panel, Cells):
            draw_cells(axes, axes.inset_axes((1.03, 0.1, 0.04, 0.8)), panel)
        elif isinstance(panel, Matrix):
            draw_matrix(axes, panel, _inches(axes)[0])
        else:
            _draw_chart(axes, panel)


def _draw_chart(axes: Any, panel: Bars | Dots | Curves | Histogram) -> None:
    if isinstance(panel, Bars):
        draw_bars(axes, panel)
    elif isinstance(panel, Dots):
        draw_dots(axes, panel)
    elif isinstance(panel, Curves):
        draw_curves(axes, panel)
    else:
        draw_histogram(axes, panel)


def _draw_image_on_axes(panel: Panel, axes: Any) -> None:
    photo = panel.image.photo
    pixels = min(max(*_inches(axes)) * DPI, MAX_SIDE)
    scale = pixels / max(photo.size)
    size = (max(round(photo.width * scale), 2), max(round(photo.height * scale), 2))
    axes.imshow(render(panel, size), interpolation="none")
    axes.set_axis_off()
    axes.autoscale(False)
    _draw_hatching(axes, panel, size, DPI)
    _draw_outlines(axes, panel, size, DPI)
    draw_region_outlines(axes, panel, size)
    low, high, unit = scale_ends(panel)
    signed = f"blue: opposes, to {low}; red: supports, to {high}"
    pale = "" if panel.pale is None else PALE_CAPTION
    colours = signed if panel.signed else f"colours: {low} to {high}{unit}"
    below = "\n".join(filter(None, [*panel.lines, colours if high else "", panel.scale.note, pale]))
    axes.text(0, -0.02, below, fontsize=7.5, color=FAINT, va="top", transform=axes.transAxes)


def _inches(axes: Any) -> tuple[float, float]:
    """Return the width and the height of axes."""
    box, dpi = axes.get_window_extent(), axes.get_figure(root=True).dpi
    return box.width / dpi, box.height / dpi


def render(panel: Panel, size: tuple[int, int]) -> Image.Image:
    """Return the image of a panel at ``size`` = (width, height) pixels, without outlines."""
    photo = panel.image.photo.resize(size, Image.Resampling.LANCZOS)
    if panel.lit is not None:
        photo = _fade(photo, panel.image.paint(panel.lit.astype(np.float32), size, smooth=False) > 0.5)
    if panel.values is None:
        return photo
    smooth = not panel.flat and (panel.signed or panel.alpha < 1) and not repeats_patches(panel.values)
    heat = panel.image.paint(panel.values, size, smooth=smooth, dropped=panel.dropped)
    return coloured(
        photo,
        heat,
        panel.alpha,
        signed=panel.signed,
        limits=panel.scale.limits,
        colormap=panel.colormap,
        pale=None if panel.pale is None else panel.image.paint(panel.pale, size, smooth=False) > 0.5,
    )


def _fade(photo: Image.Image, lit: np.ndarray) -> Image.Image:
    """Return the photo with everything but its lit pixels grey and pale."""
    pixels = np.asarray(photo, dtype=np.float32)
    pale = pixels.mean(-1, keepdims=True) * 0.25 + 185
    return Image.fromarray(np.where(lit[..., None], pixels, pale).round().astype(np.uint8))


def _corners(
    panel: Panel, shape: tuple[int, ...], size: tuple[int, int], dpi: int | float
) -> tuple[Callable[[int | float, int | float], tuple[float, float]], float]:
    """Return the function from (row, column) of a grid to pixels of the panel, and the width of a patch's lines.

    The centres of pixels are whole numbers. The width is in points.
    """
    left, top, right, bottom = panel.image.box
    scale_x, scale_y = size[0] / panel.image.photo.width, size[1] / panel.image.photo.height
    cell_x, cell_y = (right - left) / shape[1], (bottom - top) / shape[0]

    def corner(row: int | float, column: int | float) -> tuple[float, float]:
        return (left + column * cell_x) * scale_x - 0.5, (top + row * cell_y) * scale_y - 0.5

    points = min(cell_x * scale_x, cell_y * scale_y) * 72 / dpi  # side of a patch
    return corner, min(max(points * 0.12, 0.5), 1.5)


def _draw_hatching(axes: Any, panel: Panel, size: tuple[int, int], dpi: int | float) -> None:
    """Draw three oblique strokes over each dropped patch, so that its grey is not taken for a value."""
    if panel.dropped is None or panel.values is None:
        return
    corner, thickness = _corners(panel, panel.dropped.shape, size, dpi)
    strokes = (((0.5, 0.0), (0.0, 0.5)), ((1.0, 0.0), (0.0, 1.0)), ((1.0, 0.5), (0.5, 1.0)))
    lines = [
        [corner(row + y, column + x) for y, x in stroke]
        for row, column in np.argwhere(panel.dropped).tolist()
        for stroke in strokes
    ]
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=0.6 * thickness, capstyle="butt"))


def _draw_outlines(axes: Any, panel: Panel, size: tuple[int, int], dpi: int | float) -> None:
    """Draw the borders between a panel's regions, a square around each marked patch, and the numbers."""
    if panel.regions is None:
        return
    regions = _limit_cells(panel.regions, size)
    corner, thickness = _corners(panel, regions.shape, size, dpi)
    colour = OUTLINES[panel.outline]
    framed = np.pad(regions, 1, constant_values=-1)
    vertical, horizontal = framed[1:-1, 1:] != framed[1:-1, :-1], framed[1:, 1:-1] != framed[:-1, 1:-1]
    lines = [(corner(row, column), corner(row + 1, column)) for row, column in np.argwhere(vertical).tolist()]
    lines += [(corner(row, column), corner(row, column + 1)) for row, column in np.argwhere(horizontal).tolist()]
    for stroke, width in ((WHITE, 1.8), (colour, 1.0)):
        axes.add_collection(LineCollection(lines, colors=stroke, linewidths=width, capstyle="projecting"))
    for row, column in panel.marks:
        (x, y), (far_x, far_y) = corner(row, column), corner(row + 1, column + 1)
        for stroke, width in ((WHITE, 1.8 * thickness), (colour, thickness)):
            axes.add_patch(Rectangle((x, y), far_x - x, far_y - y, fill=False, edgecolor=stroke, linewidth=width))
    down, across = (count / side for count, side in zip(regions.shape, panel.regions.shape, strict=True))
    fill = INK if panel.outline == "mark" else colour
    for y, x, text in panel.numbers:
        _draw_number(axes, *corner((y + 0.5) * down, (x + 0.5) * across), text, fill)


def _draw_number(axes: Any, x: float, y: float, text: str, fill: str) -> None:
    """Write a short text in white on a dark circle, readable on any photo."""
    circle = {"boxstyle": "circle,pad=0.22", "facecolor": fill, "edgecolor": WHITE, "linewidth": 0.8}
    axes.text(x, y, text, fontsize=7.5, color=WHITE, ha="center", va="center", weight="bold", bbox=circle)


def _limit_cells(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return regions with no more cells than the panel has pixels."""
    return nearest_pixels(regions, (min(size[1], regions.shape[0]), min(size[0], regions.shape[1])))

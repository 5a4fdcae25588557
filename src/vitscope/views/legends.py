"""Legends of maps: a colour bar with its numbers under each large map, and one for all maps of the figure."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np

from vitscope.results.colours import SIGNED_COLORMAP, default_colormap
from vitscope.views.charts import SignedScale
from vitscope.views.numbers import MINUS
from vitscope.views.page import Box, Page
from vitscope.views.palette import FAINT, INK
from vitscope.views.scene import PALE_CAPTION, SIGNED_CAPTION, UNSIGNED_CAPTION, Panel, Row, Scene

COLOUR_BAR = (1.3, 0.1)  # inches
MIN_WIDTH = 1.4  # inches of a panel with its own colour bar
NAMED_WIDTH = 2.5  # inches of a panel with the words "opposes" and "supports" at its bar
BAR_LINE = 0.2  # inches for a colour bar under a panel
LINE = 0.155  # inches for a line of text under a panel
LETTER = 0.062  # inches for a letter under a panel
LEGEND_LETTER = 0.08  # inches for a letter at the foot of a figure
NAMED_NOTES = 3  # notes of small maps that are written out; of more maps only the number is given


@dataclass(frozen=True)
class Legend:
    """A line at the foot of a figure: its caption, and before it a colour bar between the names of its ends."""

    caption: str
    colormap: str | None = None
    ends: tuple[str, str] = ("", "")


def height_below(row: Row, width: float) -> float:
    """Return the inches under a row's panels, for their colour bars and their lines of text."""
    panels = [panel for panel in row.panels if isinstance(panel, Panel)]
    lines = max((len(_lines(panel, width)) for panel in panels), default=0)
    bar = BAR_LINE if any(_has_bar(panel, width) for panel in panels) else 0.0
    return bar + (lines * LINE + 0.12 if lines else 0.06 if bar else 0.0)


def write_below(page: Page, box: Box, panel: Panel) -> None:
    """Draw the colour bar of a panel if it is large enough, and write its lines below."""
    y = box.y + box.height
    if _has_bar(panel, box.width):
        _draw_panel_bar(page, Box(box.x, y + 0.06, box.width, BAR_LINE - 0.06), panel)
        y += BAR_LINE
    for index, line in enumerate(_lines(panel, box.width)):
        page.write(box.x, y + LINE * (index + 0.95), line, 7.5, INK if index == 0 and panel.lines else FAINT)


def legends_of(scene: Scene, widths: list[float]) -> list[Legend]:
    """Return the legends at the foot of a figure: of unsigned maps, of signed maps, and the notes of small maps.

    Args:
        scene: the figure.
        widths: of the panels of each row, in inches.
    """
    maps = list(_maps(scene))
    if not scene.caption:
        return []
    notes = [panel for panel in maps if panel.scale.note]
    caption = scene.caption + (", unless noted" if notes and scene.caption == UNSIGNED_CAPTION else "")
    signed, unsigned = ([panel for panel in maps if panel.signed is sign] for sign in (True, False))
    legends = []
    if unsigned or not signed:
        legends.append(Legend(caption, _colormap(unsigned, signed=False)))
    if signed:
        pale = f"; {PALE_CAPTION}" if any(panel.pale is not None for panel in signed) else ""
        legends.append(Legend(SIGNED_CAPTION + pale, _colormap(signed, signed=True), ("opposes", "supports")))
    if scene.frames is not None:
        scale = SignedScale.of(scene.frames.values)
        ends = (scale.text(-scale.limit), scale.text(scale.limit))
        legends.append(Legend(scene.frames.scale, SIGNED_COLORMAP, ends))
    small = [
        panel
        for row, width in zip(scene.rows, widths, strict=True)
        for panel in row.panels
        if isinstance(panel, Panel) and not _has_room(panel, width) and panel.scale.note
    ]
    return [*legends, *([Legend(_summary(small))] if small else [])]


def draw_legend(page: Page, x: float, y: float, legend: Legend) -> None:
    """Draw a colour bar between the names of its ends, and its caption."""
    width, height = COLOUR_BAR
    if legend.colormap is None:
        page.write(x, y, legend.caption, 8.0, FAINT)
        return
    first, last = legend.ends
    page.write(x, y, first, 8.0, FAINT)
    x += LEGEND_LETTER * len(first)
    page.write(x + width + 0.08, y, last, 8.0, FAINT)
    _draw_bar(page, Box(x, y - 0.09, width, height), legend.colormap)
    page.write(x + width + 0.15 + LEGEND_LETTER * len(last), y, legend.caption, 8.0, FAINT)


def scale_ends(panel: Panel) -> tuple[str, str, str]:
    """Return the numbers at the ends of a map's colours, and their unit; empty if all values are equal, or for a photo.

    Attention is in multiples of uniform attention: its value times the number of tokens.
    """
    limits = panel.scale.limits
    if limits is None or panel.values is None:
        return "", "", ""
    low, high = (limit / (panel.uniform or 1.0) for limit in limits)
    if panel.signed:
        number = f"{high:#.2g}".rstrip(".")
        return f"{MINUS}{number}", f"+{number}", ""
    digits = 2 if high - low > 0.1 * abs(high) else 4  # so that the ends of a narrow scale differ
    low_text, high_text = ("0" if abs(end) < 0.01 * abs(high) else _number(end, digits) for end in (low, high))
    low_text = low_text.replace("-", MINUS)
    return low_text, high_text, " × uniform" if panel.uniform else ""


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def _maps(scene: Scene) -> Iterator[Panel]:
    for row in scene.rows:
        yield from (panel for panel in row.panels if isinstance(panel, Panel) and panel.values is not None)


def _colormap(panels: list[Panel], *, signed: bool) -> str:
    """Return the name of the colours of panels that are all signed or all unsigned, and so have the same colours."""
    return next((panel.colormap for panel in panels if panel.colormap), default_colormap(signed=signed))


def _has_bar(panel: Panel, width: float) -> bool:
    """Return whether a panel has its own colour bar: not if the figure names the ends of its colours."""
    is_map = panel.values is not None and panel.limits is None and panel.scale.limits is not None
    return is_map and _has_room(panel, width)


def _has_room(panel: Panel, width: float) -> bool:
    """Return whether the colours of a panel are explained below it."""
    return panel.explained and width >= MIN_WIDTH


def _lines(panel: Panel, width: float) -> list[str]:
    """Return the lines under a panel, of which the last ones are the note on its colours."""
    note = panel.scale.note if _has_room(panel, width) else ""
    return [*panel.lines, *textwrap.wrap(note, max(int(width / LETTER), 12))]


def _draw_panel_bar(page: Page, box: Box, panel: Panel) -> None:
    """Draw a colour bar with a number at each end."""
    low, high, unit = scale_ends(panel)
    left, right = low, f"{high}{unit}"
    if panel.signed and box.width >= NAMED_WIDTH:
        left, right = f"opposes {low}", f"{high} supports"
    start, end = LETTER * len(left) + 0.05, LETTER * len(right) + 0.05
    y = box.y + 0.11
    page.write(box.x, y, left, 7.5, FAINT)
    width = min(max(box.width - start - end, 0.3), COLOUR_BAR[0])
    _draw_bar(page, Box(box.x + start, box.y + 0.025, width, 0.08), _colormap([panel], signed=panel.signed))
    page.write(box.x + start + width + 0.05, y, right, 7.5, FAINT)


def _draw_bar(page: Page, box: Box, colormap: str) -> None:
    axes = page.axes(box)
    axes.set_label("colour bar")
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=matplotlib.colormaps[colormap], aspect="auto")
    axes.set_axis_off()


def _summary(panels: list[Panel]) -> str:
    """Return the notes of a few small maps, or the numbers of maps that have one."""
    if len(panels) <= NAMED_NOTES and all(panel.title for panel in panels):
        return "; ".join(f"{panel.title}: {panel.scale.note}" for panel in panels)
    clipped = sum(panel.scale.outliers > 0 for panel in panels)
    counts = {"with a few patches beyond the scale": clipped, "nearly or exactly flat": len(panels) - clipped}
    return "maps " + ", ".join(f"{text}: {count}" for text, count in counts.items() if count)

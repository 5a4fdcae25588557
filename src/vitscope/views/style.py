"""The style of figures: resolution, width, colour maps, and whether there is a title."""

from dataclasses import dataclass, replace

from vitscope.errors import CallError
from vitscope.validation import require_number
from vitscope.views.scene import Panel, Scene

DPI = 160
MIN_DPI, MAX_DPI = 20, 1200
MIN_WIDTH, MAX_WIDTH = 1.0, 60.0  # inches
# Names of matplotlib. A sequential map becomes steadily lighter or darker, and a diverging one is pale in the middle.
SEQUENTIAL = (
    *("inferno", "magma", "plasma", "viridis", "cividis", "gray", "bone", "pink", "hot", "afmhot", "gist_heat"),
    *("copper", "Greys", "Purples", "Blues", "Greens", "Oranges", "Reds", "YlOrBr", "YlOrRd", "OrRd", "PuRd", "RdPu"),
    *("BuPu", "GnBu", "PuBu", "YlGnBu", "PuBuGn", "BuGn", "YlGn"),
)
DIVERGING = ("RdBu", "PuOr", "PRGn", "PiYG", "BrBG", "RdGy", "coolwarm", "bwr", "seismic")


@dataclass(frozen=True)
class FigureStyle:
    """The style of a figure.

    Attributes:
        dpi: pixels per inch, 20 to 1200; in PDF and SVG those of the photos and maps.
        width: of the page in inches, 1 to 60; everything on it is scaled, letters too. None for the natural width.
        colormap: sequential colour map of matplotlib for unsigned maps; None for inferno.
        signed_colormap: diverging colour map for signed maps; None for blue, white and red.
        title: write the title and the lines below it.
    """

    dpi: int | float = DPI
    width: int | float | None = None
    colormap: str | None = None
    signed_colormap: str | None = None
    title: bool = True

    def __post_init__(self) -> None:
        _require_range(self.dpi, "dpi", MIN_DPI, MAX_DPI, "pixels per inch")
        if self.width is not None:
            _require_range(self.width, "width", MIN_WIDTH, MAX_WIDTH, "inches")

    def resolution(self, natural_width: int | float) -> int | float:
        """Return the pixels per inch of a page of its natural width, so that it has the pixels of this style."""
        return self.dpi if self.width is None else self.dpi * self.width / natural_width

    def applied_to(self, scene: Scene) -> Scene:
        """Return the scene with the colour maps of this style, and without titles if it has none."""
        rows = scene.rows
        if self.colormap or self.signed_colormap:
            rows = [
                replace(row, panels=[self._recolour(p) if isinstance(p, Panel) else p for p in row.panels])
                for row in rows
            ]
        return replace(scene, rows=rows) if self.title else replace(scene, rows=rows, title="", subject="", note="")

    def _recolour(self, panel: Panel) -> Panel:
        name = self.signed_colormap if panel.signed else self.colormap
        return panel if name is None else replace(panel, colormap=name)


def style_of(
    dpi: int | float | None = None,
    width: float | None = None,
    colormaps: list[str] | None = None,
    *,
    title: bool = True,
) -> FigureStyle:
    """Return the style that these options describe.

    Args:
        dpi: as in :class:`FigureStyle`; None for 160.
        width: as in :class:`FigureStyle`.
        colormaps: names of matplotlib, at most one sequential and one diverging, each perhaps reversed with ``_r``.
        title: as in :class:`FigureStyle`.

    Raises:
        CallError: a value is out of range, or a colour map is not one of these.
    """
    chosen: dict[str, str] = {}
    for name in colormaps or ():
        base = name.removesuffix("_r")
        if base not in SEQUENTIAL + DIVERGING:
            raise CallError(
                f"--cmap is {name!r}: choose a sequential map ({', '.join(SEQUENTIAL)}) or, for signed maps, a "
                f"diverging one ({', '.join(DIVERGING)}), reversed by adding _r"
            )
        key = "colormap" if base in SEQUENTIAL else "signed_colormap"
        if key in chosen:
            raise CallError(f"--cmap is {chosen[key]!r} and {name!r}: pass at most one sequential and one diverging")
        chosen[key] = name
    return FigureStyle(DPI if dpi is None else dpi, width, **chosen, title=title)


def _require_range(value: int | float, name: str, low: int | float, high: int | float, unit: str) -> None:
    """Check that a value is within its range.

    Raises:
        CallError: it is not.
    """
    if not low <= require_number(value, name) <= high:
        raise CallError(f"--{name} is {value:g}: pass {low:g} to {high:g} {unit}")

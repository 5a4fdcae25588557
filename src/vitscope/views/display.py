"""The figure, the picture and the table of every result, for :mod:`vitscope.display`."""

from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitscope.compositing.result import Composition
from vitscope.errors import CallError, VitscopeError
from vitscope.explanation.result import Explanation
from vitscope.validation import short_text
from vitscope.views import results  # noqa: F401 (registers figures and tables)
from vitscope.views.compositing import places_and_sizes
from vitscope.views.dispatch import scene_of, table_of
from vitscope.views.explanations import explanation_report
from vitscope.views.figure import draw, draw_on_axes, save_figure
from vitscope.views.report import write_report
from vitscope.views.scene import AnyPanel, Panel, Scene


def figure(result: Any, axes: Any, index: int | None) -> Figure:
    """Return the figure of a result; see :meth:`vitscope.display.Figured.figure`."""
    if axes is not None and not isinstance(axes, Axes):
        raise CallError(f"axes is {short_text(axes, '')}: pass matplotlib Axes, or nothing for a new figure")
    _register_scenes_of(result)
    scene = scene_of(result, index)
    if axes is None:
        return draw(scene)
    if isinstance(result, Composition) and result.tested("location"):
        scene = places_and_sizes([result])
    draw_on_axes(_main_panel(scene), axes)
    return cast(Figure, axes.get_figure(root=True))


def png(result: Any) -> bytes | None:
    """Return the figure of a result as PNG for a notebook; None if it cannot be drawn, which then shows its text."""
    _register_scenes_of(result)
    try:
        return draw(scene_of(result, None))._repr_png_()
    except (VitscopeError, KeyError):  # a result that was built by hand may lack entries of its record
        return None


def html(result: Any) -> str:
    """Return the table of a result as HTML, with escaped texts."""
    _register_scenes_of(result)
    return table_of(result)


def write(result: Any, path: Path) -> None:
    """Write the figure of a result; the report of an explanation if the suffix of ``path`` is ``.html``."""
    if isinstance(result, Explanation) and path.suffix.lower() == ".html":
        write_report(explanation_report(result), path, overwrite=True)
    else:
        save_figure(scene_of(result, None), path, overwrite=True)


def _register_scenes_of(result: Any) -> None:
    """Import the figures and tables of tuning only for its results, because its libraries are optional and large."""
    if type(result).__module__.startswith("vitscope.tune."):
        from vitscope.views import tuning_results  # noqa: F401


def _main_panel(scene: Scene) -> AnyPanel:
    """Return the first map or chart of a scene; the first photo if there is none."""
    panels = [panel for row in scene.rows for panel in row.panels]
    return next((panel for panel in panels if not isinstance(panel, Panel) or panel.values is not None), panels[0])

"""New names of files, figures, and the report of what was written."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.cli.json_output import print_results
from vitscope.cli.terminal import say
from vitscope.errors import CallError, VitscopeError

if TYPE_CHECKING:
    from vitscope.models import Prediction, VisionModel
    from vitscope.views.report import Report
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle

FORMATS = (".png", ".pdf", ".svg")
REPORT = ".html"
LONGEST_STEM = 200  # bytes of a photo's name that are used in the name of its figure


def check_format(path: Path, *, report: bool = False) -> None:
    """Check that the suffix of ``--out`` names a format of figures.

    Args:
        path: the value of ``--out``.
        report: whether the command also writes reports as HTML.

    Raises:
        CallError: it does not.
    """
    formats = (*FORMATS, REPORT) if report else FORMATS
    if path.suffix.lower() not in formats:
        raise CallError(f"--out is {path}: end the name in {', '.join(formats[:-1])} or {formats[-1]}")


def shorten_stem(stem: str) -> str:
    """Return a file stem cut so that a suffix still fits."""
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    return stem


def unused_path(name: str, suffix: str = ".png") -> Path:
    """Return a path in this folder that does not exist yet: the name, or the name with a number."""
    path, number = Path(f"{name}{suffix}"), 1
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}{suffix}")
    return path


def predictions_of(model: "VisionModel", photo: Any) -> Sequence["Prediction"]:
    """Return the classes of a photo, the most probable first; none if the model has none."""
    try:
        return model.predict(photo, top_k=sys.maxsize)[0]
    except VitscopeError:  # the model has no classifier
        return []


def save(
    scene: "Scene",
    path: Path,
    overwrite: bool,
    style: "FigureStyle | None",
    report: "Callable[[], Report] | None" = None,
) -> None:
    """Draw a scene and write it in the format that the suffix names; ``.html`` is its report.

    Without a style nothing is drawn.
    """
    if style is None:
        return
    from vitscope.views.figure import save_figure

    if report is not None and path.suffix.lower() == REPORT:
        from vitscope.views.report import write_report

        write_report(report(), path, overwrite=overwrite, style=style)
        return
    save_figure(scene, path, overwrite=overwrite, style=style)


@contextmanager
def reporting(command: str, json_: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield a list for the results, and print it at the end, even if a later photo fails.

    Args:
        command: name of the command.
        json_: print the results as JSON instead of the names of the written files.
    """
    report: list[dict[str, Any]] = []
    is_complete = False
    try:
        yield report
        is_complete = True
    finally:
        if json_ and (report or is_complete):
            print_results(command, report)
        for entry in () if json_ else report:
            for path in filter(None, entry.get("files", [entry.get("figure")])):
                say(f"wrote {path}")

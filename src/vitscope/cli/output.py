"""New names of files, figures, and the report of what was written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.cli.tables import print_json
from vitscope.cli.terminal import say

if TYPE_CHECKING:
    from vitscope.views.scene import Scene

LONGEST_STEM = 200  # bytes of a photo's name that are used in the name of its figure


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


def save(scene: "Scene", path: Path, overwrite: bool) -> None:
    """Draw a scene and write it as PNG."""
    from vitscope.views.figure import save_figure

    save_figure(scene, path, overwrite=overwrite)


@contextmanager
def reporting(json_: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield a list for the results, and print it at the end, even if a later photo fails.

    Args:
        json_: print the results as JSON instead of the names of the written files.
    """
    report: list[dict[str, Any]] = []
    try:
        yield report
    finally:
        if json_ and report:
            print_json(report)
        for entry in () if json_ else report:
            for path in entry.get("files") or [entry["figure"]]:
                say(f"wrote {path}")

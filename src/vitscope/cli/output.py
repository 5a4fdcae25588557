"""Paths of figures, and the report of what was written."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.cli.inputs import check_file_name
from vitscope.cli.tables import print_json
from vitscope.cli.terminal import say
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle

FORMATS = (".png", ".pdf", ".svg")
LONGEST_STEM = 200  # bytes of a photo's name that are used in the name of its figure


def figure_paths(photos: Sequence[Path], command: str, out: Path | None) -> list[Path]:
    """Return a path for the figure of each photo: ``--out``, a file in the folder ``--out``, or a new name here.

    Raises:
        CallError: ``--out`` is one file for several photos, names no format, or is the photo itself.
    """
    return [_figure_path(photo, command, out, len(photos)) for photo in photos]


def _figure_path(photo: Path, command: str, out: Path | None, count: int) -> Path:
    name = f"{shorten_stem(photo.stem)}-{command}"
    if out is None:
        return unused_path(name)
    check_file_name(out, "--out")
    if out.is_dir():
        return out / f"{name}.png"
    if count > 1:
        if out.suffix or out.exists():
            raise CallError(f"--out is {out}, one file for {count} photos: pass a folder")
        return out / f"{name}.png"
    check_format(out)
    if out.exists() and photo.exists() and out.samefile(photo):
        raise CallError(f"--out is {out}, the photo itself: choose another name")
    return out


def check_format(path: Path) -> None:
    """Check that the suffix of ``--out`` names a format of figures.

    Raises:
        CallError: it does not.
    """
    if path.suffix.lower() not in FORMATS:
        raise CallError(f"--out is {path}: end the name in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


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


def each_photo(
    photos: Sequence[Any], paths: Sequence[Path], overwrite: bool, *, bar: bool = True
) -> Iterator[tuple[Any, Path]]:
    """Yield each photo with the path of its figure, and show a progress bar if there are several.

    Args:
        photos: files or images.
        paths: one path per photo.
        overwrite: whether figures may replace files.
        bar: False if explaining a photo already shows a bar.

    Raises:
        CallError: a file exists already, or two photos share a path.
    """
    existing = [path for path in paths if path.exists() and not overwrite]
    if existing:
        raise OutputExistsError(f"{existing[0]} exists already: pass --overwrite or another --out")
    if len(set(paths)) < len(paths):
        raise CallError("two photos have the same name, so their figures would too: explain them one by one")
    pairs = list(zip(photos, paths, strict=True))
    if len(pairs) == 1 or not bar:
        yield from pairs
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(pairs, description="photos", console=console, transient=True, disable=not console.is_terminal)


def save(scene: "Scene", path: Path, overwrite: bool, style: "FigureStyle") -> None:
    """Draw a scene and write it in the format that the suffix names."""
    from vitscope.views.figure import save_figure

    save_figure(scene, path, overwrite=overwrite, style=style)


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

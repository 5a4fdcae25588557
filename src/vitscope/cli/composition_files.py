"""The files of compose: their paths, and what is written into them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitscope.cli.output import save
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.compositing.result import Composition
    from vitscope.views.style import FigureStyle


def paths_of_photo(folder: Path, models: Sequence[str], tests: Sequence[str], *, figures: bool) -> dict[str, Path]:
    """Return the paths of a photo's files: the kind and the index of the model, and "places" for all models."""
    kinds = (*(("plate.png",) if figures else ()), "table.csv", "result.json")
    files = {
        f"{kind} {index}": folder / name for kind in kinds for index, name in enumerate(_names_by_model(models, kind))
    }
    return files | (
        {"places": folder / "places-and-sizes.png"} if figures and {"size", "location"} & set(tests) else {}
    )


def paths_of_controls(folders: Sequence[Path], models: Sequence[str]) -> list[Path]:
    """Return the path of each model's figure of effects, which covers all photos."""
    folder = folders[0] if len(folders) == 1 else folders[0].parent
    return [folder / name for name in _names_by_model(models, "controls.png")]


def _names_by_model(models: Sequence[str], kind: str) -> list[str]:
    """Return a file name for each model, which contains the model's name if there are several."""
    if len(models) == 1:
        return [kind]
    return [f"{Path(name).name.replace(':', '-')}-{kind}" for name in models]


def check_free(paths: Sequence[Path], overwrite: bool) -> None:
    """Check that no file exists, unless it may be replaced, and that no two are the same.

    Raises:
        CallError: a file exists, or two models have the same name.
    """
    existing = [path for path in paths if path.exists() and not overwrite]
    if existing:
        raise OutputExistsError(f"{existing[0]} exists already: pass --overwrite or another --out")
    if len(set(paths)) < len(paths):
        raise CallError("two models have the same name, and so would their files: compare them one by one")


def write_files(
    photo: Path,
    results: Sequence["Composition"],
    files: Mapping[str, Path],
    targets: Sequence[str | None],
    overwrite: bool,
    style: "FigureStyle | None",
    *,
    complete: bool,
    full: bool,
) -> list[Path]:
    """Write the files of a photo and return their paths.

    Args:
        photo: its path.
        results: one for each model.
        files: their paths, see :func:`paths_of_photo`.
        targets: the classes of location maps and size curves.
        overwrite: replace existing files.
        style: of the figures.
        complete: whether all images were evaluated, which location maps and size curves need.
        full: show all images on the plate.
    """
    from vitscope.views.compositing import places_and_sizes, plate
    from vitscope.views.composition_report import composition_subject

    written = []
    for index, result in enumerate(results):
        figure = files.get(f"plate.png {index}")
        if figure is not None:
            scene = replace(plate(result, full=full), subject=composition_subject(str(photo), result))
            save(scene, figure, overwrite, style)
            written.append(figure)
        written += [
            result.save(files[key]) for kind in ("table.csv", "result.json") if (key := f"{kind} {index}") in files
        ]
    if "places" in files and complete:
        subject = "; ".join(composition_subject(str(photo), result) for result in results)
        save(replace(places_and_sizes(results, targets), subject=subject), files["places"], overwrite, style)
        written.append(files["places"])
    return written


def write_page(
    photo: Path,
    results: Sequence["Composition"],
    path: Path,
    targets: Sequence[str | None],
    overwrite: bool,
    style: "FigureStyle | None",
    *,
    full: bool,
) -> list[Path]:
    """Write the report of a photo, of the models whose results are complete, and return its path."""
    from vitscope.views.composition_report import composition_report
    from vitscope.views.report import write_report

    complete = [result for result in results if not result.provenance["interrupted"]]
    if not complete:
        return []
    report = composition_report(str(photo), complete, targets, full=full)
    write_report(report, path, overwrite=overwrite, style=style)
    return [path]

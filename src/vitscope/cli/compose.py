"""The command ``vitscope compose``: edited images of a photo, and a model's outputs for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.composition_files import check_free, paths_of_controls, paths_of_photo, write_files, write_page
from vitscope.cli.inputs import (
    check_file_name,
    load_models,
    parse_fill,
    parse_numbers,
    split_objects,
    split_targets,
    split_values,
)
from vitscope.cli.marks import parse_mark, parse_name
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    SEVERAL,
    BatchSize,
    ComparedModels,
    Device,
    Fill,
    Json,
    ModelNames,
    OutputKind,
    Overwrite,
    Seed,
    TopK,
    option,
)
from vitscope.cli.output import FORMATS, REPORT, reporting, save, shorten_stem, unused_path
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_edited_images, print_effects
from vitscope.cli.terminal import say
from vitscope.errors import CallError

if TYPE_CHECKING:
    from vitscope.compositing.object_masks import ObjectMask
    from vitscope.compositing.result import Composition
    from vitscope.compositing.stage import EditedImage
    from vitscope.models import VisionModel
    from vitscope.views.style import FigureStyle

VISIBLE = 0.9  # share of an object; if the model sees less of it, a line on stderr says so
SEGMENTATION = "quickshift"
TESTS = ("size", "location", "split")


@dataclass(frozen=True)
class MarkedPhoto:
    """A photo with its objects, and edited images of the user's own."""

    path: Path
    objects: Sequence["ObjectMask"]
    edited_images: Sequence["EditedImage"] = ()


@model_command
@drawing
def compose(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="One photo; with --annotations, any number or none.", metavar="PHOTO"),
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            "-b",
            help="An object: a box x,y,w,h in pixels, a polygon x,y,x,y,x,y,…, a mask file, or segments:3,4; "
            "optionally with a name, such as dog=76,12,90,108. Several: repeat it, or separate named ones by commas.",
            callback=split_objects,
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="TOML file of photos, objects and edited images, instead of --object.")
    ] = None,
    model: ModelNames = None,
    tests: Annotated[
        list[str] | None,
        typer.Option(
            "--test",
            help="Test: size, location, split, controls or none. " + SEVERAL,
            show_default="the first three",
            callback=split_values,
        ),
    ] = None,
    targets: Annotated[
        list[str] | None, option("--target", "Several are shown together.", default="each object's", several=True)
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Fit rough masks to the borders of the objects, by GrabCut.")
    ] = False,
    segments: Annotated[str, option("--segments", "For segments: in --object; patches have no numbers there.")] = (
        SEGMENTATION
    ),
    scales: Annotated[
        str | None,
        typer.Option(help="Scales of the size test, such as 0.5,1.", show_default="areas that double"),
    ] = None,
    places: Annotated[str, typer.Option(help="Rows and columns of the location test.")] = "7,7",
    location_scale: Annotated[float, typer.Option(help="Scale of the object in the location test.")] = 1.0,
    fill: Fill = "inpaint",
    background: Annotated[
        Path | None, typer.Option(help="Image for the background 'other'.", show_default="a texture of grass")
    ] = None,
    feather: Annotated[
        float | None,
        typer.Option(help="Width in pixels over which edges fade.", show_default="1 % of the shorter side"),
    ] = None,
    attention: Annotated[bool, typer.Option(help="Also show the rollout of every edited image.")] = True,
    output: OutputKind = "probability",
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    top_k: TopK = 3,
    full: Annotated[bool, typer.Option("--full", help="Show all edited images, not only the most telling.")] = False,
    compare: ComparedModels = None,
    out: Annotated[Path | None, option("--out", "A folder, or a report as HTML.", default="a new folder")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
    style: "FigureStyle | None",
) -> None:
    """Move, resize and swap objects, and compare the predictions."""
    for path, name in ((out, "--out"), (annotations, "--annotations"), (background, "--background")):
        if path is not None:
            check_file_name(path, name)
    photo_paths = list(photos or ())
    models = load_models(model, compare, device, description)
    marked_photos = _marked_photos(photo_paths, objects or [], annotations, refine=refine, cut=segments)
    test_names = [name for name in tests or TESTS if name != "none"]
    grid = parse_numbers(places, "--places")
    classes: Sequence[str | None] = split_targets(targets or (), models[0].labels) or (None,)
    options: dict[str, Any] = {
        "tests": test_names,
        "target": classes[0],
        "scales": None if scales is None else parse_numbers(scales, "--scales"),
        "places": grid * 2 if len(grid) == 1 else grid,
        "location_scale": location_scale,
        "fill": parse_fill(fill),
        "background": background,
        "feather": feather,
        "attention": attention,
        "output": output,
        "seed": seed,
        "batch_size": batch_size,
        "progress": not json_,
    }
    page = _report_path(marked_photos, out, figures=style is not None)
    folders = _folders(marked_photos, out) if page is None else [page.parent]
    model_names = [loaded.name for loaded in models]
    files = [paths_of_photo(folder, model_names, test_names, figures=style is not None) for folder in folders]
    controls_files = paths_of_controls(folders, model_names) if "controls" in test_names and style is not None else []
    if page is not None:
        files, controls_files = [{"page": page}], []
    elif style is None and out is None:
        files = [{} for _ in folders]
    check_free([*(path for paths in files for path in paths.values()), *controls_files], overwrite)
    results_by_photo: list[list[Composition]] = []
    with reporting("compose", json_) as report:
        for marked_photo, paths in zip(marked_photos, files, strict=True):
            results, interrupted = _compose_each(models, marked_photo, options)
            if page is None:
                complete = not interrupted
                written = write_files(
                    marked_photo.path, results, paths, classes, overwrite, style, complete=complete, full=full
                )
            else:
                written = write_page(marked_photo.path, results, page, classes, overwrite, style, full=full)
            _say_what_is_cropped(results)
            for result in () if json_ else results:
                say(f"{marked_photo.path}, as {result.provenance['model']} sees it:")
                print_edited_images(result, top_k, full=full)
            entries = [result.as_json() for result in results]
            report.append(
                {"image": str(marked_photo.path), "files": [str(path) for path in written], "results": entries}
            )
            if interrupted:
                raise KeyboardInterrupt
            results_by_photo.append(results)
        results_by_model = zip(*results_by_photo, strict=True)
        if "controls" in test_names and page is None:
            report.extend(_report_effects(controls_files, results_by_model, classes[0], overwrite, style, quiet=json_))


def _report_effects(
    files: Sequence[Path],
    results_by_model: Iterator[tuple["Composition", ...]],
    target: str | None,
    overwrite: bool,
    style: "FigureStyle | None",
    *,
    quiet: bool,
) -> Iterator[dict[str, Any]]:
    """Write and print the effects of each model over all photos; yield an entry of the report for each model."""
    from vitscope.compositing.effects import effects
    from vitscope.views.compositing import controls

    for index, results in enumerate(results_by_model):
        model_effects, name = effects(results, target=target), results[0].provenance["model"]
        if files:
            save(controls(results, model_effects, target), files[index], overwrite, style)
        if not quiet:
            print_effects(model_effects, name, results[0].output)
        yield {
            "model": name,
            "files": [str(files[index])] if files else [],
            "effects": [effect.as_json() for effect in model_effects],
        }


def _compose_each(
    models: Sequence["VisionModel"], marked_photo: MarkedPhoto, options: Mapping[str, Any]
) -> tuple[list["Composition"], bool]:
    """Return the results of the models, and whether Ctrl-C interrupted them; earlier results are kept."""
    from vitscope.compositing.compose import compose as compose_photo

    results: list[Composition] = []
    for model in models:
        try:
            result = compose_photo(
                model, marked_photo.path, marked_photo.objects, edited_images=marked_photo.edited_images, **options
            )
        except KeyboardInterrupt:
            if not results:
                raise
            return results, True
        results.append(result)
        if result.provenance["interrupted"]:
            return results, True
    return results, False


def _say_what_is_cropped(results: Sequence["Composition"]) -> None:
    """Print a line for each object that a model sees only in part."""
    for result in results:
        for name in result.objects:
            if (fraction := result.visible_fraction(name)) < VISIBLE:
                model = result.provenance["model"]
                say(f"vitscope: {model} crops the photo and sees only {fraction:.0%} of {name}", err=True)


def _marked_photos(
    photos: Sequence[Path], objects: Sequence[str], annotations: Path | None, *, refine: bool, cut: str
) -> list[MarkedPhoto]:
    """Return every photo with its objects, from the annotations or from the command line."""
    if annotations is not None:
        from vitscope.compositing.recipe import read_recipe

        if objects or refine or cut != SEGMENTATION:
            raise CallError(
                "cannot combine --annotations with --object, --refine or --segments: mark the objects in the file"
            )
        return [
            MarkedPhoto(entry.photo, entry.objects, entry.edited_images) for entry in read_recipe(annotations, photos)
        ]
    if len(photos) != 1 or not objects:
        raise CallError(
            f"compose got {len(photos)} photos and {len(objects)} objects: pass one photo and mark an object in it, "
            "as --object 105,20,235,200 (x,y,width,height), or pass --annotations"
        )
    masks = [
        _object_mask(photos[0], text, "object" if len(objects) == 1 else f"object {number}", refine, cut)
        for number, text in enumerate(objects, 1)
    ]
    return [MarkedPhoto(photos[0], masks)]


def _object_mask(photo: Path, text: str, default_name: str, refine: bool, cut: str) -> "ObjectMask":
    """Return the object that a value of --object describes."""
    from vitscope.compositing.object_masks import object_mask

    name, value = parse_name(text, default_name)
    option: Mapping[str, Any]
    if value.startswith("segments:"):
        option = {"segments": parse_numbers(value.removeprefix("segments:"), "--object segments")}
    else:
        option = parse_mark(value, "--object")
    return object_mask(photo, **option, refine=refine, cut=cut, name=name)


def _report_path(marked_photos: Sequence[MarkedPhoto], out: Path | None, *, figures: bool) -> Path | None:
    """Return the path of the report if --out names one, which is written instead of all other files."""
    if out is None or out.suffix.lower() != REPORT or out.is_dir():
        return None
    if not figures:
        raise CallError(f"--no-figure and --out {out} contradict each other: pass one of them")
    if len(marked_photos) > 1:
        raise CallError(f"--out is {out}, one report for {len(marked_photos)} photos: pass a folder")
    return out


def _folders(marked_photos: Sequence[MarkedPhoto], out: Path | None) -> list[Path]:
    """Return the folder for the results of each photo: --out, or a folder in it if there are several photos."""
    if out is not None and (out.is_file() or out.suffix.lower() in (*FORMATS, ".csv", ".json")):
        raise CallError(f"--out is {out}, but compose writes several files: pass a folder, or a report as .html")
    stems = [marked_photo.path.stem for marked_photo in marked_photos]
    if len(stems) == 1:
        return [out or unused_path(f"{shorten_stem(stems[0])}-compose", "")]
    parent = out or unused_path("compose", "")
    if len(set(stems)) < len(stems):
        raise CallError("two photos have the same name, and so would their folders: rename one of them")
    return [parent / stem for stem in stems]

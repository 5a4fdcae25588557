"""The command that puts images together: compose."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.inputs import checked_name, fill_of, load_model, numbers
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    BatchSize,
    Compared,
    Device,
    Examples,
    Fill,
    ImageSize,
    Json,
    ModelName,
    OutputKind,
    Overwrite,
    Seed,
    TopK,
)
from vitscope.cli.output import fresh, reporting, save, shortened
from vitscope.cli.tables import print_composites, print_effects
from vitscope.cli.terminal import say
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.compositing.object_masks import ObjectMask
    from vitscope.compositing.result import Composition
    from vitscope.compositing.stage import EditedImage
    from vitscope.models import VisionModel

SEEN = 0.9  # of an object: less is worth a line
CUT = "quickshift"
TESTS = ("size", "location", "split")


@dataclass(frozen=True)
class Marked:
    """A photo with its objects, and composites of its own."""

    photo: Path
    objects: Sequence["ObjectMask"]
    composites: Sequence["EditedImage"] = ()


@model_command
def compose(
    photos: Annotated[
        list[Path] | None, typer.Argument(help="A photo; with --recipe several, or none.", metavar="PHOTO")
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            "-b",
            help="An object: x,y,w,h in pixels, the corners x,y,x,y,x,y,… of an outline, a mask file, or segments:3,4; "
            "with a name, as dog=76,12,90,108. May be repeated.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML file of photos, outlines and composites, in place of --object.")
    ] = None,
    model: ModelName = "vit-nano",
    tests: Annotated[
        list[str] | None,
        typer.Option(
            "--test", help="size, location, split, controls or none; repeat it.", show_default="the first three"
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="A class, by label or index; several are set side by side.",
            show_default="each object's",
        ),
    ] = None,
    refine: Annotated[bool, typer.Option("--refine", help="Move rough outlines to the objects' borders.")] = False,
    segments: Annotated[str, typer.Option(help="What segments: counts: quickshift, slic.")] = CUT,
    scales: Annotated[
        str | None, typer.Option(help="Of the size test, as 0.5,1.", show_default="areas that double")
    ] = None,
    places: Annotated[str, typer.Option(help="Rows and columns of the location test.")] = "7,7",
    location_scale: Annotated[float, typer.Option(help="The object's size in the location test.")] = 1.0,
    fill: Fill = "inpaint",
    background: Annotated[
        Path | None, typer.Option(help="The other background, an image.", show_default="a texture of grass")
    ] = None,
    feather: Annotated[float | None, typer.Option(help="Pixels over which edges fade.", show_default="1 %")] = None,
    attention: Annotated[bool, typer.Option(help="Also show where the model looked: rollouts.")] = True,
    output: OutputKind = "probability",
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    top_k: TopK = 3,
    compare: Compared = None,
    examples: Examples = None,
    image_size: ImageSize = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write to.", show_default="a new one")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
) -> None:
    """Move, resize and swap objects, and compare the predictions."""
    from vitscope.compositing.effects import effects
    from vitscope.views.compositing import controls

    for path, what in ((out, "--out"), (recipe, "--recipe"), (background, "--background")):
        if path is not None:
            checked_name(path, what)
    given = list(photos or ())
    models = [load_model(model, device, given, examples, image_size, description)]
    models += [load_model(name, device, given, examples, image_size) for name in compare or ()]
    marked = _marked(given, objects or [], recipe, refine=refine, cut=segments)
    wanted = [name for name in tests or TESTS if name != "none"]
    rows = numbers(places, "--places")
    target = targets[0] if targets else None
    options: dict[str, Any] = {
        "tests": wanted,
        "target": target,
        "scales": None if scales is None else numbers(scales, "--scales"),
        "places": rows * 2 if len(rows) == 1 else rows,
        "location_scale": location_scale,
        "fill": fill_of(fill),
        "background": background,
        "feather": feather,
        "attention": attention,
        "output": output,
        "seed": seed,
        "batch_size": batch_size,
        "progress": not json_,
    }
    folders = _folders(marked, out)
    files = [_files(folder, [one.name for one in models], wanted) for folder in folders]
    together = _controls_files(folders, [one.name for one in models]) if "controls" in wanted else []
    _check_free([*(path for one in files for path in one.values()), *together], overwrite)
    made: list[list[Composition]] = []
    with reporting(json_) as report:
        for one, paths in zip(marked, files, strict=True):
            results, interrupted = _asked(models, one, options)
            written = _write(results, paths, targets or (None,), overwrite, whole=not interrupted)
            _say_what_is_cropped(results)
            for result in () if json_ else results:
                say(f"{one.photo}, as {result.provenance['model']} sees it:")
                print_composites(result, top_k)
            shown = [result.as_json() for result in results]
            report.append({"image": str(one.photo), "files": [str(path) for path in written], "results": shown})
            if interrupted:
                raise KeyboardInterrupt
            made.append(results)
        for path, ones in zip(together, zip(*made, strict=True), strict=False):
            found, name = effects(ones, target=target), ones[0].provenance["model"]
            save(controls(ones, found, target), path, overwrite)
            if not json_:
                print_effects(found, name, ones[0].output)
            shown = [effect.as_json() for effect in found]
            report.append({"model": name, "files": [str(path)], "effects": shown})


def _asked(
    models: Sequence["VisionModel"], marked: Marked, options: Mapping[str, Any]
) -> tuple[list["Composition"], bool]:
    """Each model's answers, and whether Ctrl-C came; those of the models before are kept."""
    from vitscope.compositing.compose import compose as composed

    results: list[Composition] = []
    for model in models:
        try:
            results.append(composed(model, marked.photo, marked.objects, composites=marked.composites, **options))
        except KeyboardInterrupt:
            if not results:
                raise
            return results, True
        if results[-1].provenance["interrupted"]:
            return results, True
    return results, False


def _say_what_is_cropped(results: Sequence["Composition"]) -> None:
    """One line for each object that a model does not see whole where it is."""
    for result in results:
        for name in result.outlines:
            if (seen := result.seen(name)) < SEEN:
                model = result.provenance["model"]
                say(f"vitscope: {model} sees {seen:.0%} of {name} where it is: it crops the photo", err=True)


def _marked(
    photos: Sequence[Path], objects: Sequence[str], recipe: Path | None, *, refine: bool, cut: str
) -> list[Marked]:
    """Every photo with its objects, from the recipe or from the command line."""
    if recipe is not None:
        from vitscope.compositing.recipe import read_recipe

        if objects or refine or cut != CUT:
            raise CallError(
                "--recipe marks objects itself: --object, --refine and --segments are for photos without one"
            )
        return [Marked(one.photo, one.objects, one.composites) for one in read_recipe(recipe, photos)]
    if len(photos) != 1 or not objects:
        raise CallError(
            "pass one photo and mark an object in it, as --object 105,20,235,200 (x,y,width,height), or pass --recipe; "
            f"photos: {len(photos)}, objects: {len(objects)}"
        )
    found = [_object(photos[0], text, at, len(objects), refine, cut) for at, text in enumerate(objects)]
    return [Marked(photos[0], found)]


def _object(photo: Path, text: str, at: int, count: int, refine: bool, cut: str) -> "ObjectMask":
    from vitscope.compositing.object_masks import outline

    name, equals, what = text.partition("=")
    if not equals:
        name, what = "object" if count == 1 else f"object {at + 1}", text
    way: Mapping[str, Any]
    if what.startswith("segments:"):
        way = {"segments": numbers(what.removeprefix("segments:"), "--object segments")}
    elif Path(what).suffix and not re.fullmatch(r"[-+\d.,\s]+", what):
        checked_name(what, "--object")
        way = {"mask": what}
    else:
        parts = numbers(what, "--object")
        corners = len(parts) > 4 and len(parts) % 2 == 0
        way = {"polygon": list(zip(parts[::2], parts[1::2], strict=True))} if corners else {"box": parts}
    return outline(photo, **way, refine=refine, cut=cut, name=name)


def _folders(marked: Sequence[Marked], out: Path | None) -> list[Path]:
    """Where the results of each photo go: --out, or a folder in it where there are several photos."""
    if out is not None and (out.is_file() or out.suffix.lower() in (".png", ".csv", ".json")):
        raise CallError(f"--out is {out}: compose writes several files, pass a folder")
    if len(marked) == 1:
        return [out or fresh(f"{shortened(marked[0].photo.stem)}-compose", "")]
    whole = out or fresh("compose", "")
    stems = [one.photo.stem for one in marked]
    if len(set(stems)) < len(stems):
        raise CallError("two photos of the recipe have the same name, so their folders would too")
    return [whole / stem for stem in stems]


def _files(folder: Path, models: Sequence[str], tests: Sequence[str]) -> dict[str, Path]:
    """The files of a photo by what they hold, those of each model by its number."""
    kinds = ("plate.png", "table.csv", "result.json")
    files = {f"{what} {at}": folder / name for what in kinds for at, name in enumerate(_of_models(models, what))}
    return files | ({"places": folder / "places-and-sizes.png"} if {"size", "location"} & set(tests) else {})


def _controls_files(folders: Sequence[Path], models: Sequence[str]) -> list[Path]:
    """The figures of all photos together, one for each model."""
    folder = folders[0] if len(folders) == 1 else folders[0].parent
    return [folder / name for name in _of_models(models, "controls.png")]


def _of_models(models: Sequence[str], what: str) -> list[str]:
    """A file's name for each model; where there are several it carries theirs."""
    if len(models) == 1:
        return [what]
    return [f"{Path(name).name.replace(':', '-')}-{what}" for name in models]


def _check_free(paths: Sequence[Path], overwrite: bool) -> None:
    taken = [path for path in paths if path.exists() and not overwrite]
    if taken:
        raise OutputExistsError(f"{taken[0]} exists already: pass --overwrite or another --out")
    if len(set(paths)) < len(paths):
        raise CallError("two models have the same name, so their files would too: compare them one by one")


def _write(
    results: Sequence["Composition"],
    files: Mapping[str, Path],
    targets: Sequence[str | None],
    overwrite: bool,
    *,
    whole: bool,
) -> list[Path]:
    """The files of a photo; what needs all answers only where they are ``whole``."""
    from vitscope.views.compositing import places_and_sizes, plate

    written = []
    for at, result in enumerate(results):
        figure, table, everything = (files[f"{what} {at}"] for what in ("plate.png", "table.csv", "result.json"))
        save(plate(result), figure, overwrite)
        written += [figure, result.save(table), result.save(everything)]
    if "places" in files and whole:
        save(places_and_sizes(results, targets), files["places"], overwrite)
        written.append(files["places"])
    return written

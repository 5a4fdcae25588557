"""The command ``vitscope lime``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitscope.cli.inputs import check_file_name, load_models, parse_fill, with_contrast
from vitscope.cli.method_options import parse_num_samples, parse_segments
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    BatchSize,
    ComparedModels,
    Contrast,
    Device,
    GroupBy,
    Hide,
    Json,
    ModelNames,
    NumSamples,
    OutputKind,
    OutWithReport,
    Overwrite,
    Photos,
    Regions,
    Seed,
    Segments,
    SkipExisting,
    Target,
)
from vitscope.cli.output import predictions_of, save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.regions import MeasuredPhoto, RegionOption
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_agreement, print_segments
from vitscope.cli.terminal import say
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.metrics.agreement import Agreement
    from vitscope.models import Prediction, VisionModel
    from vitscope.results.segment_attribution import SegmentAttribution
    from vitscope.views.report import Report
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle

COUNT = 5  # segments of each sign in tables, as in the figure


@model_command
@drawing
def lime(
    photos: Photos,
    model: ModelNames = None,
    target: Target = None,
    contrast: Contrast = None,
    num_samples: NumSamples = "1000",
    segments: Segments = "quickshift",
    hide: Hide = "mean",
    sampling: Annotated[
        Literal["lime", "paired", "glime"] | None,
        typer.Option(help="Distribution of the masks.", show_default="lime; paired with auto"),
    ] = None,
    output: OutputKind = "probability",
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    compare: ComparedModels = None,
    arrays: Annotated[
        Path | None, typer.Option(help="File for the weights (.safetensors, .npz or .json); one photo and one model.")
    ] = None,
    region: Regions = None,
    group_by: GroupBy = "predicted",
    out: OutWithReport = None,
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
    style: "FigureStyle | None",
) -> None:
    """Explain a class by segments of the photo, with LIME."""
    from vitscope.metrics.agreement import agreement
    from vitscope.views.segments import describe_fit, describe_prediction, logit_advice
    from vitscope.views.subject import with_subject

    options: dict[str, Any] = {
        "num_samples": parse_num_samples(num_samples),
        "segments": parse_segments(segments),
        "hide": parse_fill(hide),
        "sampling": sampling,
        "output": output,
        "seed": seed,
        "batch_size": batch_size,
        "progress": not json_,
    }
    if arrays is not None:
        _check_arrays(arrays, len(photos) * len([*(model or [""]), *(compare or ())]), overwrite)
    models = load_models(model, compare, device, description)
    with (
        RegionOption(region, group_by, photos, json_=json_) as regions,
        PhotoBatch(
            photos,
            "lime",
            out,
            overwrite=overwrite,
            skip_existing=skip_existing,
            json_=json_,
            bar=False,
            report=True,
            figures=style is not None,
        ) as batch,
    ):
        for photo, path in batch:
            with batch.explaining(photo):
                results = _explain(models, photo, target, contrast, options)
                alike = agreement(results, names=[model.name for model in models]) if len(results) > 1 else None
                predictions, name = predictions_of(models[0], photo), batch.name(photo)
                scene = _scene(results, predictions)
                scene = with_subject(scene, name, models[0].name, predictions, results[0].target or "")
                maps = {_map_name(result, models): result for result in results}
                measured = regions.measure(photo, maps, predictions)
                scene = measured.outline(scene)
                report = partial(_report, name, scene, predictions, results, alike, measured)
                save(scene, path, overwrite, style, report)
                if arrays is not None:
                    results[0].save(arrays)
                if not json_:
                    for result in results:
                        say(f"{photo}, as {describe_prediction(result)}")
                        print_segments(result, COUNT)
                        say(f"  {describe_fit(result)}{logit_advice([result])}")
                    if alike is not None:
                        print_agreement(alike)
                regions.print_photo(measured, several=len(batch.photos) > 1)
                entries = {**_entries(results, alike), **measured.entries}
                batch.add(models[0], photo, path, entries, target=results[0].target, numbers=measured.numbers)
                if any(result.provenance["interrupted"] for result in results):
                    raise KeyboardInterrupt
        regions.conclude(batch, overwrite=overwrite or skip_existing, style=style)


def _explain(
    models: Sequence["VisionModel"], photo: Path, target: str | None, contrast: str | None, options: Mapping[str, Any]
) -> list["SegmentAttribution"]:
    """Return the result of each model, up to the first that was interrupted.

    Without a target, all models explain the most likely class of the first one, if they have it.
    """
    from vitscope.methods.lime import lime as compute

    results: list[SegmentAttribution] = []
    for model in models:
        shared = target
        if results and target is None:
            # The contrast is followed by the most likely class.
            most_likely = results[0].classes[0 if contrast is None else 1]
            shared = most_likely if most_likely in (model.labels or ()) else None
        results.append(compute(model, photo, target=with_contrast(shared, contrast), **options))
        if results[-1].provenance["interrupted"]:
            break
    return results


def _scene(results: Sequence["SegmentAttribution"], predictions: Sequence["Prediction"]) -> "Scene":
    from vitscope.views.scene import short_label
    from vitscope.views.segments import describe_prediction, side_by_side, supporting_regions
    from vitscope.views.subject import describe_target

    title = f"What supports {describe_target(results[0].target, predictions)}"
    if len(results) == 1:
        scene = supporting_regions(results[0])
        second = f", and what supports {short_label(results[0].classes[1])}" if len(results[0].classes) > 1 else ""
        return replace(scene, title=title + second)
    samples = ", ".join(f"{result.provenance['samples']:,}" for result in results)
    names = [describe_prediction(result) for result in results]
    return side_by_side(
        results,
        names,
        title=title,
        note=f"lime; samples: {samples}; hidden segments: {results[0].provenance['parameters']['hide']}",
    )


def _report(
    name: str,
    scene: "Scene",
    predictions: Sequence["Prediction"],
    results: Sequence["SegmentAttribution"],
    agreement: "Agreement | None",
    measured: MeasuredPhoto,
) -> "Report":
    """Return the content of the report of a photo."""
    from vitscope.views.report import Report, numbers_of

    named = {str(result.provenance["model"]): result for result in results}
    return Report(
        photo=name,
        image=scene.photo,
        model=" and ".join(named),
        predictions=predictions[:COUNT],
        scenes=[scene],
        kinds=["perturbation"],
        numbers=[row for model, result in named.items() for row in numbers_of(model, result)],
        agreement=agreement,
        regions=measured.rows(),
        provenance={model: result.provenance for model, result in named.items()},
    )


def _map_name(result: "SegmentAttribution", models: Sequence["VisionModel"]) -> str:
    return "lime" if len(models) == 1 else f"lime, {result.provenance['model']}"


def _entries(results: Sequence["SegmentAttribution"], agreement: "Agreement | None") -> dict[str, Any]:
    """Return the values of the report."""
    entries: dict[str, Any] = {"results": [result.as_json() for result in results]}
    return entries if agreement is None else entries | {"agreement": agreement.as_json()}


def _check_arrays(path: Path, results: int, overwrite: bool) -> None:
    if results > 1:
        raise CallError(f"--arrays is {path}, one file for {results} results: explain one photo with one model")
    check_file_name(path, "--arrays")
    if path.suffix not in (".safetensors", ".npz", ".json"):
        raise CallError(f"--arrays is {path}: end the name in .safetensors, .npz or .json")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists already: pass --overwrite or another --arrays")

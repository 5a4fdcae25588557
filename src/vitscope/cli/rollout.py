"""The command ``vitscope rollout``."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitscope.cli.inputs import load_model
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    Device,
    DropArtefacts,
    GroupBy,
    Json,
    ModelName,
    OutWithReport,
    Overwrite,
    Photos,
    Regions,
    SkipExisting,
    option,
)
from vitscope.cli.output import save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.regions import MeasuredPhoto, RegionOption
from vitscope.cli.style_options import drawing
from vitscope.display import ordinal
from vitscope.errors import CallError

if TYPE_CHECKING:
    from vitscope.attention.trace import Trace
    from vitscope.models import Prediction, VisionModel
    from vitscope.results.attribution import Attribution
    from vitscope.views.report import Report
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle

LISTED = 5  # predictions in a report
HeadFusion = Literal["mean", "max", "min"]


@model_command
@drawing
def rollout(
    photos: Photos,
    model: ModelName = "vit-nano",
    head_fusion: Annotated[
        HeadFusion | None, typer.Option(help="Fusion of the heads.", show_default="mean and max, side by side")
    ] = None,
    discard_ratio: Annotated[
        float, typer.Option(help="Fraction of the lowest attention that is set to zero, 0 to 1.")
    ] = 0.0,
    start_layer: Annotated[int, typer.Option(help="First layer of the rollout.")] = 0,
    normalize: Annotated[bool, typer.Option(help="Divide each row of A + I by its sum.")] = True,
    merge: Annotated[
        Literal["equal", "norm"], typer.Option(help="Swin: weights of the four patches that patch merging joins.")
    ] = "equal",
    target: Annotated[
        str | None,
        option("--target", "For models whose readout takes a class, such as Swin.", default="the readout"),
    ] = None,
    evolution: Annotated[bool, typer.Option("--evolution", help="Show the rollout after each layer.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Swin: show the rollout after each stage.")] = False,
    drop_artefacts: DropArtefacts = False,
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
    """Compute attention rollout through all layers."""
    from vitscope.interventions.artefact_dropping import dropped_artefacts
    from vitscope.tracing.capture import run_and_capture
    from vitscope.views.artefacts import mark_dropped
    from vitscope.views.subject import with_subject

    if evolution and stages:
        raise CallError("--evolution and --stages are two figures: pass one of them")
    options: dict[str, Any] = {
        "discard_ratio": discard_ratio,
        "start_layer": start_layer,
        "normalize": normalize,
        "merge": merge,
        "target": target,
    }
    vision = load_model(model, device, description=description)
    with (
        RegionOption(region, group_by, photos, json_=json_) as regions,
        PhotoBatch(
            photos,
            "rollout",
            out,
            overwrite=overwrite,
            skip_existing=skip_existing,
            json_=json_,
            report=True,
            figures=style is not None,
        ) as batch,
    ):
        artefacts = batch.artefacts_or_none(vision, drop_artefacts)
        if artefacts is not None:
            options["drop_artefacts"] = artefacts
        for photo, path in batch:
            with batch.explaining(photo):
                run = run_and_capture(vision, photo)
                trace = run.trace
                if evolution or stages:
                    results, scene = _evolution(trace, head_fusion or "mean", options, stages=stages)
                else:
                    results, scene = _rollouts(trace, [head_fusion] if head_fusion else ["mean", "max"], options)
                dropped = None if artefacts is None else dropped_artefacts(trace, artefacts, trace)
                if dropped is not None:
                    scene = mark_dropped(scene, dropped)
                predictions = [] if run.logits is None else vision.predictions(run.logits, run.logits.shape[-1])[0]
                name = batch.name(photo)
                scene = with_subject(scene, name, vision.name, predictions, results[0].target or "")
                maps = {f"rollout, {_map_name(result)}": result for result in results}
                measured = regions.measure(photo, maps, predictions)
                scene = measured.outline(scene)
                report = partial(_report, name, vision, scene, predictions, results, measured)
                save(scene, path, overwrite, style, report)
                regions.print_photo(measured, several=len(batch.photos) > 1)
                rollouts = [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in results]
                entries = {"rollouts": rollouts, **measured.entries}
                batch.add(vision, photo, path, entries, target=results[0].target, numbers=measured.numbers)
        regions.conclude(batch, overwrite=overwrite or skip_existing, style=style)


def _report(
    name: str,
    vision: "VisionModel",
    scene: "Scene",
    predictions: Sequence["Prediction"],
    results: Sequence["Attribution"],
    measured: MeasuredPhoto,
) -> "Report":
    """Return the content of the report of a photo."""
    from vitscope.views.report import Report, numbers_of

    named = {_map_name(result): result for result in results}
    return Report(
        photo=name,
        image=scene.photo,
        model=vision.name,
        predictions=predictions[:LISTED],
        scenes=[scene],
        kinds=["attention"],
        numbers=[row for map_name, result in named.items() for row in numbers_of(map_name, result)],
        regions=measured.rows(),
        provenance={map_name: result.provenance for map_name, result in named.items()},
    )


def _map_name(result: "Attribution") -> str:
    parameters = result.provenance["parameters"]
    return f"{parameters['head_fusion']} of heads, to {ordinal('layer', parameters['end_layer'])}"


def _rollouts(
    trace: "Trace", fusions: "list[HeadFusion]", options: Mapping[str, Any]
) -> tuple[list["Attribution"], "Scene"]:
    """Return one rollout per head fusion, and their figure."""
    from vitscope.methods.rollout import rollout as compute
    from vitscope.views.rollouts import rollout_panels

    results = [compute(trace, head_fusion=fusion, **options) for fusion in fusions]
    return results, rollout_panels(results)


def _evolution(
    trace: "Trace", head_fusion: HeadFusion, options: Mapping[str, Any], *, stages: bool
) -> tuple[list["Attribution"], "Scene"]:
    """Return the rollout after each layer, and a figure of all layers or of the last one of each stage."""
    from vitscope.methods.rollout import rollout_evolution
    from vitscope.views.rollouts import evolution
    from vitscope.views.windows import stage_evolution

    results = rollout_evolution(trace, head_fusion=head_fusion, **options)
    return results, stage_evolution(trace, results) if stages else evolution(results)

"""The command ``vitscope explain``."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.completion import methods_for
from vitscope.cli.inputs import TargetNames, load_model, split_values, with_contrast
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    SEVERAL,
    Contrast,
    Device,
    GroupBy,
    GroupName,
    Json,
    ModelName,
    OutWithReport,
    Overwrite,
    Photos,
    Regions,
    SkipExisting,
    Target,
    TopK,
)
from vitscope.cli.output import save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.regions import MeasuredPhoto, RegionOption
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_agreement, print_classes, print_meanings

if TYPE_CHECKING:
    from vitscope.explanation.result import Explanation
    from vitscope.views.report import Report
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle


@model_command
@drawing
def explain(
    photos: Photos,
    model: ModelName = "vit-nano",
    out: OutWithReport = None,
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    device: Device = None,
    json_: Json = False,
    top_k: TopK = 5,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help=f"Method, such as lime; see vitscope methods. {SEVERAL}",
            show_default="rollout, libra and heads",
            callback=split_values,
            autocompletion=methods_for,
        ),
    ] = None,
    target: Target = None,
    contrast: Contrast = None,
    region: Regions = None,
    group_by: GroupBy = "predicted",
    *,
    description: Description,
    style: "FigureStyle | None",
) -> None:
    """Explain photos: top classes, rollout, a class, heads."""
    explain_photos(
        photos,
        model,
        out,
        overwrite,
        device,
        json_,
        top_k,
        style,
        method,
        with_contrast(target, contrast),
        description,
        skip_existing=skip_existing,
        regions=region,
        group_by=group_by,
    )


def explain_photos(
    photos: Sequence[Any],
    model: str,
    out: Path | None,
    overwrite: bool,
    device: str | None,
    json_: bool,
    top_k: int,
    style: "FigureStyle | None",
    methods: Sequence[str] | None = None,
    target: TargetNames | None = None,
    description: Description | None = None,
    *,
    skip_existing: bool = False,
    names: Sequence[str] | None = None,
    command: str = "explain",
    regions: Sequence[str] | None = None,
    group_by: GroupName = "predicted",
) -> None:
    """Explain each photo, save its figure, and print its classes.

    Args:
        photos: files or images.
        methods: names of methods to compare; None for rollout, the map of a class, and the heads of the last layer.
        target: the class to explain, or the two of a contrast; by default the most likely.
        skip_existing: skip the photos whose figure exists.
        names: a name for each image; by default the paths.
        command: name of the command, for the JSON report.
        regions: regions whose shares of the maps are measured; None for none.
        group_by: groups of photos whose mean shares are printed.
    """
    from vitscope.explanation.explain import explain as explain_photo
    from vitscope.explanation.requests import check_target, method_requests
    from vitscope.views.explanations import explanation_scene

    check_target(method_requests(methods, {}), target)  # before the model is loaded
    vision = load_model(model, device, description=description)
    with (
        RegionOption(regions, group_by, photos, json_=json_) as region_option,
        PhotoBatch(
            photos,
            command,
            out,
            overwrite=overwrite,
            skip_existing=skip_existing,
            json_=json_,
            bar=methods is None,
            names=names,
            report=True,
            figures=style is not None,
        ) as batch,
    ):
        for photo, path in batch:
            with batch.explaining(photo):
                explanation = explain_photo(vision, photo, methods, target, progress=not json_ and methods is not None)
                (result,) = explanation.photos
                measured = region_option.measure(photo, result.results, result.predictions)
                scene = measured.outline(explanation_scene(explanation))
                save(scene, path, overwrite, style, partial(_report, explanation, top_k, scene, measured))
                if not json_:
                    print_classes(batch.name(photo), vision, result.predictions[:top_k], result.no_classes)
                    print_meanings(result.meanings if result.is_default else {})
                    if result.agreement is not None:
                        print_agreement(result.agreement)
                region_option.print_photo(measured, several=len(batch.photos) > 1)
                label = ", ".join(result.results) if methods else "rollout, libra, heads"
                entries = {**result.as_json(top_k), **measured.entries}
                batch.add(vision, photo, path, entries, target=result.target, method=label, numbers=measured.numbers)
                if explanation.interrupted:
                    raise KeyboardInterrupt
        region_option.conclude(batch, overwrite=overwrite or skip_existing, style=style)


def _report(explanation: "Explanation", top_k: int, scene: "Scene", measured: MeasuredPhoto) -> "Report":
    """Return the content of the report of a photo."""
    from vitscope.views.explanations import explanation_report

    return replace(explanation_report(explanation, top_k), scenes=[scene], regions=measured.rows())

"""The command ``vitscope heads``."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitscope.cli.inputs import load_model, with_contrast
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    BatchSize,
    Contrast,
    Device,
    Json,
    ModelName,
    Out,
    OutputKind,
    Overwrite,
    Photos,
    SkipExisting,
    Target,
)
from vitscope.cli.output import predictions_of, save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.style_options import drawing
from vitscope.cli.tables import print_heads

if TYPE_CHECKING:
    from vitscope.methods.head_importance import HeadImportance
    from vitscope.views.style import FigureStyle

COUNT = 5  # heads of each sign in tables


@model_command
@drawing
def heads(
    photos: Photos,
    model: ModelName = "vit-nano",
    target: Target = None,
    contrast: Contrast = None,
    by: Annotated[
        Literal["ablation", "gradient"],
        typer.Option(help="Measure of importance: one forward pass per head, or one backward pass as an estimate."),
    ] = "ablation",
    replacement: Annotated[
        Literal["mean", "zero"], typer.Option(help="Output of a head that is switched off.")
    ] = "mean",
    output: OutputKind = "logit",
    batch_size: BatchSize = 64,
    out: Out = None,
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
    style: "FigureStyle | None",
) -> None:
    """Show the maps of all heads, and what each does for a class."""
    from vitscope.methods.head_importance import head_importance
    from vitscope.tracing.capture import capture
    from vitscope.views.heads import head_maps
    from vitscope.views.subject import with_subject

    vision = load_model(model, device, description=description)
    ablation = by == "ablation"
    with PhotoBatch(
        photos,
        "heads",
        out,
        overwrite=overwrite,
        skip_existing=skip_existing,
        json_=json_,
        bar=not ablation,
        figures=style is not None,
    ) as batch:
        for photo, path in batch:
            with batch.explaining(photo):
                importance = head_importance(
                    vision,
                    photo,
                    target=with_contrast(target, contrast),
                    by=by,
                    replacement=replacement,
                    output=output,
                    batch_size=batch_size,
                    progress=ablation and not json_,
                )
                label = importance.targets[0] or ""
                scene = head_maps(capture(vision, photo), importance)
                scene = with_subject(scene, batch.name(photo), vision.name, predictions_of(vision, photo), label)
                save(scene, path, overwrite, style)
                if not json_:
                    print_heads(str(photo), importance, COUNT)
                batch.add(vision, photo, path, _entry(importance), target=importance.targets[0])
                if importance.provenance["interrupted"]:
                    raise KeyboardInterrupt


def _entry(importance: "HeadImportance") -> dict[str, Any]:
    """Return the values of the one image, and its most important heads as (layer, head)."""
    entry = importance.as_json()
    return {
        "target": entry["targets"][0],
        "layers": entry["layers"],
        "values": entry["values"][0],
        "supporting": importance.top(COUNT),
        "opposing": importance.top(COUNT, sign="negative"),
        "provenance": entry["provenance"],
    }

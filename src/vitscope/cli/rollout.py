"""vitscope rollout"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from vitscope.cli.app import Device, Json, ModelName, Out, Overwrite, Photos
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.output import each, load_model, reporting, save, target_path
from vitscope.errors import CallError


@model_command
def rollout(
    photos: Photos,
    model: ModelName = "vit-nano",
    head_fusion: Annotated[
        Literal["mean", "max", "min"] | None,
        typer.Option("--head-fusion", help="How heads are fused.", show_default="mean and max, side by side"),
    ] = None,
    discard_ratio: Annotated[float, typer.Option(help="Share of the lowest attention set to zero, 0 to 1.")] = 0.0,
    start_layer: Annotated[int, typer.Option(help="The first block that takes part.")] = 0,
    normalize: Annotated[bool, typer.Option(help="Divide each row of A + I by its sum.")] = True,
    merge: Annotated[
        Literal["equal", "norm"], typer.Option(help="Swin: how much of a merged patch each of its four parts is.")
    ] = "equal",
    target: Annotated[
        str | None, typer.Option(help="Swin: start from a class's own tokens.", show_default="what the model reads")
    ] = None,
    evolution: Annotated[bool, typer.Option("--evolution", help="The rollout after each block.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Swin: the rollout after each stage.")] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
) -> None:
    """Attention rollout through all blocks."""
    from vitscope.methods.rollout import rollout as roll
    from vitscope.methods.rollout import rollout_evolution
    from vitscope.tracing.capture import capture
    from vitscope.views import scene as scenes
    from vitscope.views.windows import stage_evolution

    if evolution and stages:
        raise CallError("--evolution and --stages are two figures: ask for one at a time")
    options: dict[str, Any] = {
        "discard_ratio": discard_ratio,
        "start_layer": start_layer,
        "normalize": normalize,
        "merge": merge,
        "target": target,
    }
    vision = load_model(model, device, photos, description=description)
    with reporting(json_) as report:
        for photo, path in each(
            photos, [target_path(photo, "rollout", out, len(photos)) for photo in photos], overwrite
        ):
            trace = capture(vision, photo)
            if evolution or stages:
                results = rollout_evolution(trace, head_fusion=head_fusion or "mean", **options)
                scene = stage_evolution(trace, results) if stages else scenes.evolution(results)
            else:
                fusions: Sequence[Literal["mean", "max", "min"]] = [head_fusion] if head_fusion else ["mean", "max"]
                results = [roll(trace, head_fusion=fusion, **options) for fusion in fusions]
                scene = scenes.rollout_panels(results)
            save(scene, path, overwrite)
            values = [{"provenance": dict(r.provenance), "values": r.values[0].tolist()} for r in results]
            report.append({"image": str(photo), "figure": str(path), "rollouts": values})

"""Commands that look at what one run of a model left behind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitscope.cli.app import Device, Json, ModelName, Out, Overwrite, Photos, QueryText
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.output import each, load_model, reporting, save, target_path
from vitscope.errors import CallError

if TYPE_CHECKING:
    from vitscope.trace import Query


@model_command
def attention(
    photos: Photos,
    model: ModelName = "vit-nano",
    layer: Annotated[
        int | None, typer.Option("--layer", "-l", help="One layer's heads over the photo.", show_default="all layers")
    ] = None,
    query: QueryText = "readout",
    shifted: Annotated[
        bool, typer.Option("--shifted", help="Swin: the query in --layer and in its shifted partner.")
    ] = False,
    window_cls: Annotated[
        bool, typer.Option("--window-cls", help="Swin: a CLS token in every window, beside rollout with --layer.")
    ] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
) -> None:
    """Raw attention maps: all layers × heads, or one layer's heads; for Swin all blocks, or one block's windows."""
    from vitscope.methods.rollout import rollout as roll
    from vitscope.methods.window_cls import window_cls as read_windows
    from vitscope.run import capture
    from vitscope.view import windows as scenes

    wanted = _query(query)
    if shifted and (layer is None or isinstance(wanted, str)):
        raise CallError("--shifted compares one query in two layers: name both, as in --layer 2 --query 5,6")
    if shifted and window_cls:
        raise CallError("--shifted and --window-cls are two figures: ask for one at a time")
    if window_cls and wanted != "readout":
        raise CallError("--window-cls asks the CLS tokens and takes no --query")
    vision = load_model(model, device, photos, description=description)
    with reporting(json_) as report:
        for photo, path in each(
            photos, [target_path(photo, "attention", out, len(photos)) for photo in photos], overwrite
        ):
            if window_cls:
                result = read_windows(vision, photo)
                trace = result.trace
                whole = None if trace.readout is None or layer is None else roll(trace)
                compared = None if layer is None else scenes.cls_comparison(result, whole, layer)
                scene = compared or scenes.cls_grid(result)
                chosen = trace.blocks if layer is None else [trace.step(layer)]
                shown = {step.layer: result.map(step.layer)[0] for step in chosen}
            else:
                trace = capture(vision, photo)
                shown = scenes.shown_values(trace, layer, wanted)
                if shifted and layer is not None and not isinstance(wanted, str):
                    scene = scenes.shift_effect(trace, layer, wanted)
                else:
                    scene = scenes.attention_scene(trace, layer, wanted)
            asked = {} if window_cls else {"query": query}
            what = "window_cls_mean_of_heads" if window_cls else "values_mean_of_heads"
            about = {**asked, what: {str(at): values.tolist() for at, values in shown.items()}}
            save(scene, path, overwrite)
            report.append({"picture": str(photo), "figure": str(path), "provenance": dict(trace.provenance), **about})


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
    from vitscope.run import capture
    from vitscope.view import scene as scenes
    from vitscope.view.windows import stage_evolution

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
            report.append({"picture": str(photo), "figure": str(path), "rollouts": values})


def _query(text: str) -> "Query":
    row, comma, column = text.partition(",")
    if not comma:
        return text
    try:
        return int(row), int(column)
    except ValueError:
        raise CallError(f"unknown query {text!r}: pass readout, the name of a prefix token, or row,column") from None

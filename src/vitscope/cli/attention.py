"""vitscope attention"""

from typing import TYPE_CHECKING, Annotated

import typer

from vitscope.cli.app import Device, Json, ModelName, Out, Overwrite, Photos, QueryText
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.output import each, load_model, reporting, save, target_path
from vitscope.errors import CallError

if TYPE_CHECKING:
    from vitscope.attention.trace import Query


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
    from vitscope.tracing.capture import capture
    from vitscope.views import windows as scenes
    from vitscope.window_tokens.window_cls import window_cls as read_windows

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
            report.append({"image": str(photo), "figure": str(path), "provenance": dict(trace.provenance), **about})


def _query(text: str) -> "Query":
    row, comma, column = text.partition(",")
    if not comma:
        return text
    try:
        return int(row), int(column)
    except ValueError:
        raise CallError(f"unknown query {text!r}: pass readout, the name of a prefix token, or row,column") from None

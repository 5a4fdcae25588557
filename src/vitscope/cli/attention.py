"""The command ``vitscope attention``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.inputs import load_model
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import (
    Device,
    DropArtefacts,
    GroupBy,
    Json,
    ModelName,
    Out,
    Overwrite,
    Photos,
    Regions,
    SkipExisting,
    option,
)
from vitscope.cli.output import predictions_of, save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.regions import RegionOption
from vitscope.cli.style_options import drawing
from vitscope.errors import CallError

if TYPE_CHECKING:
    from torch import Tensor

    from vitscope.attention.trace import Query, Trace
    from vitscope.interventions.artefacts import Artefacts
    from vitscope.models import VisionModel
    from vitscope.results.attribution import Attribution
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle


@model_command
@drawing
def attention(
    photos: Photos,
    model: ModelName = "vit-nano",
    layer: Annotated[int | None, option("--layer", "Its heads are shown.", default="all layers")] = None,
    query: Annotated[
        str, typer.Option(help="Query token: readout, cls, register_1, …, or a patch as row,column.")
    ] = "readout",
    shifted: Annotated[
        bool, typer.Option("--shifted", help="Swin: compare --query in --layer and in its shifted partner.")
    ] = False,
    window_cls: Annotated[
        bool, typer.Option("--window-cls", help="Swin: use a CLS token in every window as the query.")
    ] = False,
    drop_artefacts: DropArtefacts = False,
    region: Regions = None,
    group_by: GroupBy = "predicted",
    out: Out = None,
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
    style: "FigureStyle | None",
) -> None:
    """Show raw attention maps of all layers, or of one layer."""
    from vitscope.views.subject import with_subject

    token = _parse_query(query)
    if shifted and (layer is None or isinstance(token, str)):
        raise CallError("--shifted compares one query in two layers: pass both, as in --layer 2 --query 5,6")
    if shifted and window_cls:
        raise CallError("--shifted and --window-cls are two figures: pass one of them")
    if window_cls and token != "readout":
        raise CallError("--window-cls uses CLS tokens as queries: leave out --query")
    vision = load_model(model, device, description=description)
    if region and (shifted or window_cls):
        raise CallError("--region measures attention maps: leave out --shifted and --window-cls")
    with (
        RegionOption(region, group_by, photos, json_=json_) as regions,
        PhotoBatch(
            photos,
            "attention",
            out,
            overwrite=overwrite,
            skip_existing=skip_existing,
            json_=json_,
            figures=style is not None,
        ) as batch,
    ):
        artefacts = batch.artefacts_or_none(vision, drop_artefacts)
        for photo, path in batch:
            with batch.explaining(photo):
                if window_cls:
                    trace, scene, maps = _window_cls(vision, photo, layer)
                    entries: dict[str, Any] = {"window_cls_mean_of_heads": _as_lists(maps)}
                else:
                    trace, scene, maps = _attention(vision, photo, layer, token, artefacts, shifted=shifted)
                    entries = {"query": query, "values_mean_of_heads": _as_lists(maps)}
                predictions = predictions_of(vision, photo)
                measured = regions.measure(photo, _attributions(trace, maps) if region else {}, predictions)
                scene = measured.outline(with_subject(scene, batch.name(photo), vision.name, predictions))
                save(scene, path, overwrite, style)
                regions.print_photo(measured, several=len(batch.photos) > 1)
                entries = {"provenance": dict(trace.provenance), **entries, **measured.entries}
                batch.add(vision, photo, path, entries, numbers=measured.numbers)
        regions.conclude(batch, overwrite=overwrite or skip_existing, style=style)


def _attention(
    model: "VisionModel",
    photo: Path,
    layer: int | None,
    query: "Query",
    artefacts: "Artefacts | None",
    *,
    shifted: bool,
) -> tuple["Trace", "Scene", Mapping[int, "Tensor"]]:
    """Return the trace, the figure, and the mean of heads by layer."""
    from vitscope.interventions.artefact_dropping import dropped_artefacts
    from vitscope.tracing.capture import capture
    from vitscope.views.artefacts import mark_dropped
    from vitscope.views.windows import attention_scene, mean_attention, shift_effect

    trace = capture(model, photo)
    values = mean_attention(trace, layer, query)
    if shifted and layer is not None and not isinstance(query, str):
        return trace, shift_effect(trace, layer, query), values
    dropped = None if artefacts is None else dropped_artefacts(trace, artefacts, trace)
    if dropped is not None:
        shares = {str(block): dropped.shares(attention[None])[0] for block, attention in values.items()}
        record = {"dropped_artefacts": {**dropped.record, "share_of_map": shares}}
        trace = replace(dropped.masked(trace), provenance={**trace.provenance, **record})
        scene = mark_dropped(attention_scene(trace, layer, query), dropped)
        return trace, scene, mean_attention(trace, layer, query)
    return trace, attention_scene(trace, layer, query), values


def _attributions(trace: "Trace", maps: Mapping[int, "Tensor"]) -> dict[str, "Attribution"]:
    """Return the mean of heads of each layer as a result."""
    from vitscope.grid import Grid
    from vitscope.results.attribution import Attribution

    provenance = {"method": "attention", "model": trace.provenance["model"]}
    return {
        f"attention, layer {layer}": Attribution(values[None], Grid(*values.shape), trace.images, provenance)
        for layer, values in maps.items()
    }


def _window_cls(
    model: "VisionModel", photo: Path, layer: int | None
) -> tuple["Trace", "Scene", Mapping[int, "Tensor"]]:
    """Return the trace, the figure, and the mean of heads by layer, for a CLS token in every window."""
    from vitscope.methods.rollout import rollout
    from vitscope.views.windows import cls_comparison, cls_grid
    from vitscope.window_tokens.window_cls import window_cls

    result = window_cls(model, photo)
    trace = result.trace
    if layer is None:
        return trace, cls_grid(result), {step.layer: result.map(step.layer)[0] for step in trace.blocks}
    whole_run = None if trace.readout is None else rollout(trace)
    index = trace.step(layer).layer
    return trace, cls_comparison(result, whole_run, layer), {index: result.map(index)[0]}


def _as_lists(maps: Mapping[int, "Tensor"]) -> dict[str, Any]:
    return {str(layer): values.tolist() for layer, values in maps.items()}


def _parse_query(text: str) -> "Query":
    row, comma, column = text.partition(",")
    if not comma:
        return text
    try:
        return int(row), int(column)
    except ValueError:
        raise CallError(f"unknown query {text!r}: pass readout, the name of a prefix token, or row,column") from None

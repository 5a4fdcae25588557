"""The command ``vitscope registers``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.inputs import load_model
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import Device, Json, ModelName, Out, Overwrite, Photos, SkipExisting, option
from vitscope.cli.output import predictions_of, save
from vitscope.cli.photo_batch import PhotoBatch
from vitscope.cli.style_options import drawing
from vitscope.errors import CallError

if TYPE_CHECKING:
    from vitscope.interventions.artefacts import Artefacts
    from vitscope.views.style import FigureStyle


@model_command
@drawing
def registers(
    photos: Photos,
    model: ModelName = "vit-nano",
    layer: Annotated[int, option("--layer", "Its output is searched.")] = -1,
    count: Annotated[int, typer.Option(min=0, help="Test-time registers to add; 0 to show artefacts only.")] = 0,
    neurons: Annotated[int, typer.Option(min=1, help="Register neurons to move to the registers.")] = 10,
    out: Out = None,
    overwrite: Overwrite = False,
    skip_existing: SkipExisting = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
    style: "FigureStyle | None",
) -> None:
    """Find artefact tokens, or show maps without them.

    All photos share one threshold. With --count, the maps are those with test-time registers. The attention of each
    register is shown too.
    """
    from vitscope.interventions.artefacts import artefact_tokens
    from vitscope.interventions.register_neurons import register_neurons
    from vitscope.interventions.test_time_registers import test_time_registers
    from vitscope.views.artefacts import artefact_scene, register_scene
    from vitscope.views.subject import with_subject

    vision = load_model(model, device, description=description)
    with PhotoBatch(
        photos,
        "registers",
        out,
        overwrite=overwrite,
        skip_existing=skip_existing,
        json_=json_,
        bar=False,
        figures=style is not None,
    ) as batch:
        readable = batch.readable()
        before = artefact_tokens(vision, readable, layer=layer)
        moves: list[tuple[int, int]] = []
        after = None
        if count:
            if before.threshold is None:
                raise CallError(f"{before.summary}, so --count has no use: leave it out, or pass more photos")
            moves = register_neurons(vision, readable, threshold=before.threshold, layer=layer, count=neurons)
            with test_time_registers(vision, moves, count=count) as cured:
                after = artefact_tokens(cured, readable, layer=layer)
        for photo, path in batch:
            index = readable.index(photo)
            scene = artefact_scene(before, index=index) if after is None else register_scene(before, after, index=index)
            scene = with_subject(scene, batch.name(photo), vision.name, predictions_of(vision, photo))
            save(scene, path, overwrite, style)
            entries: dict[str, Any] = _numbers(before, index)
            if after is not None:
                entries |= {"neurons": moves, "with_registers": _numbers(after, index)}
            batch.add(vision, photo, path, entries)


def _numbers(artefacts: "Artefacts", index: int) -> dict[str, Any]:
    """Return the numbers of the report."""
    return {
        "threshold": artefacts.threshold,
        "first_layer": artefacts.first_layer,
        "share": artefacts.share,
        "attention_share": artefacts.attention_share,
        "places": artefacts.places[index].tolist(),
        "registers": dict(zip(artefacts.registers, artefacts.register_attention[index].tolist(), strict=True)),
    }

"""The command ``vitscope registers``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitscope.cli.inputs import load_model
from vitscope.cli.model_options import Description, model_command
from vitscope.cli.options import Device, Json, ModelName, Out, Overwrite, Photos
from vitscope.cli.output import each_photo, figure_paths, predictions_of, reporting, save
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
    layer: Annotated[int, typer.Option("--layer", "-l", help="Block whose output is searched.")] = -1,
    count: Annotated[int, typer.Option(min=0, help="Test-time registers to add; 0 to show artefacts only.")] = 0,
    neurons: Annotated[int, typer.Option(min=1, help="Register neurons to move to the registers.")] = 10,
    out: Out = None,
    overwrite: Overwrite = False,
    device: Device = None,
    json_: Json = False,
    *,
    description: Description,
    style: "FigureStyle",
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

    vision = load_model(model, device, photos, description=description)
    paths = figure_paths(photos, "registers", out)
    with reporting(json_) as report:
        figures = list(each_photo(photos, paths, overwrite, bar=False))
        before = artefact_tokens(vision, photos, layer=layer)
        moves: list[tuple[int, int]] = []
        after = None
        if count:
            if before.threshold is None:
                raise CallError(f"{before.summary}, so --count has no use: leave it out, or pass more photos")
            moves = register_neurons(vision, photos, threshold=before.threshold, layer=layer, count=neurons)
            with test_time_registers(vision, moves, count=count) as cured:
                after = artefact_tokens(cured, photos, layer=layer)
        for index, (photo, path) in enumerate(figures):
            scene = artefact_scene(before, index=index) if after is None else register_scene(before, after, index=index)
            scene = with_subject(scene, str(photo), vision.name, predictions_of(vision, photo))
            save(scene, path, overwrite, style)
            entry: dict[str, Any] = {"image": str(photo), "figure": str(path), **_numbers(before, index)}
            if after is not None:
                entry |= {"neurons": moves, "with_registers": _numbers(after, index)}
            report.append(entry)


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

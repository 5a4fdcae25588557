"""Scenes of rollouts: of several head fusions side by side, and layer by layer."""

from collections.abc import Sequence

from vitscope.display import ordinal
from vitscope.results.attribution import Attribution
from vitscope.views.scene import Panel, Row, Scene, columns_for, map_panel, rollout_maps, rows_of, short_label


def rollout_panels(rollouts: Sequence[Attribution], *, index: int = 0) -> Scene:
    """Return the photo and its rollouts side by side, one for each head fusion."""
    panels = [Panel(rollouts[0].images[index], title="photo"), *rollout_maps(rollouts, index)]
    return Scene(
        rows=[Row(panels, len(panels))],
        title=f"Attention rollout of {rollouts[0].provenance['model']}{_for_class(rollouts[0])}",
        note=_rollout_options(rollouts[0]),
    )


def evolution(rollouts: Sequence[Attribution], *, index: int = 0) -> Scene:
    """Return the photo, and the rollout after each layer over the photo."""
    panels = [Panel(rollouts[0].images[index], title="photo")]
    for rollout in rollouts:
        end = rollout.provenance["parameters"]["end_layer"]
        panels.append(map_panel(rollout, f"after {ordinal('layer', end)}", index=index))
    head_fusion = rollouts[0].provenance["parameters"]["head_fusion"]
    return Scene(
        rows=rows_of(panels, columns_for(len(panels))),
        title=f"Attention rollout of {rollouts[0].provenance['model']}{_for_class(rollouts[0])}, layer by layer",
        note=f"{head_fusion} of heads, {_rollout_options(rollouts[0])}",
    )


def _for_class(rollout: Attribution) -> str:
    return f" for {short_label(rollout.target)}" if rollout.target else ""


def _rollout_options(rollout: Attribution) -> str:
    """Return the options of a rollout as text."""
    parameters = rollout.provenance["parameters"]
    options = ["rows normalised" if parameters["normalize"] else "rows not normalised"]
    if parameters["discard_ratio"]:
        options.append(f"lowest {parameters['discard_ratio']:.0%} discarded")
    if parameters["start_layer"]:
        options.append(f"from {ordinal('layer', parameters['start_layer'])} on")
    return ", ".join(options)

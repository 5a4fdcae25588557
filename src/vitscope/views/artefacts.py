"""Scenes of artefact tokens: the norms of all tokens, where the artefacts are, and the maps with and without them."""

from dataclasses import replace

import numpy as np
import torch

from vitscope.display import ordinal
from vitscope.interventions.artefact_dropping import DroppedArtefacts
from vitscope.interventions.artefacts import Artefacts
from vitscope.views.scene import OVERLAY, Curves, Histogram, Panel, Row, Scene, rows_of

REGISTER_COLUMNS = 8  # panels in a row of register maps


def artefact_scene(artefacts: Artefacts, *, index: int = 0) -> Scene:
    """Return the artefacts of one image over its photo, with the norms of all images.

    Args:
        artefacts: result of :func:`vitscope.artefact_tokens`.
        index: index of the image.
    """
    patches = artefacts.norms[:, :, artefacts.grid.prefix :]
    blocks = list(range(1, patches.shape[1] + 1))
    flat = patches.movedim(1, 0).flatten(1)
    lines = {
        "highest": flat.amax(1).tolist(),
        "median": flat.median(1).values.tolist(),
    }
    cls = artefacts.norms[:, :, 0].mean(0).tolist() if artefacts.query == "cls" else None
    curves = Curves(
        names=[*lines, *([] if cls is None else ["CLS"])],
        xs=[blocks] * (len(lines) + (cls is not None)),
        ys=[*lines.values(), *([] if cls is None else [cls])],
        title="norm after each block",
        x_axis="block, counted from 1",
        counted=True,
    )
    histogram = Histogram(
        flat[artefacts.layer].numpy(),
        artefacts.threshold,
        title=f"patches by norm after {ordinal('block', artefacts.layer)}",
        x_axis="norm",
    )
    photos = [_marked(artefacts, index), _norm_panel(artefacts, index, "norms")]
    if artefacts.attention is not None:
        photos.append(_attention_panel(artefacts, index, _attention_title(artefacts)))
    return Scene(
        rows=[Row(photos, 3), Row([histogram, curves], 3), *_register_rows(artefacts, index)],
        title=f"Artefact tokens of {artefacts.model}",
        note=artefacts.summary,
        caption=f"colours: each map from zero to its highest value{_meaning_of_register_rows(artefacts)}",
    )


def register_scene(before: Artefacts, after: Artefacts, *, index: int = 0) -> Scene:
    """Return norms and attention maps of one image without and with test-time registers.

    Args:
        before: result of :func:`vitscope.artefact_tokens`.
        after: the same inside :func:`vitscope.test_time_registers`.
        index: index of the image.
    """
    norms = max(float(result.norms[index, result.layer].max()) for result in (before, after))
    rows = []
    for result, name in ((before, "without registers"), (after, "with registers")):
        panels = [_marked(result, index, name), _norm_panel(result, index, "norms", norms)]
        if before.attention is not None and after.attention is not None:
            highest = max(float(before.attention[index].max()), float(after.attention[index].max()))
            panels.append(_attention_panel(result, index, _attention_title(result), highest))
        rows.append(Row(panels, 3))
    return Scene(
        rows=[*rows, *_register_rows(after, index)],
        title=f"Test-time registers in {before.model}",
        note=f"without: {_short_summary(before)}; with: {_short_summary(after)}",
        caption="colours: from zero to the highest value, the same for both maps of a column"
        + _meaning_of_register_rows(after),
    )


def mark_dropped(scene: Scene, dropped: DroppedArtefacts, *, index: int = 0) -> Scene:
    """Return a scene of maps without artefacts, in which the dropped patches are hatched and the note names them.

    Args:
        scene: maps of one image, all on the token grid.
        dropped: the artefacts that its maps leave out.
        index: index of the image in ``dropped``.
    """
    places = dropped.places[index].numpy()
    note = "; ".join(filter(None, [scene.note, dropped.summary(index)]))
    if not places.any():
        return replace(scene, note=note)
    rows = [
        replace(
            row,
            panels=[
                replace(panel, dropped=places) if isinstance(panel, Panel) and panel.values is not None else panel
                for panel in row.panels
            ],
        )
        for row in scene.rows
    ]
    return replace(scene, rows=rows, note=note, caption=f"{scene.caption}; hatched: artefact patches, left out")


def _attention_title(artefacts: Artefacts) -> str:
    return "attention of CLS" if artefacts.query == "cls" else "attention of the readout"


def _register_rows(artefacts: Artefacts, index: int) -> list[Row]:
    """Return the photo, the attention of CLS and that of each register, side by side; nothing without registers."""
    if not artefacts.registers:
        return []
    panels = [Panel(artefacts.images[index], title="input")]
    if artefacts.attention is not None:
        title = "CLS" if artefacts.query == "cls" else "readout"
        panels.append(_attention_panel(artefacts, index, title))
    for name, values in zip(artefacts.registers, artefacts.register_attention[index], strict=True):
        panels.append(_map_panel(artefacts, index, values, name.replace("_", " "), None))
    return rows_of(panels, min(len(panels), REGISTER_COLUMNS))


def _meaning_of_register_rows(artefacts: Artefacts) -> str:
    """Return what the rows of registers show, for the caption; empty without registers."""
    if not artefacts.registers:
        return ""
    block = ordinal("block", artefacts.layer)
    return f"; row of registers: attention of each token in {block}, mean of heads, each map on its own"


def _short_summary(artefacts: Artefacts) -> str:
    """Return the result in a few words, so that two of them fit on a line."""
    if artefacts.threshold is None:
        return f"no valley between the norms after {ordinal('block', artefacts.layer)}"
    share = "" if artefacts.attention_share is None else f", {artefacts.attention_share:.1%} of the attention"
    return f"artefacts are {artefacts.share:.2%} of patches{share} (norm above {artefacts.threshold:.4g})"


def _marked(artefacts: Artefacts, index: int, title: str = "") -> Panel:
    """Return the photo with a square around each artefact."""
    places = artefacts.places[index].numpy()
    marks = [(int(row), int(column)) for row, column in np.argwhere(places)]
    title = title or f"{len(marks)} artefact{'' if len(marks) == 1 else 's'}"
    return Panel(artefacts.images[index], title=title, regions=np.zeros(places.shape, dtype=int), marks=marks)


def _norm_panel(artefacts: Artefacts, index: int, title: str, highest: float | None = None) -> Panel:
    norms = artefacts.grid.patches(artefacts.norms[index, artefacts.layer])
    return _map_panel(artefacts, index, norms, title, highest)


def _attention_panel(artefacts: Artefacts, index: int, title: str, highest: float | None = None) -> Panel:
    assert artefacts.attention is not None
    return _map_panel(artefacts, index, artefacts.attention[index], title, highest)


def _map_panel(artefacts: Artefacts, index: int, values: torch.Tensor, title: str, highest: float | None) -> Panel:
    limits = (0.0, float(values.max()) if highest is None else highest)
    return Panel(artefacts.images[index], values.numpy(), title, OVERLAY, flat=True, limits=limits)

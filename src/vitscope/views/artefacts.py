"""Scenes of artefact tokens: the norms of all tokens, where the artefacts are, and the maps with and without them."""

import numpy as np
import torch

from vitscope.interventions.artefacts import Artefacts
from vitscope.views.scene import OVERLAY, Curves, Histogram, Panel, Row, Scene


def artefact_scene(artefacts: Artefacts, *, index: int = 0) -> Scene:
    """Return the artefacts of one image over its photo, with the norms of all images.

    Args:
        artefacts: result of :func:`vitscope.artefact_tokens`.
        index: index of the image.
    """
    patches = artefacts.norms[:, :, artefacts.grid.prefix :]
    layers = list(range(patches.shape[1]))
    flat = patches.movedim(1, 0).flatten(1)
    lines = {
        "highest": flat.amax(1).tolist(),
        "median": flat.median(1).values.tolist(),
    }
    cls = artefacts.norms[:, :, 0].mean(0).tolist() if artefacts.query == "cls" else None
    curves = Curves(
        names=[*lines, *([] if cls is None else ["CLS"])],
        xs=[layers] * (len(lines) + (cls is not None)),
        ys=[*lines.values(), *([] if cls is None else [cls])],
        title="norm after each block",
        x_axis="block",
        counted=True,
    )
    histogram = Histogram(
        flat[artefacts.layer].numpy(),
        artefacts.threshold,
        title=f"patches by norm after block {artefacts.layer}",
        x_axis="norm",
    )
    photos = [_marked(artefacts, index), _norm_panel(artefacts, index, "norms")]
    if artefacts.attention is not None:
        photos.append(_attention_panel(artefacts, index, _attention_title(artefacts)))
    return Scene(
        rows=[Row(photos, 3), Row([histogram, curves], 3)],
        title=f"Artefact tokens of {artefacts.model}",
        note=artefacts.summary,
        caption="colours: each map from zero to its highest value",
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
        rows=rows,
        title=f"Test-time registers in {before.model}",
        note=f"without: {before.summary}; with: {after.summary}",
        caption="colours: from zero to the highest value, the same for both maps of a column",
    )


def _attention_title(artefacts: Artefacts) -> str:
    return "attention of CLS" if artefacts.query == "cls" else "attention of the readout"


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

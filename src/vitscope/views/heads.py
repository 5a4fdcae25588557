"""Scenes of one value per attention head: cells, and the maps of all heads in frames of their values."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from vitscope.attention.trace import Trace
from vitscope.errors import CallError
from vitscope.methods.head_importance import HeadImportance
from vitscope.validation import CONTRAST
from vitscope.views.numbers import MINUS
from vitscope.views.scene import HEAD_AXIS, LAYER_AXIS, Cells, Frames, Panel, Row, Scene, head_grid, short_label
from vitscope.views.windows import attends_in_windows

MAX_EXPONENT = 2  # of the largest value
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def head_maps(trace: Trace, importance: HeadImportance, *, index: int = 0) -> Scene:
    """Return the attention maps of all layers × heads, each in a frame of the colour and the number of its importance.

    A red frame is a head that supports the target, a blue one a head that opposes it, a grey one a head without a
    value.

    Args:
        trace: the run, of the same model and images.
        importance: one value per head.
        index: index of the image.

    Raises:
        CallError: the trace has other layers or heads than ``importance``, or no head has a value.
        UnsupportedModelError: the model has no readout, or a block no token grid.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> from vitscope.views.heads import head_maps
        >>> model, photo = vs.load("vit-nano"), skimage.data.chelsea()
        >>> scene = head_maps(vs.capture(model, photo), vs.head_importance(model, photo, by="gradient"))
        >>> scene.title, scene.frames.values.shape
        ('What each head of vit-nano does for cat (logit 3.53)', (6, 12))
    """
    steps = trace.blocks
    if [step.layer for step in steps] != list(importance.layers):
        raise CallError(f"the trace has {len(steps)} layers, the importance {len(importance.layers)}: use one model")
    values = importance.values[index].cpu().double().numpy()
    heads = max(step.num_heads for step in steps)
    if values.shape[1] != heads:
        raise CallError(f"the trace has up to {heads} heads, the importance {values.shape[1]}: use one model")
    if not np.isfinite(values).any():
        raise CallError("no head has a value: evaluate the importance of at least one head")
    values, power = _scaled(values)
    target = short_label(importance.targets[index])
    windows = any(attends_in_windows(step) for step in steps)
    attention = "attention that each patch receives in its window" if windows else "attention of the readout"
    scale = f"{drop_name(importance, index)}{power}; red: the head supports {target}, blue: it opposes {target}"
    grid = head_grid(trace, index=index)
    return replace(
        grid,
        rows=[
            replace(row, panels=[replace(panel, explained=False) for panel in row.panels if isinstance(panel, Panel)])
            for row in grid.rows
        ],
        title=f"What each head of {trace.provenance['model']} does for {explained_output(importance, index)}",
        note=f"maps: {attention}; frames: {_measure(importance)}",
        frames=Frames(values, scale),
    )


def drop_name(importance: HeadImportance, index: int = 0) -> str:
    """Return the name of the values, such as "drop of the logit without the head"."""
    estimated = "estimated " if importance.provenance["parameters"]["by"] == "gradient" else ""
    return f"{estimated}drop of the {_output_name(importance, index)} without the head"


def explained_output(importance: HeadImportance, index: int = 0) -> str:
    """Return what was explained with its value for the whole model, such as "cat (logit 3.53)"."""
    value = importance.provenance["outputs"][index]
    number = f"{value:.3g}".replace("-", MINUS)
    return f"{short_label(importance.targets[index])} ({_output_name(importance, index)} {number})"


def _output_name(importance: HeadImportance, index: int) -> str:
    """Return the name of the number of a class, or of the difference that a contrast is."""
    name = str(importance.provenance["parameters"]["output"]).replace("_", "-")
    return f"{name} difference" if CONTRAST in importance.targets[index] else name


def _measure(importance: HeadImportance) -> str:
    """Return how the values were computed."""
    parameters = importance.provenance["parameters"]
    if parameters["by"] == "gradient":
        return "importance of the head, estimated by gradient"
    replacement = "its mean over tokens" if parameters["replacement"] == "mean" else "zero"
    return f"importance of the head, measured with its output replaced by {replacement}"


def head_values(
    values: Float[np.ndarray, "layer head"],
    *,
    title: str,
    note: str = "",
    scale: str = "",
    layers: Sequence[int] | None = None,
) -> Scene:
    """Return a grid of layers × heads, each cell coloured by the value of one head.

    Red is above zero, white zero, and blue below, scaled to the largest absolute value. Cells of NaN are grey, for
    heads that a layer lacks and for heads without a value.

    Args:
        values: one value per head; layers from top to bottom.
        title: of the figure, with model and class.
        note: the second line.
        scale: name of the values with their unit, written above the cells. Small and large values are shown as
            multiples of a power of ten, which is added to it.
        layers: index of each layer; by default from 0.

    Raises:
        CallError: ``values`` is not a matrix, holds no number or an infinite one, or ``layers`` has another length.

    Examples:
        >>> import numpy as np
        >>> from vitscope.views.heads import head_values
        >>> [panel] = head_values(np.array([[0.5, -0.25]]), title="Heads of vit-nano for cat").rows[0].panels
        >>> panel.row_names, panel.column_names
        (['1 (0)'], ['0', '1'])
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).any() or np.isinf(values).any():
        raise CallError(f"values have the shape {values.shape}: pass finite numbers (layer, head), NaN for no value")
    names = [f"{layer + 1} ({layer})" for layer in (range(len(values)) if layers is None else layers)]
    if len(names) != len(values):
        raise CallError(f"layers lists {len(names)} layers for {len(values)} rows of values: pass one for each row")
    heads = [str(head) for head in range(values.shape[1])]
    values, power = _scaled(values)
    panel = Cells(values, names, heads, f"{scale}{power}".strip(), row_axis=LAYER_AXIS, column_axis=HEAD_AXIS)
    return Scene([Row([panel], 1)], title, note, caption="")


def _scaled(values: Float[np.ndarray, "layer head"]) -> tuple[Float[np.ndarray, "layer head"], str]:
    """Return values whose numbers fit into cells, and the power of ten that they are multiples of, as text."""
    limit = float(np.nanmax(np.abs(values)))
    exponent = math.floor(math.log10(limit)) if limit else 0
    if abs(exponent) <= MAX_EXPONENT:
        return values, ""
    return values * 10.0**-exponent, f" (×10{str(exponent).translate(SUPERSCRIPT)})"

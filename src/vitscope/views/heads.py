"""A scene of one value per attention head, such as how much each head supports a class."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vitscope.errors import CallError
from vitscope.views.scene import Cells, Row, Scene

CELL_WIDTH = 0.56  # inches
MAX_EXPONENT = 2  # of the largest value
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MARGINS = 1.7  # inches for the names of the rows and for the colour bar


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
        (['0'], ['0', '1'])
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).any() or np.isinf(values).any():
        raise CallError(f"values have the shape {values.shape}: pass finite numbers (layer, head), NaN for no value")
    names = [str(layer) for layer in (range(len(values)) if layers is None else layers)]
    if len(names) != len(values):
        raise CallError(f"layers lists {len(names)} layers for {len(values)} rows of values: pass one for each row")
    heads = [str(head) for head in range(values.shape[1])]
    limit = float(np.nanmax(np.abs(values)))
    exponent = math.floor(math.log10(limit)) if limit else 0
    if abs(exponent) > MAX_EXPONENT:  # the numbers would not fit into their cells
        values = values * 10.0**-exponent
        scale = f"{scale} (×10{str(exponent).translate(SUPERSCRIPT)})".strip()
    panel = Cells(values, names, heads, scale, row_axis="layer", column_axis="head")
    return Scene([Row([panel], 1, CELL_WIDTH * len(heads) + MARGINS)], title, note, caption="")

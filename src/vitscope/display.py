"""How results show themselves: as one line, as a figure, and in a notebook as a picture or a table.

Figures and tables are drawn by :mod:`vitscope.views`, which lies above all results. It is imported by name when a
result is first drawn.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

LONGEST_LINE = 200  # characters of a repr


def _views() -> ModuleType:
    """Return the module that draws results."""
    return importlib.import_module("vitscope.views.display")


def one_line(name: str, *facts: str) -> str:
    """Return the repr of a result: its class and facts about it, on one line of at most 200 characters.

    Args:
        name: of the class, and what follows it without a comma.
        facts: separated by commas; empty ones are left out.

    Examples:
        >>> one_line("Attribution: rollout of vit-nano", "1 image of 8×8", "")
        '<Attribution: rollout of vit-nano, 1 image of 8×8>'
    """
    text = " ".join(", ".join(filter(None, (name, *facts))).split())
    return f"<{text}>" if len(text) <= LONGEST_LINE - 2 else f"<{text[: LONGEST_LINE - 3]}…>"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, "1 image" or "1,200 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def ordinal(noun: str, index: int) -> str:
    """Return the name of a layer, block or stage, counted from 1 as in the papers, with the index that Python takes.

    Examples:
        >>> ordinal("layer", 5)
        'layer 6 (index 5)'
    """
    return f"{noun} {index + 1} (index {index})"


def ends(values: Any) -> str:
    """Return the range of an array or tensor as text; empty if no value is finite.

    Examples:
        >>> import torch
        >>> ends(torch.tensor([0.5, 2.0, float("nan")]))
        '0.5 to 2'
    """
    import numpy as np

    array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    finite = array[np.isfinite(array)]
    if not finite.size:
        return ""
    low, high = f"{finite.min():.3g}", f"{finite.max():.3g}"
    return low if low == high else f"{low} to {high}"


def write(result: Any, path: Path) -> None:
    """Write the figure of a result, or its report if the suffix of ``path`` is ``.html``; replace an existing file.

    Raises:
        SaveError: the file cannot be written; an older file at ``path`` is unchanged.
    """
    _views().write(result, path)


class Figured:
    """A result with a figure."""

    def figure(self, axes: Any = None, *, index: int | None = None) -> Any:
        """Return the result as a matplotlib Figure, as the command line draws it.

        The figure is not registered with pyplot, so it is shown once and needs no closing. A notebook shows it if it is
        the last line of a cell; ``figure.savefig("map.pdf")`` saves it.

        Args:
            axes: matplotlib Axes to draw into; only the main map or chart is drawn there. By default a new figure.
            index: index of the image in a batch; by default the first, and for maps the first six.

        Returns:
            the matplotlib Figure; that of ``axes`` if these are passed.

        Raises:
            CallError: ``index`` is out of range, or the result has no maps of several images.
        """
        return _views().figure(self, axes, index)


class Drawn(Figured):
    """A result that a notebook shows as its figure."""

    def _repr_png_(self) -> bytes | None:
        return _views().png(self)


class Tabulated:
    """A result that a notebook shows as a table."""

    def _repr_html_(self) -> str | None:
        return _views().html(self)

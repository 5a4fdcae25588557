"""A page on which the parts of a figure are placed in inches."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vitscope.views.palette import INK

MAX_PIXELS = 1_500_000  # of a picture in a notebook, which stores it as text
MAX_SIDE = 1600  # pixels of its longer side


class SceneFigure(Figure):
    """A matplotlib Figure that a notebook shows although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        canvas = FigureCanvasAgg(self)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        shrink = min(MAX_SIDE / max(picture.size), (MAX_PIXELS / (picture.width * picture.height)) ** 0.5, 1.0)
        if shrink < 1:
            size = (max(round(picture.width * shrink), 1), max(round(picture.height * shrink), 1))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in inches from its top left corner."""

    x: float
    y: float
    width: float
    height: float


class Page:
    """A figure whose parts are placed in inches from its top left corner."""

    def __init__(self, width: float, height: float, dpi: int | float) -> None:
        self.width, self.height = width, height
        self.figure = SceneFigure(figsize=(width, height), dpi=dpi, facecolor="white")

    def axes(self, box: Box) -> Any:
        """Add axes; matplotlib measures them in fractions of the page, from the bottom left."""
        bottom = 1 - (box.y + box.height) / self.height
        return self.figure.add_axes((box.x / self.width, bottom, box.width / self.width, box.height / self.height))

    def write(self, x: float, y: float, text: str, size: float, colour: str = INK, **style: Any) -> None:
        """Write a text."""
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, color=colour, **style)

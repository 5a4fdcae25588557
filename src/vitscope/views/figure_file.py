"""Writing of figures as PNG, PDF and SVG: the same figure gives the same bytes."""

import re
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_mixed import MixedModeRenderer
from matplotlib.backends.backend_pdf import Op, PdfFile, RendererPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from vitscope.errors import CallError
from vitscope.views.style import FigureStyle

POINTS = 72  # per inch
TOLERANCE = 2  # levels of 255 by which a pixel of a PNG may differ: invisible, and half the bytes
COMPRESSION = 8  # of 9
MAX_PIXELS = 150_000_000  # of a PNG: 600 MB while it is drawn


def write_figure(figure: Figure, path: Path, style: FigureStyle) -> None:
    """Write a figure in the format that the suffix of ``path`` names: ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        CallError: the figure has too many pixels for a PNG.
    """
    path.write_bytes(ENCODERS[path.suffix.lower()](figure, style))


def png_bytes(figure: Figure, style: FigureStyle) -> bytes:
    """Return a figure as a PNG file of RGB pixels, see :func:`_smoothed`.

    Raises:
        CallError: the figure has too many pixels.
    """
    width, height = (round(float(side) * figure.dpi) for side in figure.get_size_inches())
    if width * height > MAX_PIXELS or max(width, height) >= 2**16:
        raise CallError(f"the figure would have {width:,} × {height:,} pixels: lower --dpi or --width")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = _smoothed(np.asarray(canvas.buffer_rgba())[..., :3])
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", dpi=(style.dpi, style.dpi), compress_level=COMPRESSION)
    return file.getvalue()


def _smoothed(pixels: np.ndarray) -> np.ndarray:
    """Return pixels that compress better and differ from these by at most ``TOLERANCE`` levels.

    The difference of each pixel from the one above is rounded to a multiple of ``2 · TOLERANCE + 1``, as in the nearly
    lossless mode of JPEG-LS. Rounding errors do not add up, because the row above is the rounded one. Pure white stays
    white.
    """
    step = 2 * TOLERANCE + 1
    smoothed = np.empty_like(pixels)
    above = np.full(pixels.shape[1:], 255, dtype=np.int16)
    for row, result in zip(pixels.astype(np.int16), smoothed, strict=True):
        difference = row - above
        above = above + np.sign(difference) * ((np.abs(difference) + TOLERANCE) // step * step)
        above = np.where((row == 255).all(-1, keepdims=True), 255, above.clip(0, 255)).astype(np.int16)
        result[:] = above
    return smoothed


def _pdf_bytes(figure: Figure, style: FigureStyle) -> bytes:
    """Return a PDF page of the style's width; its scale is set before anything is drawn."""
    FigureCanvasBase(figure)
    scale, dpi = _scale(figure, style), figure.dpi
    width, height = map(float, figure.get_size_inches())
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text that editors can change
        file = BytesIO()
        pdf = PdfFile(file, metadata={"CreationDate": None})
        figure.dpi = POINTS
        pdf.newPage(width * scale, height * scale)
        pdf.output(scale, 0, 0, scale, 0, 0, Op.concat_matrix)
        renderer = MixedModeRenderer(figure, width, height, dpi, RendererPdf(pdf, dpi, height, width))
        figure.draw(renderer)
        renderer.finalize()
        pdf.finalize()
    pdf.close()
    return file.getvalue()


def _svg_bytes(figure: Figure, style: FigureStyle) -> bytes:
    """Return an SVG page of the style's width, whose texts are texts."""
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vitscope"}):  # no random identifiers
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    scale = _scale(figure, style)
    svg = re.sub(
        r'(?<= )(width|height)="([\d.]+)pt"',
        lambda match: f'{match[1]}="{float(match[2]) * scale:g}pt"',
        text.getvalue(),
        count=2,
    )
    return svg.encode("utf-8")


def _scale(figure: Figure, style: FigureStyle) -> float:
    return 1.0 if style.width is None else style.width / float(figure.get_size_inches()[0])


ENCODERS: dict[str, Callable[[Figure, FigureStyle], bytes]] = {
    ".png": png_bytes,
    ".pdf": _pdf_bytes,
    ".svg": _svg_bytes,
}

"""Frames of panels: each has the colour and the number of its value."""

from matplotlib.patches import Rectangle

from vitscope.views.charts import SignedScale
from vitscope.views.page import Box, Page
from vitscope.views.palette import FRAME
from vitscope.views.scene import Frames

FRAME_WIDTH = 0.06  # inches of the frame of a panel
NUMBER_HEIGHT = 0.155  # inches for the number of a frame, below the map


def border_height(frames: Frames | None, ratio: float) -> float:
    """Return the inches that a frame adds to the height of a panel.

    Args:
        frames: None for a figure without frames.
        ratio: height over width of a panel.
    """
    return 0.0 if frames is None else NUMBER_HEIGHT - FRAME_WIDTH * (2 * ratio - 1)


def draw_frame(page: Page, box: Box, frames: Frames, place: tuple[int, int]) -> Box:
    """Draw the frame of a panel with its number below the map; return the box of the map."""
    scale, value = SignedScale.of(frames.values), float(frames.values[place])
    bottom = 1 - (box.y + box.height) / page.height
    frame = Rectangle(
        (box.x / page.width, bottom),
        box.width / page.width,
        box.height / page.height,
        facecolor=scale.colour(value),
        edgecolor=FRAME,  # shows where a frame is white
        linewidth=0.5,
        zorder=-1,
        transform=page.figure.transFigure,
    )
    page.figure.add_artist(frame)
    middle = box.y + box.height - NUMBER_HEIGHT / 2
    page.write(box.x + box.width / 2, middle, scale.text(value), 7.0, scale.ink(value), ha="center", va="center")
    return Box(
        box.x + FRAME_WIDTH, box.y + FRAME_WIDTH, box.width - 2 * FRAME_WIDTH, box.height - FRAME_WIDTH - NUMBER_HEIGHT
    )

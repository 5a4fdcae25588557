"""Outlines of regions over photos and maps, and the figure of mean maps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vitscope.compositing.object_masks import Mask
from vitscope.images.image import nearest_pixels
from vitscope.results.attribution import Attribution
from vitscope.views.palette import INK, WHITE
from vitscope.views.scene import Outline, Panel, Row, Scene, map_panel

MOST_COLUMNS = 5  # in rows of more panels, these are too small for outlines
MOST_GROUPS = 7  # in a figure of mean maps
NEAR = 0.1  # of the panel, within which names are written below each other
LABEL = 11  # points from a name to the next one below


def outlined(scene: Scene, masks: Mapping[str, Mask]) -> Scene:
    """Return a scene whose large photos and maps have outlines of regions.

    Args:
        scene: of one photo.
        masks: of the photo, by the names of the regions.
    """
    outlines = [Outline(name, mask) for name, mask in masks.items()]
    size = scene.photo.size
    rows = [
        row
        if row.columns > MOST_COLUMNS
        else replace(
            row,
            panels=[
                replace(panel, outlines=outlines)
                if isinstance(panel, Panel) and panel.image.photo.size == size
                else panel
                for panel in row.panels
            ],
        )
        for row in scene.rows
    ]
    return replace(scene, rows=rows)


def mean_map_scene(
    means: Mapping[str, Attribution],
    masks: Sequence[Mapping[str, Mask]],
    lines: Mapping[str, Sequence[Sequence[str]]],
    *,
    title: str,
    note: str,
) -> Scene:
    """Return the mean maps of groups of photos: a row for each method, a column for each group.

    Args:
        means: the mean maps of each method, from :func:`vitscope.mean_maps`.
        masks: for each group the regions to outline on its mean photo.
        lines: for each method and group, the lines below the map.
        title: of the figure.
        note: below the title.
    """
    count = min(len(masks), MOST_GROUPS)
    rows = []
    for name, mean in means.items():
        panels = [
            replace(
                map_panel(
                    mean,
                    mean.images[index].name if len(means) == 1 else f"{name}: {mean.images[index].name}",
                    index=index,
                ),
                lines=lines[name][index],
                outlines=[Outline(region, mask) for region, mask in masks[index].items()],
            )
            for index in range(count)
        ]
        rows.append(Row(panels, max(count, 2)))
    rest = len(masks) - count
    return Scene(rows, title, note + (f"; {rest} more groups are not drawn" if rest else ""))


def draw_region_outlines(axes: Any, panel: Panel, size: tuple[int, int]) -> None:
    """Draw the outline of each region, black and white so that it is visible on all colours, with its name.

    Args:
        axes: the axes of the panel, in pixels.
        panel: a photo or map.
        size: (width, height) of the panel in pixels.
    """
    labels: list[tuple[int, int]] = []
    for outline in panel.outlines:
        mask = nearest_pixels(outline.mask, (size[1], size[0]))
        if mask.all() or not mask.any():
            continue
        for colour, width, style in ((WHITE, 2.0, "solid"), (INK, 1.1, (0, (3, 2)))):
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])
        row = int(np.flatnonzero(mask.any(1))[0])
        column = int(np.flatnonzero(mask[row])[0])
        near = sum(abs(row - y) < NEAR * size[1] and abs(column - x) < 2 * NEAR * size[0] for y, x in labels)
        labels.append((row, column))
        patch = {"boxstyle": "square,pad=0.15", "facecolor": WHITE, "edgecolor": "none", "alpha": 0.8}
        axes.annotate(
            outline.name,
            (column, row),
            (3, -3 - LABEL * near),
            textcoords="offset points",
            fontsize=7,
            color=INK,
            ha="left",
            va="top",
            bbox=patch,
            annotation_clip=False,
        )

"""Scenes of results with one weight per segment, and of several methods or models side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.images.image import InputImage
from vitscope.metrics.agreement import Agreement
from vitscope.results.attribution import Attribution
from vitscope.results.sampled_attribution import SampledAttribution
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.views.numbers import IMPROBABLE, MINUS, percentage
from vitscope.views.palette import OutlineName
from vitscope.views.scene import (
    OVERLAY,
    SIGNED_CAPTION,
    UNSIGNED_CAPTION,
    Bars,
    Cells,
    Panel,
    Row,
    Scene,
    columns_for,
    rows_of,
    short_label,
)

COUNT = 5  # numbered segments of each sign: no more than a reader can keep in mind
SINGLE_ROW = 4  # panels that still fit next to each other
MAX_SIDE = 1024  # pixels of a map in a figure: more than a panel can show


def supporting_regions(result: SegmentAttribution, *, count: int = COUNT) -> Scene:
    """Return the weights of all segments, and the segments that support and oppose the two most probable classes.

    Args:
        result: of one image.
        count: number of supporting segments per class, and of opposing ones.
    """
    by_class = [result]
    if len(result.classes) > 1:
        index = result.class_indices[1]
        by_class.append(result.of(result.classes[1] if index is None else index))
    photo = Panel(result.images[0], title="photo and segments", regions=_thinned(result.index), outline="plain")
    rows = [Row([photo, *map(_weights_panel, by_class)], 3)]
    rows += [Row(_class_panels(class_result, count), 3) for class_result in by_class]
    labels = " and ".join(short_label(class_result.target) for class_result in by_class)
    parameters = result.provenance["parameters"]
    interrupted = ", interrupted" if result.provenance["interrupted"] else ""
    return Scene(
        rows=rows,
        title=f"Segments that support or oppose {labels}, for {result.provenance['model']}",
        note=(
            f"{result.provenance['method']}: {len(result.weights)} segments ({parameters['segments']}), hidden ones "
            f"{_filling(parameters['hide'])}, {result.provenance['samples']:,} samples{interrupted}, "
            f"{describe_fit(result)}{logit_advice([result])}"
        ),
        caption=SIGNED_CAPTION,
    )


def side_by_side(
    results: Sequence[Attribution],
    names: Sequence[str],
    *,
    title: str,
    note: str = "",
    lines: Sequence[Sequence[str]] = (),
    agreement: Agreement | None = None,
) -> Scene:
    """Return the photo and one map for each result, with the rank correlation of each pair.

    Args:
        results: of one image.
        names: written above each map.
        title: of the figure.
        note: the second line of the figure.
        lines: for each map the lines below it.
        agreement: of the results; None for no rank correlations.
    """
    panels: list[Panel | Bars] = [Panel(results[0].images[0], title="photo")]
    panels += [
        replace(pixel_panel(result, name), lines=below)
        for result, name, below in zip(results, names, lines or [()] * len(results), strict=True)
    ]
    caption = SIGNED_CAPTION if all(result.signed for result in results) else UNSIGNED_CAPTION
    columns = len(panels) if len(panels) <= SINGLE_ROW else columns_for(len(panels))
    rows = rows_of(panels, columns)
    if agreement is not None:
        correlations = np.where(np.eye(len(results), dtype=bool), np.nan, agreement.rank_correlation)
        if len(results) > 2 and np.isfinite(correlations).any():
            rows.append(Row([_correlation_cells(agreement.names, correlations)], 1))
        elif np.isfinite(correlations).any():
            correlation = f"rank correlation of the maps: {correlations[0, 1]:+.2f}".replace("-", MINUS)
            note = f"{note}; {correlation}" if note else correlation
    return Scene(rows, title, (note + logit_advice(results)).removeprefix("; "), caption=caption)


def _correlation_cells(names: Sequence[str], values: Float[np.ndarray, "name name"]) -> Cells:
    """Return the rank correlation of each pair of results; the columns are numbered like the rows."""
    numbers = [str(number) for number in range(1, len(names) + 1)]
    rows = [f"{name}  {number}" for name, number in zip(names, numbers, strict=True)]
    return Cells(values, rows, numbers, "agreement: rank correlation of each pair of maps", limit=1.0)


def pixel_panel(result: Attribution, title: str, image: InputImage | None = None) -> Panel:
    """Return the map of a single result, on patches, pixels or segments, over its photo or another image."""
    return Panel(
        result.images[0] if image is None else image,
        _thinned(result.values[0]),
        title,
        OVERLAY if image is None else 1.0,
        flat=isinstance(result, SegmentAttribution),
        signed=result.signed,
        uniform=result.uniform,
        dropped=None if result.dropped is None else _thinned(result.dropped[0]),
        pale=_pale(result),
    )


def _weights_panel(result: SegmentAttribution) -> Panel:
    panel = pixel_panel(result, f"all weights, {_prediction(result)}")
    return replace(panel, alpha=OVERLAY + 0.15)


def _pale(result: Attribution) -> np.ndarray | None:
    """Return the pixels that cannot be told from zero; None if there are none."""
    pale = result.pale_pixels()
    return None if pale is None or not pale.any() else _thinned(torch.from_numpy(pale))


def segment_names(result: SegmentAttribution, count: int = COUNT) -> dict[str, int]:
    """Return the indices of the largest weights by their names in figures: 1, 2, … support, a, b, … oppose."""
    supporting = {str(rank): index for rank, index in enumerate(result.top(count), 1)}
    return supporting | {chr(ord("a") + rank): index for rank, index in enumerate(result.top(count, sign="negative"))}


def _class_panels(result: SegmentAttribution, count: int) -> list[Panel | Bars]:
    """Return the supporting and the opposing segments on the photo, and their weights as bars."""
    segments, label = segment_names(result, count), short_label(result.target)
    supporting = {name: index for name, index in segments.items() if name.isdigit()}
    opposing = {name: index for name, index in segments.items() if name not in supporting}
    panels: list[Panel | Bars] = [
        _segments_panel(result, supporting, f"supports {label}", "supports"),
        _segments_panel(result, opposing, f"opposes {label}", "opposes"),
    ]
    indices = list(segments.values())
    if indices:
        confidence = result.provenance["parameters"].get("confidence")
        intervals = (
            None if result.intervals is None else [(low, high) for low, high in result.intervals[indices].tolist()]
        )
        title = "weights" if confidence is None else f"weights, {confidence:.0%} intervals"
        panels.append(Bars(list(segments), result.weights[indices].tolist(), intervals, title))
    return panels


def _segments_panel(result: SegmentAttribution, segments: Mapping[str, int], title: str, outline: OutlineName) -> Panel:
    """Return the photo with only these segments in colour, outlined and numbered."""
    index = _thinned(result.index)
    lit = np.isin(index, list(segments.values()))
    return Panel(
        result.images[0],
        title=title if segments else f"{title}: nothing",
        regions=np.where(lit, index, -1),
        lit=lit,
        numbers=[(*_central_pixel(index == segment), name) for name, segment in segments.items()],
        outline=outline,
    )


def _thinned(pixels: Tensor) -> np.ndarray:
    """Return every n-th pixel, so that no side is longer than a figure can show."""
    step = -(-max(pixels.shape) // MAX_SIDE)
    return pixels[::step, ::step].cpu().numpy()


def _central_pixel(segment: np.ndarray) -> tuple[float, float]:
    """Return the (row, column) of the segment's pixel nearest to its centroid, which may lie outside a bent one."""
    rows, columns = np.nonzero(segment)
    if not len(rows):
        return 0.0, 0.0
    nearest = ((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2).argmin()
    return float(rows[nearest]), float(columns[nearest])


def _prediction(result: SegmentAttribution) -> str:
    """Return the explained class with the model's output, "cat (93.1%)"."""
    value, output = result.output, result.provenance["parameters"]["output"]
    text = percentage(value) if output == "probability" else f"{value:.4g}" if output == "value" else f"{value:.2f}"
    return f"{short_label(result.target)} ({text})"


def describe_prediction(result: SegmentAttribution) -> str:
    """Return the model and its output for the explained class as one line."""
    return f"{result.provenance['model']} sees it: {_prediction(result)}"


def describe_fit(result: SegmentAttribution) -> str:
    """Return how well the linear model fits, on samples that were left out of it, as text."""
    score = result.held_out_score
    return f"R² on held-out samples: {'not determined' if score is None else f'{score:.2f}'.replace('-', MINUS)}"


def logit_advice(results: Sequence[Attribution]) -> str:
    """Return the advice to explain the logit of the first improbable class, as a sentence after a note.

    Args:
        results: of one image each.
    """
    for result in results:
        probability = _probability(result)
        if probability is not None and probability < IMPROBABLE:
            return (
                f"; {short_label(result.target)} has a probability of {percentage(probability)}, so its changes are "
                "tiny: output='logit' (--output logit) is the better thing to explain"
            )
    return ""


def _probability(result: Attribution) -> float | None:
    """Return the probability of the explained class, if that is what a method explains."""
    if result.provenance.get("parameters", {}).get("output") != "probability":
        return None
    if isinstance(result, SegmentAttribution):
        return None if result.class_indices[0] is None else result.output
    if isinstance(result, SampledAttribution) and result.target in result.labels:
        return result.output
    return None


def _filling(hide: object) -> str:
    """Return how hidden segments were filled, as text."""
    if hide == "drop":
        return "left out"
    return "in their mean colour" if hide == "mean" else f"filled by {hide}"

"""Scenes of results that have one weight a segment, and of several methods or models side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from vitscope.results.attribution import Attribution
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.views.scene import (
    OVERLAY,
    SIGNED_CAPTION,
    UNSIGNED_CAPTION,
    Bars,
    Panel,
    Row,
    Scene,
    columns_for,
    wrapped,
)

COUNT = 5  # segments that are numbered, as many as a reader can hold apart
MAX_SIDE = 1024  # of the maps in a figure: more pixels than a panel has show nothing


def supporting_regions(result: SegmentAttribution, *, count: int = COUNT) -> Scene:
    """All weights, and what speaks for the target and for the likeliest other class, with weights and intervals."""
    shown = [result] + ([result.of(result.class_indices[1])] if len(result.classes) > 1 else [])
    photo = Panel(result.images[0], title="photo and segments", regions=_thinned(result.index))
    rows = [Row([photo, *(_weights(one) for one in shown)], 3)]
    rows += [Row(_for_and_against(one, count), 3) for one in shown]
    speaking = " and for ".join(_name(one.target) for one in shown)
    parameters = result.provenance["parameters"]
    interrupted = ", interrupted" if result.provenance["interrupted"] else ""
    fitted = "" if result.provenance["method"] != "lime" else f", R² {result.score:.2f}"
    return Scene(
        rows=rows,
        title=f"What speaks for {speaking}, as {result.provenance['model']} sees it",
        note=(
            f"{result.provenance['method']}: {len(result.weights)} segments ({parameters['segments']}), hidden ones "
            f"{_hidden(parameters['hide'])}, {result.provenance['samples']:,} samples{interrupted}{fitted}"
        ),
        caption=SIGNED_CAPTION,
    )


def side_by_side(results: Sequence[Attribution], names: Sequence[str], *, title: str, note: str = "") -> Scene:
    """The photo and one map for each result."""
    panels: list[Panel | Bars] = [Panel(results[0].images[0], title="photo")]
    panels += [
        Panel(
            result.images[0],
            _thinned(result.values[0]),
            name,
            flat=isinstance(result, SegmentAttribution),
            signed=result.signed,
        )
        for result, name in zip(results, names, strict=True)
    ]
    kinds = {result.signed for result in results}
    caption = SIGNED_CAPTION if kinds == {True} else UNSIGNED_CAPTION
    if len(kinds) == 2:
        caption += "; red and blue: against and for the class"
    return Scene(wrapped(panels, columns_for(len(panels))), title, note, caption=caption)


def _weights(result: SegmentAttribution) -> Panel:
    values = _thinned(result.values[0])
    return Panel(
        result.images[0], values, f"all weights, {_answer(result)}", alpha=OVERLAY + 0.15, flat=True, signed=True
    )


def named_places(result: SegmentAttribution, count: int = COUNT) -> dict[str, int]:
    """The weightiest segments by the names they have in figures: 1, 2, … for the target, a, b, … against it."""
    named = {str(rank + 1): place for rank, place in enumerate(result.top(count))}
    return named | {chr(ord("a") + rank): place for rank, place in enumerate(result.top(count, sign="negative"))}


def _for_and_against(result: SegmentAttribution, count: int) -> list[Panel | Bars]:
    """The supporting segments and the opposing ones on the photo, and their weights as bars."""
    places, label = named_places(result, count), _name(result.target)
    speaking = {name: place for name, place in places.items() if name.isdigit()}
    panels: list[Panel | Bars] = [
        _lit(result, speaking, f"for {label}"),
        _lit(result, {name: place for name, place in places.items() if name not in speaking}, f"against {label}"),
    ]
    chosen = list(places.values())
    if chosen:
        sure = result.provenance["parameters"].get("confidence")
        intervals = (
            None if result.intervals is None else [(low, high) for low, high in result.intervals[chosen].tolist()]
        )
        title = "weights" if sure is None else f"weights, {sure:.0%} intervals"
        panels.append(Bars(list(places), result.weights[chosen].tolist(), intervals, title))
    return panels


def _lit(result: SegmentAttribution, places: Mapping[str, int], title: str) -> Panel:
    """The photo with nothing but these segments in colour."""
    index = _thinned(result.index)
    lit = np.isin(index, list(places.values()))
    return Panel(
        result.images[0],
        title=title if places else f"{title}: nothing",
        regions=np.where(lit, index, -1),
        lit=lit,
        numbers=[(*_inside(index == place), name) for name, place in places.items()],
    )


def _thinned(pixels: Tensor) -> np.ndarray:
    """Every so many of the pixels, as many as a figure can show."""
    step = -(-max(pixels.shape) // MAX_SIDE)
    return pixels[::step, ::step].cpu().numpy()


def _inside(segment: np.ndarray) -> tuple[float, float]:
    """The pixel of a segment nearest to its centre: a bent one's centre may lie outside."""
    rows, columns = np.nonzero(segment)
    if not len(rows):
        return 0.0, 0.0
    nearest = ((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2).argmin()
    return float(rows[nearest]), float(columns[nearest])


def _name(label: str | None) -> str:
    """A label as people say it: the first of its synonyms."""
    return (label or "").split(",")[0]


def _answer(result: SegmentAttribution) -> str:
    answer, output = result.answer, result.provenance["parameters"]["output"]
    shown = f"{answer:.1%}" if output == "probability" else f"{answer:.4g}" if output == "value" else f"{answer:.2f}"
    return f"{_name(result.target)} ({shown})"


def seen_as(result: SegmentAttribution) -> str:
    """Which model says what, in one line."""
    return f"{result.provenance['model']} sees it: {_answer(result)}"


def _hidden(hide: object) -> str:
    if hide == "drop":
        return "left out"
    return "in their mean colour" if hide == "mean" else f"filled: {hide}"

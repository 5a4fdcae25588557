"""Experiments: the edited images of each test, and their names."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

import numpy as np

from vitscope.compositing.stage import MAX_SCALE, EditedImage, Placement, Stage
from vitscope.errors import CallError
from vitscope.validation import require_at_least, require_number

TestName = Literal["size", "location", "split", "controls"]

SCALES = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0)  # each doubles the area of the previous one
PLACES = (7, 7)
MAX_PLACES = 100  # per side of the location grid
MAX_SCALES = 1000
LEAST_SIZE = 4  # pixels per side: default scales that make the object smaller are left out
APART = 0.95  # share of the available length that two separated objects may fill
BACKGROUNDS = {"blank": "blank", "blurred": "blurred", "shuffled": "shuffled", "other": "another"}

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the photo
Point = tuple[float, float]  # x, y, in pixels of the photo


@dataclass(frozen=True)
class ExperimentPlan:
    """The tests to run, and their options."""

    names: tuple[str, ...]
    scales: tuple[float, ...] | None
    places: tuple[int, int]
    location_scale: float
    can_be_neutral: bool = False


def plan_experiments(names: Any, scales: Any, places: Any, location_scale: Any) -> ExperimentPlan:
    """Check the test options of :func:`vitscope.compose`, and return them as a plan.

    Raises:
        CallError: unknown test, invalid scale, or invalid grid of places.
    """
    names = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for name in names:
        if name not in get_args(TestName):
            raise CallError(f"unknown test {name!r}: choose {', '.join(get_args(TestName))}")
    if scales is not None:
        scales = tuple(require_number(scale, "a scale") for scale in np.atleast_1d(np.asarray(scales, dtype=object)))
        if len(scales) > MAX_SCALES:
            raise CallError(f"scales has {len(scales):,} numbers: pass at most {MAX_SCALES:,}")
        if not scales or min(scales) <= 0:
            raise CallError(f"scales is {list(scales)}: pass numbers above 0")
        if max(scales) > MAX_SCALE:
            raise CallError(f"a scale is {max(scales):g}: pass at most {MAX_SCALE:,}")
    try:
        rows, columns = (places, places) if np.ndim(places) == 0 else places
    except (TypeError, ValueError):
        raise CallError(f"places is {places!r}: pass rows and columns, as (7, 7)") from None
    grid = require_at_least(2, rows, "places"), require_at_least(2, columns, "places")
    if max(grid) > MAX_PLACES:
        raise CallError(f"places is {_short_repr(places)}: pass at most {MAX_PLACES} rows and columns")
    scale = require_number(location_scale, "location_scale")
    if scale > MAX_SCALE:
        raise CallError(f"location_scale is {scale:g}: pass at most {MAX_SCALE:,}")
    if scale <= 0:
        raise CallError(f"location_scale is {location_scale!r}: pass a number above 0")
    return ExperimentPlan(names, scales, grid, scale)


def _short_repr(value: Any) -> str:
    """Return the repr of a value, cut off if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return "a very large number"
    return text if len(text) <= 40 else f"{text[:40]}…"


def plan_edited_images(stage: Stage, seen_box: Box, tests: ExperimentPlan) -> list[EditedImage]:
    """Return the original and every edited image of the tests, in the order of tables and figures."""
    images = [EditedImage("original", _unmoved(stage), test="original")]
    for name in stage.objects:
        if "size" in tests.names:
            images += _size_test(stage, seen_box, name, tests.scales)
    for name in stage.objects:
        if "location" in tests.names:
            images += _location_test(stage, seen_box, name, tests, _unmoved(stage, without=(name,)), "")
    if "split" in tests.names:
        images += _split_test(stage, seen_box)
    if "controls" in tests.names:
        for name in stage.objects:
            images += _controls(stage, seen_box, name, tests)
        if tests.can_be_neutral:
            images.append(EditedImage("positions neutral", _unmoved(stage), neutral=True, test="controls"))
    return images


def _unmoved(stage: Stage, without: Sequence[str] = ()) -> tuple[Placement, ...]:
    """Return the objects at their original places, except for those in ``without``."""
    return tuple(Placement(name) for name in stage.objects if name not in without)


def _size_test(stage: Stage, seen_box: Box, name: str, scales: Sequence[float] | None) -> Iterator[EditedImage]:
    """Yield the object at each scale around its own centre, in front of the others."""
    for scale in SCALES if scales is None else scales:
        if scales is None and not _fits(stage, seen_box, name, scale):
            continue
        show = (*_unmoved(stage, without=(name,)), Placement(name, scale=scale))
        yield EditedImage(f"{name} × {scale:g}", show, test="size", subject=name)


def _fits(stage: Stage, seen_box: Box, name: str, scale: float) -> bool:
    """Return whether the model sees all of an object scaled around its own centre; scale 1 always fits."""
    width, height = stage.size_of(name, scale)
    x, y = stage.require_object(name).centre
    inside = x - width / 2 >= seen_box[0] and x + width / 2 <= seen_box[2]
    inside = inside and y - height / 2 >= seen_box[1] and y + height / 2 <= seen_box[3]
    return scale == 1.0 or (inside and min(width * stage.factor[0], height * stage.factor[1]) >= LEAST_SIZE)


def _location_test(
    stage: Stage, seen_box: Box, name: str, tests: ExperimentPlan, others: tuple[Placement, ...], suffix: str
) -> Iterator[EditedImage]:
    """Yield the object at every place of a grid, from edge to edge of what the model sees."""
    ys, xs = grid_of_places(stage, seen_box, name, tests)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            yield EditedImage(
                f"{name} at ({row}, {column}){suffix}",
                (*others, Placement(name, (x, y), tests.location_scale)),
                test="location",
                subject=name,
                place=(row, column),
            )


def grid_of_places(stage: Stage, seen_box: Box, name: str, tests: ExperimentPlan) -> tuple[list[float], list[float]]:
    """Return the y of each row and the x of each column of the location grid, in pixels of the photo.

    Raises:
        CallError: the object is larger than what the model sees, or has no room to move in it.
    """
    width, height = stage.size_of(name, tests.location_scale)
    seen_width, seen_height = _size_of_box(seen_box)
    room = (seen_width - width, seen_height - height)
    if min(room) < -0.5 or max(room) < 1:
        largest = min(seen_width / width, seen_height / height) * tests.location_scale
        raise CallError(
            f"cannot move {name}: at scale {tests.location_scale:g} it is {width:.0f}×{height:.0f} pixels, and the "
            f"model sees {seen_width:.0f}×{seen_height:.0f}: pass a location_scale well below {largest:.2f}"
        )
    rows, columns = tests.places
    return _spread(seen_box[1] + height / 2, room[1], rows), _spread(seen_box[0] + width / 2, room[0], columns)


def _size_of_box(box: Box) -> tuple[float, float]:
    """Return the (width, height) of a box."""
    return box[2] - box[0], box[3] - box[1]


def _spread(start: float, room: float, count: int) -> list[float]:
    """Return up to ``count`` places from ``start`` to ``start + room``, at least a pixel apart.

    If there is no room for two places, the only one is the middle.
    """
    count = min(count, int(room) + 1)
    return [start + room / 2] if count < 2 else (start + np.linspace(0, room, count)).tolist()


def _split_test(stage: Stage, seen_box: Box) -> Iterator[EditedImage]:
    """Yield every pair of objects apart and exchanged, then each object mirrored, then each object left out."""
    names = list(stage.objects)
    for pair in combinations(names, 2):
        yield _apart(stage, seen_box, pair)
        yield _exchanged(stage, seen_box, pair)
    for subject in names:
        show = tuple(Placement(name, mirrored=name == subject) for name in names)
        yield EditedImage(f"{subject} mirrored", show, test="split", subject=subject)
    for subject in names:
        show = _unmoved(stage, without=(subject,))
        yield EditedImage(f"{subject} left out", show, test="split", subject=subject)


def _exchanged(stage: Stage, seen_box: Box, pair: tuple[str, str]) -> EditedImage:
    """Return two objects with exchanged places, or as near to them as both are completely visible to the model.

    If one of them is larger than what the model sees, both are scaled down.
    """
    first, second = pair
    seen_size = _size_of_box(seen_box)
    ratios = (length / side for name in pair for length, side in zip(seen_size, stage.size_of(name), strict=True))
    scale = min(1.0, *ratios)
    exchanged = [
        _place_near(stage, seen_box, name, stage.require_object(target).centre, scale)
        for name, target in ((first, second), (second, first))
    ]
    show = (*_unmoved(stage, without=pair), *exchanged)
    return EditedImage(f"{first} and {second} exchanged{_scale_suffix(scale)}", show, test="split")


def _scale_suffix(scale: float) -> str:
    return "" if scale == 1 else f" × {scale:.2f}"


def _place_near(stage: Stage, seen_box: Box, name: str, target: Point, scale: float) -> Placement:
    """Return the object at the nearest place to ``target`` at which the model sees all of it."""
    half = [side / 2 for side in stage.size_of(name, scale)]
    x, y = (min(max(target[axis], seen_box[axis] + half[axis]), seen_box[axis + 2] - half[axis]) for axis in (0, 1))
    return Placement(name, (x, y), scale)


def _apart(stage: Stage, seen_box: Box, pair: tuple[str, str]) -> EditedImage:
    """Return two objects at opposite edges, along the axis with more room; both are scaled down if they do not fit."""
    sizes, room = [stage.size_of(name) for name in pair], _size_of_box(seen_box)
    along = [APART * room[axis] / (sizes[0][axis] + sizes[1][axis]) for axis in (0, 1)]
    # Neither object may reach beyond the edges of the other axis.
    across = [room[1 - axis] / max(sizes[0][1 - axis], sizes[1][1 - axis]) for axis in (0, 1)]
    scales = [min(1.0, *limits) for limits in zip(along, across, strict=True)]
    axis = max((0, 1), key=lambda axis: (scales[axis], along[axis]))
    scale, cross_axis = scales[axis], 1 - axis
    nearer, farther = sorted(pair, key=lambda name: stage.require_object(name).centre[axis])
    placements = []
    for name, edge, inward in ((nearer, seen_box[axis], 1), (farther, seen_box[axis + 2], -1)):
        half = [side * scale / 2 for side in stage.size_of(name)]
        centre = list(stage.require_object(name).centre)
        centre[axis] = edge + inward * half[axis]
        low, high = seen_box[cross_axis] + half[cross_axis], seen_box[cross_axis + 2] - half[cross_axis]
        centre[cross_axis] = min(max(centre[cross_axis], low), high)
        placements.append(Placement(name, (centre[0], centre[1]), scale))
    show = (*_unmoved(stage, without=pair), *placements)
    return EditedImage(f"{pair[0]} and {pair[1]} apart{_scale_suffix(scale)}", show, test="split")


def _controls(stage: Stage, seen_box: Box, name: str, tests: ExperimentPlan) -> Iterator[EditedImage]:
    """Yield the object alone over its own background and over others, at its place and at every place of the grid."""
    alone = EditedImage(f"{name} alone", (Placement(name),), test="controls", subject=name)
    yield alone
    for background, adjective in BACKGROUNDS.items():
        yield replace(alone, name=f"{name} on {adjective} background", background=background)
    yield EditedImage(f"no {name}", _unmoved(stage, without=(name,)), test="controls", subject=name)
    settings = [("own", False, " alone"), ("blank", False, ", blank")]
    if tests.can_be_neutral:
        settings.append(("blank", True, ", blank, positions neutral"))
    for background, neutral, suffix in settings:
        for image in _location_test(stage, seen_box, name, tests, (), suffix):
            yield replace(image, test="controls", background=background, neutral=neutral)


def check_names(edited_images: Sequence[EditedImage]) -> None:
    """Check that no two edited images have the same name, because they are selected by name."""
    names = sorted(image.name for image in edited_images)
    duplicates = [name for name, following in pairwise(names) if name == following]
    if duplicates:
        raise CallError(f"two edited images are called {duplicates[0]!r}: give each its own name")

"""The tests: which composites of a photo's objects are looked at, and what each is called."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

import numpy as np

from vitscope.compositing.stage import MOST_SCALE, EditedImage, Placement, Stage
from vitscope.errors import CallError
from vitscope.validation import at_least, number

TestName = Literal["size", "location", "split", "controls"]

SCALES = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0)  # areas that double
PLACES = (7, 7)
MOST_PLACES = 100  # a side of the location grid
MOST_SCALES = 1000
APART = 0.95  # of the room that two objects may fill when they are set apart
SETTINGS = ("blank", "blurred", "shuffled", "other")

Arena = tuple[float, float, float, float]  # left, top, right, bottom of what the model sees, in pixels of the photo


@dataclass(frozen=True)
class ExperimentPlan:
    """Which tests are made, and how."""

    names: tuple[str, ...]
    scales: tuple[float, ...] | None
    places: tuple[int, int]
    location_scale: float
    can_be_neutral: bool = False


def planned_experiments(names: Any, scales: Any, places: Any, location_scale: Any) -> ExperimentPlan:
    """The options of :func:`vitscope.compose`, checked.

    Raises:
        CallError: an unknown test, a scale that is none, or a grid of places that is none.
    """
    names = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    for name in names:
        if name not in get_args(TestName):
            raise CallError(f"unknown test {name!r}: choose {', '.join(get_args(TestName))}")
    if scales is not None:
        scales = tuple(number(scale, "a scale") for scale in np.atleast_1d(np.asarray(scales, dtype=object)))
        if len(scales) > MOST_SCALES:
            raise CallError(f"scales has {len(scales):,} numbers, at most {MOST_SCALES:,} are expected")
        if not scales or min(scales) <= 0:
            raise CallError(f"scales is {list(scales)}: numbers above 0 are expected")
        if max(scales) > MOST_SCALE:
            raise CallError(f"a scale is {max(scales):g}: at most {MOST_SCALE:,} is expected")
    try:
        rows, columns = (places, places) if np.ndim(places) == 0 else places
    except (TypeError, ValueError):
        raise CallError(f"places is {places!r}: rows and columns are expected, as (7, 7)") from None
    grid = at_least(2, rows, "places"), at_least(2, columns, "places")
    if max(grid) > MOST_PLACES:
        raise CallError(f"places is {_short(places)}: at most {MOST_PLACES} rows and columns are expected")
    scale = number(location_scale, "location_scale")
    if scale > MOST_SCALE:
        raise CallError(f"location_scale is {scale:g}: at most {MOST_SCALE:,} is expected")
    if scale <= 0:
        raise CallError(f"location_scale is {location_scale!r}: a number above 0 is expected")
    return ExperimentPlan(names, scales, grid, scale)


def _short(value: Any) -> str:
    """A value in a message, however many digits it has."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no more than 4,300 digits
        return "a very large number"
    return text if len(text) <= 40 else f"{text[:40]}…"


def planned(stage: Stage, seen_box: Arena, tests: ExperimentPlan) -> list[EditedImage]:
    """The original and every composite of the tests, in the order of tables and figures."""
    made = [EditedImage("original", _home(stage), test="original")]
    for name in stage.outlines:
        if "size" in tests.names:
            made += _sizes(stage, seen_box, name, tests.scales)
    for name in stage.outlines:
        if "location" in tests.names:
            made += _locations(stage, seen_box, name, tests, _others(stage, name), "")
    if "split" in tests.names:
        made += _split(stage, seen_box)
    if "controls" in tests.names:
        for name in stage.outlines:
            made += _controls(stage, seen_box, name, tests)
        if tests.can_be_neutral:
            made.append(EditedImage("positions neutral", _home(stage), neutral=True, test="controls"))
    return made


def _home(stage: Stage) -> tuple[Placement, ...]:
    return tuple(Placement(name) for name in stage.outlines)


def _others(stage: Stage, *names: str) -> tuple[Placement, ...]:
    return tuple(Placement(name) for name in stage.outlines if name not in names)


def _sizes(stage: Stage, seen_box: Arena, name: str, scales: Sequence[float] | None) -> Iterator[EditedImage]:
    """The object about its own centre, smaller and larger, in front of the others."""
    for scale in SCALES if scales is None else scales:
        composite = EditedImage(
            f"{name} × {scale:g}", (*_others(stage, name), Placement(name, scale=scale)), test="size", subject=name
        )
        if scales is None and not _fits(stage, seen_box, name, scale):
            continue
        yield composite


def _fits(stage: Stage, seen_box: Arena, name: str, scale: float) -> bool:
    """Whether an object about its own centre can be seen whole; as it is it may always stay."""
    width, height = stage.size_of(name, scale)
    x, y = stage.known(name).centre
    inside = x - width / 2 >= seen_box[0] and x + width / 2 <= seen_box[2]
    inside = inside and y - height / 2 >= seen_box[1] and y + height / 2 <= seen_box[3]
    return scale == 1.0 or (inside and min(width * stage.factor[0], height * stage.factor[1]) >= 4)


def _locations(
    stage: Stage, seen_box: Arena, name: str, tests: ExperimentPlan, others: tuple[Placement, ...], setting: str
) -> Iterator[EditedImage]:
    """The object at every place of a grid, from edge to edge of what the model sees."""
    ys, xs = places(stage, seen_box, name, tests)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            yield EditedImage(
                f"{name} at ({row}, {column}){setting}",
                (*others, Placement(name, (x, y), tests.location_scale)),
                test="location",
                subject=name,
                place=(row, column),
            )


def places(stage: Stage, seen_box: Arena, name: str, tests: ExperimentPlan) -> tuple[list[float], list[float]]:
    """The y of each row and the x of each column of the location grid, in pixels of the photo.

    Raises:
        CallError: the object does not fit what the model sees, or cannot move in it.
    """
    width, height = stage.size_of(name, tests.location_scale)
    room = (seen_box[2] - seen_box[0] - width, seen_box[3] - seen_box[1] - height)
    if min(room) < -0.5 or max(room) < 1:
        most = min((seen_box[2] - seen_box[0]) / width, (seen_box[3] - seen_box[1]) / height) * tests.location_scale
        raise CallError(
            f"{name} at scale {tests.location_scale:g} is {width:.0f}×{height:.0f} pixels, the model "
            f"sees {seen_box[2] - seen_box[0]:.0f}×{seen_box[3] - seen_box[1]:.0f}: it cannot be moved; pass a "
            f"location_scale well below {most:.2f}"
        )
    return (
        _line(seen_box[1] + height / 2, room[1], tests.places[0]),
        _line(seen_box[0] + width / 2, room[0], tests.places[1]),
    )


def _line(start: float, room: float, count: int) -> list[float]:
    """So many places from the first to the last, no nearer than a pixel to each other; one where there is no room."""
    count = min(count, int(room) + 1)
    return [start + room / 2] if count < 2 else (start + np.linspace(0, room, count)).tolist()


def _split(stage: Stage, seen_box: Arena) -> Iterator[EditedImage]:
    names = list(stage.outlines)
    for one, other in combinations(names, 2):
        yield _apart(stage, seen_box, one, other)
        yield _exchanged(stage, seen_box, one, other)
    for name in names:
        yield EditedImage(
            f"{name} mirrored",
            tuple(Placement(one, mirrored=one == name) for one in names),
            test="split",
            subject=name,
        )
    for name in names:
        yield EditedImage(f"{name} left out", _others(stage, name), test="split", subject=name)


def _exchanged(stage: Stage, seen_box: Arena, one: str, other: str) -> EditedImage:
    """Each where the other was, or as near as it can be seen whole; both smaller where one cannot."""
    room = (seen_box[2] - seen_box[0], seen_box[3] - seen_box[1])
    scale = min(1.0, *(of / side for name in (one, other) for of, side in zip(room, stage.size_of(name), strict=True)))
    shown = [_moved(stage, seen_box, a, stage.known(b).centre, scale) for a, b in ((one, other), (other, one))]
    return EditedImage(
        f"{one} and {other} exchanged{_smaller(scale)}", (*_others(stage, one, other), *shown), test="split"
    )


def _smaller(scale: float) -> str:
    return "" if scale == 1 else f" × {scale:.2f}"


def _moved(stage: Stage, seen_box: Arena, name: str, to: tuple[float, float], scale: float) -> Placement:
    """The object as near to a place as it fits."""
    half = [side / 2 for side in stage.size_of(name, scale)]
    x, y = (min(max(to[axis], seen_box[axis] + half[axis]), seen_box[axis + 2] - half[axis]) for axis in (0, 1))
    return Placement(name, (x, y), scale)


def _apart(stage: Stage, seen_box: Arena, one: str, other: str) -> EditedImage:
    """Two objects at opposite edges, along the side with more room; both smaller where they do not fit."""
    sizes, room = (
        (stage.size_of(one), stage.size_of(other)),
        (seen_box[2] - seen_box[0], seen_box[3] - seen_box[1]),
    )
    fits = [APART * room[axis] / (sizes[0][axis] + sizes[1][axis]) for axis in (0, 1)]
    # Neither may reach beyond the edges along the other side.
    crosswise = [room[1 - axis] / max(sizes[0][1 - axis], sizes[1][1 - axis]) for axis in (0, 1)]
    shared = [min(1.0, fit, cross) for fit, cross in zip(fits, crosswise, strict=True)]
    axis = max((0, 1), key=lambda at: (shared[at], fits[at]))
    scale = shared[axis]
    first, second = sorted((one, other), key=lambda name: stage.known(name).centre[axis])
    shown = []
    for name, edge in ((first, seen_box[axis]), (second, seen_box[axis + 2])):
        half = [side * scale / 2 for side in stage.size_of(name)]
        inward = half[axis] if name == first else -half[axis]
        centre = list(stage.known(name).centre)
        centre[axis] = edge + inward
        across = 1 - axis
        centre[across] = min(max(centre[across], seen_box[across] + half[across]), seen_box[across + 2] - half[across])
        shown.append(Placement(name, (centre[0], centre[1]), scale))
    return EditedImage(f"{one} and {other} apart{_smaller(scale)}", (*_others(stage, one, other), *shown), test="split")


def _controls(stage: Stage, seen_box: Arena, name: str, tests: ExperimentPlan) -> Iterator[EditedImage]:
    """The object by itself: on its own background and on others, at its place and at every place of the grid."""
    alone = EditedImage(f"{name} alone", (Placement(name),), test="controls", subject=name)
    yield alone
    for setting in SETTINGS:
        shown = "another" if setting == "other" else setting
        yield replace(alone, name=f"{name} on {shown} background", background=setting)
    yield EditedImage(f"no {name}", _others(stage, name), test="controls", subject=name)
    for setting, neutral in (("own", False), ("blank", False), ("blank", True)):
        if neutral and not tests.can_be_neutral:
            continue
        words = " alone" if setting == "own" else ", blank, positions neutral" if neutral else ", blank"
        for composite in _locations(stage, seen_box, name, tests, (), words):
            yield replace(composite, test="controls", background=setting, neutral=neutral)


def check_names(composites: Sequence[EditedImage]) -> None:
    """Refuse two of one name: they are asked for by name."""
    twice = [name for first, name in pairwise(sorted(one.name for one in composites)) if first == name]
    if twice:
        raise CallError(f"two composites are called {twice[0]!r}: give each a name of its own")

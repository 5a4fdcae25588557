"""Scenes of composites: the plate of images with their classes, maps by place, curves by size, effects."""

import math
from collections.abc import Sequence

import numpy as np

from vitscope.compositing.effects import Effect
from vitscope.compositing.result import Composition, Ranked
from vitscope.images.image import InputImage
from vitscope.results.attribution import Attribution
from vitscope.views.scene import Bars, Curves, Panel, Row, Scene, Shown, wrapped

COLUMNS = 6
WIDTH = 1.95  # inches of an image on the plate: room for the classes under it
MAP = 3.95  # inches of a location map
LETTERS = 27  # that fit above an image of the plate
MAPS = 5  # location maps and curves to a row
EXTREMES = 3  # places shown where the answer is highest, and as many where it is lowest
SETTINGS = (
    ("own", False, "its own background"),
    ("blank", False, "blank"),
    ("blank", True, "blank, positions neutral"),
)


def plate(result: Composition) -> Scene:
    """The composites with their likeliest classes, and under each where the model looked, if that was kept."""
    rows: list[Row] = []
    numbers = on_plate(result)
    columns = math.ceil(len(numbers) / math.ceil(len(numbers) / COLUMNS))  # no row of one image after full ones
    for start in range(0, len(numbers), columns):
        rows += _images(result, numbers[start : start + columns])
    made = result.provenance["parameters"]
    return Scene(
        rows=rows,
        title=f"What {result.provenance['model']} says when objects are moved",
        note=(
            f"{' and '.join(result.outlines)}; holes filled: {made['fill']}; changes against the original in "
            f"{_unit(result)}; of {len(result)} images these"
        ),
        caption="colours: each rollout from its lowest to its highest value" if result.rollouts is not None else "",
    )


def places_and_sizes(results: Sequence[Composition], targets: Sequence[int | str | None] = (None,)) -> Scene:
    """Location maps over the photo and size curves, a row for each model; the colours are the same in all maps.

    Args:
        targets: the classes, each with every object; None: the class of the object.
    """
    maps = [
        [(name, result.location_map(name, target)) for name in result.tested("location") for target in targets]
        for result in results
    ]
    limits = _limits([found for row in maps for _, found in row])
    rows = []
    for result, found in zip(results, maps, strict=True):
        panels: list[Shown] = [
            _map_panel(
                one, limits, f"{_known(result, len(results))}{_short(one.target)} by the place of {name}", result
            )
            for name, one in found
        ]
        rows.append([*panels, *_curves(result, targets, len(results))])
    widest = max(map(len, rows))
    return Scene(
        rows=[part for row in rows for part in wrapped(row, min(max(widest, 2), MAPS))],
        title=f"{_what(results[0])} by place and by size",
        note="maps: a cell is where the middle of the object's box was put; grey: it does not fit; ×: where it stood",
        caption=_scale(limits, results[0]) if limits else "",
    )


def controls(results: Sequence[Composition], found: Sequence[Effect], target: int | str | None = None) -> Scene:
    """The first image's maps over its own and a blank background and with positions neutral, and the effects."""
    result = results[0]
    settings = [
        (background, neutral, words)
        for background, neutral, words in SETTINGS
        if result.select("controls", background=background, neutral=neutral, placed=True)
    ]
    maps = {
        name: [
            result.location_map(name, target, test="controls", background=background, neutral=neutral)
            for background, neutral, _ in settings
        ]
        for name in result.tested("controls")
    }
    limits = _limits([one for row in maps.values() for one in row])
    rows: list[Row] = []
    for name, row in maps.items():
        rows += _images(result, on_controls(result, name))
        panels = [
            _map_panel(one, limits, f"{_short(one.target)} by place, {words}", result)
            for one, (_, _, words) in zip(row, settings, strict=True)
        ]
        rows.append(Row(panels, len(panels), MAP))
    sure = f"{100 * found[0].confidence:g} % intervals" if found else ""
    several = f", {len(results)} images, {sure}" if len(results) > 1 else ", this image"
    bars = Bars(
        [one.name for one in found],
        [one.mean for one in found],
        None if any(one.interval is None for one in found) else [one.interval for one in found if one.interval],
        f"what is owed to what{several}",
    )
    return Scene(
        rows=[*rows, Row([bars], 1, 2 * MAP)],
        title=f"Object, place, background and positions: controls of {result.provenance['model']}",
        note="each object alone; place: at the centre less at the rim; ×: where it was",
        caption=_scale(limits, result) if limits else "",
    )


def change(ranked: Ranked, output: str) -> str:
    """A change as people read it: a sign, a number, an arrow; no colour is needed."""
    by = ranked.change * (100 if output == "probability" else 1)
    digits = 1 if output == "probability" else 2
    if round(abs(by), digits) == 0:
        return "="
    return f"{'▲+' if by > 0 else '▼−'}{abs(by):.{digits}f}"


def answer(value: float, output: str, *, unit: bool = True) -> str:
    """An answer as people read it, with its unit or without."""
    return f"{100 * value:.1f}{' %' if unit else ''}" if output == "probability" else f"{value:.2f}"


def extremes(result: Composition, name: str) -> list[int]:
    """The places of an object where the answer for its class is highest, and those where it is lowest."""
    column = result.column(None, name)
    found = [at for at in result.select("location", name) if not np.isnan(result.outputs[at, column])]
    ranked = sorted(found, key=lambda at: -result.outputs[at, column])
    return ranked if len(ranked) <= 2 * EXTREMES else [*ranked[:EXTREMES], *ranked[-EXTREMES:]]


def on_plate(result: Composition) -> list[int]:
    """The original, then all but the controls and the places, of which only the extremes are shown."""
    placed = [at for name in result.tested("location") for at in extremes(result, name)]
    kinds = ("original", "free", "size", "split")
    # At scale 1 an object of the size test is the original again.
    same = [at for at in result.select("size") if result.composites[at].show[-1].scale == 1.0]
    return [*(at for at in result.asked if result.composites[at].test in kinds and at not in same), *placed]


def on_controls(result: Composition, name: str) -> list[int]:
    """The images of an object's controls, without its places."""
    return [at for at in result.select("controls", name, placed=False) if at in result.asked]


def _images(result: Composition, numbers: Sequence[int]) -> list[Row]:
    """A row of the plate, and under it the row of where the model looked."""
    rows = [Row([_panel(result, at) for at in numbers], len(numbers), WIDTH)]
    if result.rollouts is not None:
        rows.append(Row([_rollout(result, at) for at in numbers], len(numbers), WIDTH))
    return rows


def _panel(result: Composition, at: int) -> Panel:
    lines = [
        f"{_short(one.label)} {answer(one.value, result.output)}" + (f"  {change(one, result.output)}" if at else "")
        for one in result.ranking(at).classes
    ]
    return Panel(_whole(result.shown(at)), title=_clipped(result.composites[at].name), lines=lines)


def _rollout(result: Composition, at: int) -> Panel:
    assert result.rollouts is not None
    shown = {placed.name for placed in result.composites[at].show}
    looked = [(name, *result.looked(at, name)) for name in result.outlines if name in shown]
    lines = [f"on {name} {100 * share:.0f} % (covers {100 * area:.0f} %)" for name, share, area in looked]
    return Panel(result.shown(at), result.rollouts[at], "looked at", lines=lines)


def _whole(image: InputImage) -> InputImage:
    return InputImage(image.photo, (0.0, 0.0, float(image.photo.width), float(image.photo.height)))


def _map_panel(found: Attribution, limits: tuple[float, float] | None, title: str, result: Composition) -> Panel:
    low, high = float(found.values.min()), float(found.values.max())
    original = result.outputs[0, found.provenance["class_index"]]
    lines = [
        f"{answer(low, result.output)} to {answer(high, result.output)}",
        f"original: {answer(float(original), result.output)}",
    ]
    values, name = found.values[0].cpu().numpy(), str(found.provenance["object"])
    left, top, right, bottom = found.images[0].box
    x, y = result.outlines[name].centre
    was = ((y - top) / (bottom - top) * len(values) - 0.5, (x - left) / (right - left) * values.shape[1] - 0.5, "×")
    frame = np.zeros(values.shape, dtype=int)
    return Panel(found.images[0], values, title, 0.7, frame, flat=True, limits=limits, lines=lines, numbers=[was])


def _limits(maps: Sequence[Attribution]) -> tuple[float, float] | None:
    """The lowest and the highest value of all maps."""
    if not maps:
        return None
    return min(float(one.values.min()) for one in maps), max(float(one.values.max()) for one in maps)


def _curves(result: Composition, targets: Sequence[int | str | None], models: int) -> list[Curves]:
    curves = [result.size_curve(name, target) for name in result.tested("size") for target in targets]
    if not curves:
        return []
    names = [f"{_short(one.target)}, {one.name} scaled" for one in curves]
    return [
        Curves(
            names,
            [one.areas.tolist() for one in curves],
            [one.values.tolist() for one in curves],
            f"{_known(result, models)}{_what(result).lower()} by size",
            "area of the object, share of the photo",
            (0.0, 1.0) if result.output == "probability" else None,
            result.output == "probability",
        )
    ]


def _known(result: Composition, models: int) -> str:
    return f"{result.provenance['model']}: " if models > 1 else ""


def _what(result: Composition) -> str:
    return {
        "probability": "Probability",
        "logit": "Logit",
        "value": "Value",
        "similarity": "Similarity to the original",
    }[result.output]


def _unit(result: Composition) -> str:
    return "percentage points" if result.output == "probability" else result.output


def _scale(limits: tuple[float, float], result: Composition) -> str:
    low, high = (answer(end, result.output) for end in limits)
    return f"colours: {_what(result).lower()} from {low} to {high}, the same in all maps"


def _clipped(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def _short(label: str | None) -> str:
    """A label as people say it: the first of its synonyms."""
    return (label or "").split(",")[0]

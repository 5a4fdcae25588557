"""Scenes of compositions: the plate of edited images, location maps, size curves, and effects."""

import math
from collections.abc import Sequence

import numpy as np

from vitscope.compositing.effects import Effect
from vitscope.compositing.ranking import Ranked
from vitscope.compositing.result import Composition
from vitscope.results.attribution import Attribution
from vitscope.typing import ClassTarget
from vitscope.views.key_images import key_images, left_out
from vitscope.views.scene import AnyPanel, Bars, Curves, Panel, Row, Scene, rows_of, short_label

COLUMNS = 6
WIDTH = 1.95  # inches of an image on the plate: wide enough for the classes under it
MAP_WIDTH = 3.95  # inches of a location map
TEXT_HEIGHT = 0.75  # inches above and below an image: title, classes or shares of the rollout
PAGE_RATIO = 1.4  # height to width of the largest plate
MAX_IMAGES = 18  # of a plate
TITLE_LENGTH = 27  # letters that fit above an image of the plate
MAP_COLUMNS = 5  # location maps and curves per row
EXTREMES = 3  # number of places shown with the highest outputs, and with the lowest
MAP_OPACITY = 0.7
SETTINGS = (
    ("own", False, "own background"),
    ("blank", False, "blank background"),
    ("blank", True, "blank, neutral positions"),
)

Limits = tuple[float, float]


def plate(result: Composition, *, full: bool = False) -> Scene:
    """Return the edited images with their most probable classes, each above its rollout if rollouts were kept.

    Args:
        result: the composition.
        full: show all images but places and controls, not only as many as fit on a page.
    """
    choices = on_plate(result)
    indices = choices if full else key_images(result, choices, _count_of_a_page(result))
    columns = math.ceil(len(indices) / math.ceil(len(indices) / COLUMNS))  # avoids a last row of a single image
    rows: list[Row] = []
    for start in range(0, len(indices), columns):
        rows += _image_rows(result, indices[start : start + columns])
    parameters, skipped = result.provenance["parameters"], left_out(result, choices, indices)
    return Scene(
        rows=rows,
        title=f"Outputs of {result.provenance['model']} for edited images",
        note=(
            f"objects: {' and '.join(result.objects)}; fill: {parameters['fill']}; changes from the "
            f"original in {_unit(result)}; {len(indices)} of {len(result)} images shown"
            f"{f': key steps and largest changes, without {skipped}' if skipped else ''}"
        ),
        caption="colours: each rollout from its lowest to its highest value" if result.rollouts is not None else "",
    )


def _count_of_a_page(result: Composition) -> int:
    """Return the number of images on a plate of about the proportions of a page, whole rows of them."""
    left, top, right, bottom = result.original.box
    height = WIDTH * (bottom - top) / (right - left) + TEXT_HEIGHT
    rows = int(PAGE_RATIO * COLUMNS * WIDTH / (height if result.rollouts is None else 2 * height))
    return min(max(rows, 1) * COLUMNS, MAX_IMAGES)


def places_and_sizes(results: Sequence[Composition], targets: Sequence[ClassTarget | None] = (None,)) -> Scene:
    """Return location maps over the photo and size curves, a row for each model; all maps share one colour scale.

    Args:
        results: one for each model.
        targets: the classes, each shown with every object; None: the class of the object.
    """
    maps = [
        [result.location_map(name, target) for name in result.tested("location") for target in targets]
        for result in results
    ]
    limits = _limits([location_map for row in maps for location_map in row])
    rows = []
    for result, row in zip(results, maps, strict=True):
        prefix = _model_prefix(result, len(results))
        panels: list[AnyPanel] = []
        for location_map in row:
            title = f"{prefix}{short_label(location_map.target)}, by place of {location_map.provenance['object']}"
            panels.append(_map_panel(location_map, limits, title, result))
        rows.append([*panels, *_curves(result, targets, prefix)])
    columns = min(max(*map(len, rows), 2), MAP_COLUMNS)
    return Scene(
        rows=[line for row in rows for line in rows_of(row, columns)],
        title=f"{_noun(results[0])} by place and by size",
        note="maps: one cell per place of the object's centre; grey: the object does not fit; ×: its original centre",
        caption=_limits_caption(limits, maps[0][0], results[0]) if limits else "",
    )


def controls(results: Sequence[Composition], effects: Sequence[Effect], target: ClassTarget | None = None) -> Scene:
    """Return the images and location maps of the first result's controls, and the effects of all results."""
    result = results[0]
    settings = [
        (background, neutral, description)
        for background, neutral, description in SETTINGS
        if result.select("controls", background=background, neutral=neutral, placed=True)
    ]
    maps = {
        name: [
            result.location_map(name, target, test="controls", background=background, neutral=neutral)
            for background, neutral, _ in settings
        ]
        for name in result.tested("controls")
    }
    limits = _limits([location_map for row in maps.values() for location_map in row])
    rows: list[Row] = []
    for name, row in maps.items():
        rows += _image_rows(result, on_controls(result, name))
        panels = [
            _map_panel(location_map, limits, f"{short_label(location_map.target)} by place, {description}", result)
            for location_map, (_, _, description) in zip(row, settings, strict=True)
        ]
        rows.append(Row(panels, len(panels), MAP_WIDTH))
    return Scene(
        rows=[*rows, Row([_effect_bars(effects, len(results), _noun(result).lower())], 1, 2 * MAP_WIDTH)],
        title=f"Effects of object, place, background and positions on {result.provenance['model']}",
        note="maps: each object alone; ×: its original centre; place: output at the centre minus output at the rim",
        caption=_limits_caption(limits, next(iter(maps.values()))[0], result) if limits else "",
    )


def _effect_bars(effects: Sequence[Effect], images: int, noun: str) -> Bars:
    """Return a bar for each effect, with its interval if there are several images."""
    intervals = [effect.interval for effect in effects if effect.interval is not None]
    confidence = f", {100 * effects[0].confidence:g} % intervals" if effects else ""
    return Bars(
        [effect.name for effect in effects],
        [effect.mean for effect in effects],
        intervals if len(intervals) == len(effects) else None,
        f"effects on the {noun}, {images} images{confidence}" if images > 1 else f"effects on the {noun}, this image",
    )


def change(ranked: Ranked, output: str) -> str:
    """Return the change of a class as text: an arrow, a sign and a number."""
    difference = ranked.change * (100 if output == "probability" else 1)
    digits = 1 if output == "probability" else 2
    if round(abs(difference), digits) == 0:
        return "="
    return f"{'▲+' if difference > 0 else '▼−'}{abs(difference):.{digits}f}"


def format_output(value: float, output: str, *, unit: bool = True) -> str:
    """Return an output as text, with its unit or without."""
    return f"{100 * value:.1f}{' %' if unit else ''}" if output == "probability" else f"{value:.2f}"


def extremes(result: Composition, name: str) -> list[int]:
    """Return the indices of the places of an object with the highest and the lowest output for its class."""
    outputs = result.outputs[:, result.column(None, name)]
    evaluated = [index for index in result.select("location", name) if not np.isnan(outputs[index])]
    ranked = sorted(evaluated, key=lambda index: -outputs[index])
    return ranked if len(ranked) <= 2 * EXTREMES else [*ranked[:EXTREMES], *ranked[-EXTREMES:]]


def on_plate(result: Composition) -> list[int]:
    """Return the indices of the original and all other images, without controls and with only the extreme places."""
    placed = [index for name in result.tested("location") for index in extremes(result, name)]
    tests = ("original", "free", "size", "split")
    # At scale 1 an image of the size test is the original again.
    duplicates = [index for index in result.select("size") if result.edited_images[index].show[-1].scale == 1.0]
    chosen = [index for index in result.evaluated if result.edited_images[index].test in tests]
    return [*(index for index in chosen if index not in duplicates), *placed]


def on_controls(result: Composition, name: str) -> list[int]:
    """Return the indices of an object's controls that are not on the location grid."""
    return [index for index in result.select("controls", name, placed=False) if index in result.evaluated]


def _image_rows(result: Composition, indices: Sequence[int]) -> list[Row]:
    """Return a row of edited images, and a row of their rollouts if these were kept."""
    rows = [Row([_image_panel(result, index) for index in indices], len(indices), WIDTH)]
    if result.rollouts is not None:
        rows.append(Row([_rollout_panel(result, index) for index in indices], len(indices), WIDTH))
    return rows


def _image_panel(result: Composition, index: int) -> Panel:
    lines = []
    for ranked in result.ranking(index).classes:
        line = f"{short_label(ranked.label)} {format_output(ranked.value, result.output)}"
        lines.append(f"{line}  {change(ranked, result.output)}" if index else line)
    return Panel(result.view_of(index).uncropped(), title=_clipped(result.edited_images[index].name), lines=lines)


def _rollout_panel(result: Composition, index: int) -> Panel:
    assert result.rollouts is not None
    visible = {placement.name for placement in result.edited_images[index].show}
    lines = []
    for name in result.objects:
        if name in visible:
            mass, area = result.rollout_mass(index, name)
            lines.append(f"{100 * mass:.0f} % on {name} ({100 * area:.0f} % of the area)")
    return Panel(result.view_of(index), result.rollouts[index], "rollout", lines=lines)


def _map_panel(location_map: Attribution, limits: Limits | None, title: str, result: Composition) -> Panel:
    """Return a location map over the photo, with a × at the original centre of the object."""
    low, high = float(location_map.values.min()), float(location_map.values.max())
    column = location_map.provenance["class_index"]
    original, output = result.outputs[0, column], result.output_of(column)
    lines = [
        f"{format_output(low, output)} to {format_output(high, output)}",
        f"original: {format_output(float(original), output)}",
    ]
    image, values = location_map.images[0], location_map.values[0].cpu().numpy()
    height, width = values.shape
    left, top, right, bottom = image.box
    x, y = result.objects[str(location_map.provenance["object"])].centre
    mark = ((y - top) / (bottom - top) * height - 0.5, (x - left) / (right - left) * width - 0.5, "×")
    frame = np.zeros(values.shape, dtype=int)
    return Panel(
        image,
        values,
        title,
        MAP_OPACITY,
        frame,
        flat=True,
        limits=limits,
        lines=lines,
        numbers=[mark],
        outline="plain",
    )


def _limits(maps: Sequence[Attribution]) -> Limits | None:
    """Return the lowest and the highest value of all maps."""
    if not maps:
        return None
    return (
        min(float(location_map.values.min()) for location_map in maps),
        max(float(location_map.values.max()) for location_map in maps),
    )


def _curves(result: Composition, targets: Sequence[ClassTarget | None], prefix: str) -> list[Curves]:
    """Return the size curves of all objects and classes in one panel."""
    pairs = [(name, target) for name in result.tested("size") for target in targets]
    curves = [result.size_curve(name, target) for name, target in pairs]
    percent = all(result.output_of(result.column(target, name)) == "probability" for name, target in pairs)
    contrasts = any(bool((curve.values < 0).any()) for curve in curves)
    if not curves:
        return []
    return [
        Curves(
            [f"{short_label(curve.target)}, by size of {curve.name}" for curve in curves],
            [curve.areas.tolist() for curve in curves],
            [curve.values.tolist() for curve in curves],
            f"{prefix}{_noun(result).lower()} by size",
            "object's share of the photo area",
            (0.0, 1.0) if percent and not contrasts else None,
            percent,
        )
    ]


def _model_prefix(result: Composition, models: int) -> str:
    """Return the name of the model for a title, if there are several models."""
    return f"{result.provenance['model']}: " if models > 1 else ""


def _noun(result: Composition) -> str:
    """Return the kind of the outputs, for a title."""
    return {
        "probability": "Probability",
        "log_probability": "Log-probability",
        "logit": "Logit",
        "log_odds": "Log-odds",
        "value": "Value",
        "similarity": "Similarity to the original",
    }[result.output]


def _unit(result: Composition) -> str:
    return "percentage points" if result.output == "probability" else result.output


def _limits_caption(limits: Limits, location_map: Attribution, result: Composition) -> str:
    output = result.output_of(location_map.provenance["class_index"])
    low, high = (format_output(limit, output) for limit in limits)
    return f"colours: {_noun(result).lower()} from {low} to {high}, the same in all maps"


def _clipped(text: str) -> str:
    return text if len(text) <= TITLE_LENGTH else f"{text[: TITLE_LENGTH - 1]}…"

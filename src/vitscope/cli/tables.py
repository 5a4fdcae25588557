"""Printed output of commands: classes, segments, agreement and effects."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitscope.cli.terminal import say
from vitscope.views.numbers import percentage
from vitscope.views.plain_text import visible

if TYPE_CHECKING:
    from vitscope.compositing.effects import Effect
    from vitscope.compositing.result import Composition
    from vitscope.compositing.stage import EditedImage
    from vitscope.methods.head_importance import HeadImportance
    from vitscope.metrics.agreement import Agreement
    from vitscope.models import Prediction, VisionModel
    from vitscope.results.segment_attribution import SegmentAttribution

WIDE = 120  # columns of a terminal that has room for explanations
PAIRED = 5  # results whose agreement is printed by pair
MAX_LINES = 25  # of the table of edited images
CELL = 6  # columns for a number of a matrix


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[int],
    unbroken: Sequence[int] = (),
    gap: int = 4,
) -> None:
    """Print rows of cells under their header.

    Args:
        header: one name per column.
        rows: one cell per column, as text or as rich's Text.
        right: indices of the columns that are aligned to the right.
        unbroken: indices of the columns whose cells are never cut or broken into lines.
        gap: characters between columns.
    """
    from rich.console import Console

    Console().print(_table(header, rows, right=right, unbroken=unbroken, gap=gap))


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[int],
    unbroken: Sequence[int] = (),
    gap: int = 2,
) -> Any:
    """Return a table for rich; see :func:`print_table`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, gap // 2, 0, gap - gap // 2))
    for column, name in enumerate(header):
        justify: Any = "right" if column in right else "left"
        table.add_column(Text(visible(name)), justify=justify, no_wrap=column in unbroken)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row))
    return table


def print_classes(name: str, model: "VisionModel", predictions: Sequence["Prediction"], reason: str = "") -> None:
    """Print the classes of a photo with their probabilities, or with values if the model predicts values.

    Args:
        name: the name of the photo.
        predictions: the most likely classes; empty if there are none.
        reason: why there are no classes.
    """
    say(f"{name}, as {model.name} sees it:")
    if not predictions:
        say(f"  {reason or 'this model has no classifier, so it names no class'}")
        return
    if predictions[0].probability is None:
        rows = [(prediction.label, f"{prediction.value:.4g}") for prediction in predictions]
        print_table(("output", "value"), rows, right=(1,))
    else:
        bars = [(p.label, percentage(p.probability or 0.0), _bar(p)) for p in predictions]
        print_table(("class", "probability", ""), bars, right=(1,))


def _bar(prediction: "Prediction") -> Any:
    from rich.text import Text

    return Text("█" * round((prediction.probability or 0) * 30), "cyan")


def print_segments(result: "SegmentAttribution", count: int) -> None:
    """Print the segments with the largest weights for and against the target, numbered as in the figure.

    Args:
        count: number of segments of each sign.
    """
    from vitscope.views.numbers import signed_number
    from vitscope.views.segments import segment_names

    places = segment_names(result, count)
    segments = result.as_json()["images"][0]["segments"]
    rows = []
    for name, place in places.items():
        row, column = segments[place]["centre"]
        interval = ""
        if result.intervals is not None and result.undecided is not None:
            interval = " to ".join(map(signed_number, result.intervals[place].tolist()))
            interval += ", holds 0" if result.undecided[place] else ""
        centre = f"row {row:.0f}, column {column:.0f}"
        rows.append(
            (name, str(segments[place]["label"]), signed_number(float(result.weights[place])), interval, centre)
        )
    print_table(("", "segment", "weight", "interval", "centre in pixels"), rows, right=(1, 2), gap=2)


def print_heads(name: str, importance: "HeadImportance", count: int) -> None:
    """Print how many heads support and oppose the target, and the most important ones of each.

    Args:
        name: the name of the photo.
        importance: of one image.
        count: number of heads of each sign.
    """
    from vitscope.views.heads import drop_name, explained_output

    values = importance.values[0][importance.values[0].isfinite()]
    supporting, opposing = int((values > 0).sum()), int((values < 0).sum())
    say(
        f"{name}: of {len(values)} heads of {importance.provenance['model']}, {supporting} support "
        f"{explained_output(importance)} and {opposing} oppose it."
    )
    decimals = max(2 - math.floor(math.log10(float(values.abs().max()) or 1.0)), 0)  # three digits of the largest
    rows = [
        (
            verb,
            f"{layer + 1} ({layer})",
            str(head),
            f"{importance.values[0, importance.layers.index(layer), head]:+.{decimals}f}",
        )
        for verb, sign in (("supports", "positive"), ("opposes", "negative"))
        for layer, head in importance.top(count, sign=sign)
    ]
    print_table(("", "layer (index)", "head", drop_name(importance)), rows, right=(1, 2, 3), gap=2)


def print_meanings(meanings: Mapping[str, str]) -> None:
    """Print what each map shows, one sentence per map."""
    width = max(map(len, meanings), default=0)
    for name, meaning in meanings.items():
        say(f"  {name:<{width}}  {meaning}")


def print_agreement(agreement: "Agreement") -> None:
    """Print the rank correlation of each pair, and the overlap of its top regions compared with chance.

    More than five results are printed as a matrix if the terminal is wide enough for it.
    """
    from rich.console import Console

    from vitscope.views.tables import agreement_rows

    count = len(agreement.names)
    width = max(map(len, agreement.names)) + len(str(count)) + 2 + CELL * count
    if count > PAIRED and Console().width >= width:
        _print_agreement_matrix(agreement)
        return
    overlap = f"top {agreement.top:.0%} overlap"
    print_table(("agreement", "rank correlation", overlap, "by chance"), agreement_rows(agreement), right=(1, 2, 3))


def _print_agreement_matrix(agreement: "Agreement") -> None:
    """Print the rank correlations below the diagonal of a matrix, and the overlaps above it."""
    count = len(agreement.names)
    chances = sorted({f"{agreement.chance[i, j]:.0%}" for i in range(count) for j in range(i)}, key=len)
    overlap = f"overlap of the top {agreement.top:.0%} (by chance {' to '.join(chances[:: max(len(chances) - 1, 1)])})"
    say(f"  agreement; below the diagonal: rank correlation; above: {overlap}")
    rows = [
        [
            f"{i + 1:>{len(str(count))}} {name}",
            *(
                ""
                if i == j
                else f"{agreement.rank_correlation[i, j]:+z.2f}"
                if j < i
                else f"{agreement.overlap[i, j]:.0%}"
                for j in range(count)
            ),
        ]
        for i, name in enumerate(agreement.names)
    ]
    header = ["", *(str(number) for number in range(1, count + 1))]
    print_table(header, rows, right=range(1, count + 1), gap=1)


def print_edited_images(result: "Composition", top_k: int, *, full: bool = False) -> None:
    """Print the classes of edited images of the plate and the controls, and their changes from the original.

    Args:
        result: the composition.
        top_k: number of classes.
        full: print all images, not only those that fit into ``MAX_LINES``; the others are counted in a line.
    """
    from rich.console import Console

    from vitscope.views.compositing import format_output, on_controls, on_plate
    from vitscope.views.key_images import key_images, left_out

    neutral = [index for index in result.select("controls", neutral=True, placed=False) if index in result.evaluated]
    controls = [index for name in result.objects for index in on_controls(result, name)]
    images: dict[Any, int] = {}
    for index in [*on_plate(result), *controls, *neutral]:
        image = result.edited_images[index]
        # "no dog" shows the same image as "dog left out".
        images.setdefault((image.show, image.background, image.neutral), index)
    mapped = [
        name for name in result.tested("location") if set(result.select("location", name)) <= set(result.evaluated)
    ]
    choices = list(images.values())
    count, indices, console = len(choices), choices, Console()
    table = _edited_images_table(result, indices, top_k)
    # Of the lines, one names the photo, one is the rest, and one is for each location map.
    while not full and count > 1 and len(console.render_lines(table)) + len(mapped) + 2 > MAX_LINES:
        count -= 1
        indices = key_images(result, choices, count)
        table = _edited_images_table(result, indices, top_k)
    console.print(table)
    if skipped := left_out(result, choices, indices):
        say(f"  … and {skipped}: --full shows all")
    for name in mapped:
        places = result.location_map(name)
        low, high = (format_output(float(end), result.output) for end in (places.values.min(), places.values.max()))
        say(f"  {places.target}, by place of {name}: {low} to {high}")


def _row_name(image: "EditedImage") -> str:
    return image.name.removesuffix(" background")


def _edited_images_table(result: "Composition", indices: Sequence[int], top_k: int) -> Any:
    """Return the table of edited images, with an empty row between tests."""
    from vitscope.views.compositing import change, format_output

    rows: list[list[str]] = []
    test = "original"
    for index in indices:
        image = result.edited_images[index]
        if image.test != test:
            rows.append([])
            test = image.test
        rows.append([_row_name(image)])
        for ranked in result.ranking(index, top_k).classes:
            label = "" if result.output == "similarity" else f"{ranked.label.split(',')[0]} "
            cell = f"{label}{format_output(ranked.value, result.output, unit=False)}"
            rows[-1].append(f"{cell} {change(ranked, result.output)}" if index else cell)
    count = max(map(len, rows))
    ranks = ["1st", "2nd", "3rd", *(f"{rank}th" for rank in range(4, count))][: count - 1]
    ranks = ["similarity"] if result.output == "similarity" else ranks
    unit = ", %" if result.output == "probability" else ""
    return _table(["image", *(f"{rank}{unit}" for rank in ranks)], rows, right=())


def print_effects(effects: Sequence["Effect"], model: str, output: str) -> None:
    """Print each effect with its interval, in percentage points or in the unit of the outputs."""
    from rich.console import Console

    unit = 100 if output == "probability" else 1
    rows = [
        [
            effect.name,
            f"{unit * effect.mean:+.2f}",
            "" if effect.interval is None else "{:+.2f} to {:+.2f}".format(*(unit * end for end in effect.interval)),
            "" if effect.standardized is None else f"{effect.standardized:+.2f}",
            effect.description,
        ]
        for effect in effects
    ]
    header = ["effect", "mean", "95 % interval", "d", "difference"]
    if Console().width < WIDE:  # the descriptions would be broken into many lines
        header, rows = header[:-1], [row[:-1] for row in rows]
    count = len(effects[0].values)
    scale = "percentage points" if output == "probability" else output
    say(f"effects on {model}, {count} image{'s' if count > 1 else ''}, in {scale}:")
    print_table(header, rows, right=(1, 2, 3))

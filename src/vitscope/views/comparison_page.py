"""The report of a comparison: one HTML file with its tables and figures in it, and the figures as PNG beside it."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from string import Template

from matplotlib.backends.backend_agg import FigureCanvasAgg

from vitscope.files import atomic_write
from vitscope.tune.comparison import BASE, Comparison, Summary, plain_name
from vitscope.views import tuning as showing
from vitscope.views.figure import draw
from vitscope.views.scene import Scene

SUMMARY_HEADER = (
    "model", "tuning", "accuracy", "95 % interval", f"gain over {BASE}", "macro F1", "trained", "seconds", "peak MiB",
)  # fmt: skip
ATTENTION_HEADER = (
    "model", "tuning", "attention moved", "rollouts before and after", "deletion (random)", "insertion (random)",
)  # fmt: skip
SUMMARY_NOTE = (
    "<p>Accuracy on the test images, the mean over seeds, with a 95 % interval: Wilson's for one seed, else a "
    "bootstrap over test images and seeds. Gain: percentage points over the classifier alone. Trained: weights that "
    "learned, the classifier's not counted. Seconds are means over seeds.</p>"
)
INTERACTION_NOTE = (
    "<p>The interaction is the gain of one model less the gain of the other, in percentage points. An interval that "
    "holds zero leaves open who gains more.</p>"
)
ATTENTION_NOTE = (
    "<p>Moved: total variation between a query's attention before and after, the mean over layers; 0 is the same, 1 "
    "has nothing in common. Then the correlation of the rollouts of eight test images at most, and the areas under "
    "the curves when patches are deleted (low is good) and inserted (high is good) in the rollout's order, for the "
    "class that the model finds likeliest: before tuning one of its own classes, or how alike its features stay where "
    "it has none.</p>"
)
INTERACTION_HEADER = ("tuning", "who over whom", "points", "95 % interval")


def summary_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each model and tuning, as text."""
    return [_summary_row(one) for one in comparison.summaries()]


def attention_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """For each model a row before tuning and one after each tuning, as text."""
    rows: list[tuple[str, ...]] = []
    for model in comparison.models:
        found = [one for one in comparison.summaries() if one.model == model and one.distances is not None]
        if found and found[0].faithfulness_before is not None:
            rows.append((showing.short_name(model), "before", "", "", *_areas(found[0].faithfulness_before)))
        rows += [
            (
                showing.short_name(model),
                one.tuning,
                "" if one.distances is None else f"{fmean(one.distances):.2f}",
                "" if one.correlation is None else f"{one.correlation:+.2f}",
                *_areas(one.faithfulness_after),
            )
            for one in found
        ]
    return rows


def interaction_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each tuning and each two models, as text."""
    return [
        (
            one.tuning,
            f"{showing.short_name(one.first)} over {showing.short_name(one.second)}",
            f"{100 * one.value:+.1f}",
            f"{100 * one.interval[0]:+.1f} to {100 * one.interval[1]:+.1f}",
        )
        for one in comparison.interactions()
    ]


def write_page(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write ``report.html`` and the figures.

    Raises:
        SaveError: they cannot be written; what stood there is still there.
    """
    folder = Path(folder)
    scenes = _scenes(comparison)
    images = {name: _png(scene) for name, scene in scenes.items()}
    written = []
    for name, image in images.items():
        path = folder / f"{name}.png"
        with atomic_write(path) as beside:
            beside.write_bytes(image)
        written.append(path)
    path = folder / "report.html"
    with atomic_write(path) as beside:
        beside.write_text(_page(comparison, scenes, images), encoding="utf-8")
    return [path, *written]


def _scenes(comparison: Comparison) -> dict[str, Scene]:
    scenes = {
        "accuracy": showing.accuracy_scene(comparison),
        "curves": showing.curves_scene(comparison),
        "confusion": showing.confusion_scene(comparison),
    }
    for model in comparison.models:
        scene = showing.attention_scene(comparison, model)
        if scene is not None:
            scenes[f"attention-{plain_name(showing.short_name(model))}"] = scene
    if comparison.inspection is not None:
        scenes["data"] = showing.data_scene(comparison.inspection)
    return scenes


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(draw(scene)).print_png(file)
    return file.getvalue()


def _page(comparison: Comparison, scenes: Mapping[str, Scene], images: Mapping[str, bytes]) -> str:
    here = files("vitscope.views")
    parts = ["<h2>Accuracy</h2>", _table(SUMMARY_HEADER, summary_rows(comparison)), SUMMARY_NOTE]
    between = interaction_rows(comparison)
    if between:
        parts += ["<h2>Who gains more</h2>", _table(INTERACTION_HEADER, between), INTERACTION_NOTE]
    attention = attention_rows(comparison)
    if attention:
        parts += ["<h2>What it did to the attention</h2>", _table(ATTENTION_HEADER, attention), ATTENTION_NOTE]
    for name, image in images.items():
        encoded = base64.b64encode(image).decode("ascii")
        title = escape(scenes[name].title)
        parts.append(f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{encoded}">')
    recipe = escape(json.dumps(dict(comparison.recipe), indent=1))
    parts += ["<h2>Recipe</h2>", f"<pre>{recipe}</pre>"]
    seeds = sorted({cell.seed for cell in comparison.cells})
    first = comparison.cells[0].about
    note = (
        f"{first['images']['train']:,} training and {first['images']['test']:,} test images, "
        f"{len(comparison.labels)} classes, seeds {', '.join(map(str, seeds))}"
    )
    template = Template((here / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Tuning on {comparison.data}"),
        note=escape(note),
        style=(here / "page.css").read_text(encoding="utf-8"),
        body="\n".join(parts),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{top}</tr>\n{body}\n</table></div>'


def _summary_row(one: Summary) -> tuple[str, ...]:
    gain = "" if one.gain is None else f"{100 * one.gain[0]:+.1f} ({_points(one.gain[1])})"
    return (
        showing.short_name(one.model),
        one.tuning,
        f"{one.accuracy:.1%}",
        f"{one.interval[0]:.1%} to {one.interval[1]:.1%}",
        gain,
        f"{one.macro_f1:.3f}",
        f"{one.trained:,}",
        f"{one.seconds:.0f}",
        f"{one.peak_mib:.0f}",
    )


def _areas(faithful: Mapping[str, float] | None) -> tuple[str, str]:
    """Deletion and insertion, each beside a random order's."""
    if faithful is None:
        return "", ""
    deletion, insertion = (
        f"{faithful[name]:.2f} ({faithful[f'random_{name}']:.2f})" for name in ("deletion", "insertion")
    )
    return deletion, insertion


def _points(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"

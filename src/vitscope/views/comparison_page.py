"""The report of a comparison: one HTML file with its tables and figures, and the figures as PNG files next to it."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import fmean

from vitscope.files import atomic_write
from vitscope.tune.comparison import folder_name
from vitscope.tune.comparison_result import BASE, Comparison, Summary
from vitscope.views.figure import figure_png
from vitscope.views.html_page import html_page, page_table, png_image
from vitscope.views.scene import Scene
from vitscope.views.style import FigureStyle
from vitscope.views.tuning import (
    accuracy_scene,
    attention_scene,
    confusion_scene,
    curves_scene,
    data_scene,
    short_name,
)

SUMMARY_HEADER = (
    "model", "tuning", "accuracy", "95 % interval", f"gain over {BASE}", "macro F1", "trained", "seconds", "peak MiB",
)  # fmt: skip
ATTENTION_HEADER = (
    "model", "tuning", "change of attention", "rollouts before and after", "deletion (random)", "insertion (random)",
)  # fmt: skip
SUMMARY_NOTE = (
    "<p>Accuracy on the test images, averaged over seeds, with a 95 % interval: Wilson's for one seed, otherwise a "
    "bootstrap over test images and seeds. Gain: percentage points over tuning the classifier alone. Trained: number "
    "of weights that learned, without the classifier's. Seconds are averaged over seeds.</p>"
)
INTERACTION_NOTE = (
    "<p>The interaction is the gain of one model minus the gain of the other, in percentage points. If the interval "
    "contains zero, the difference is not significant.</p>"
)
ATTENTION_NOTE = (
    "<p>Change of attention: total variation between a query's attention before and after tuning, averaged over "
    "layers; 0 is identical, 1 is disjoint. The next columns are based on at most eight test images: the correlation "
    "of the rollouts before and after, and the areas under the curves when patches are deleted (low is good) and "
    "inserted (high is good) in the order of the rollout. The areas for a random order are in brackets. The curves "
    "follow the most probable class of the model. Before tuning, this is one of its original classes, or the "
    "similarity of its features if it has no classes.</p>"
)
INTERACTION_HEADER = ("tuning", "comparison", "points", "95 % interval")


def summary_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return one row of text per model and tuning method."""
    return [_summary_row(summary) for summary in comparison.summaries()]


def attention_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return one row of text per model before tuning, and one per tuning method after it."""
    rows: list[tuple[str, ...]] = []
    for model in comparison.models:
        summaries = [
            summary for summary in comparison.summaries() if summary.model == model and summary.distances is not None
        ]
        if summaries and summaries[0].faithfulness_before is not None:
            rows.append((short_name(model), "before", "", "", *_area_cells(summaries[0].faithfulness_before)))
        rows += [
            (
                short_name(model),
                summary.tuning,
                "" if summary.distances is None else f"{fmean(summary.distances):.2f}",
                "" if summary.correlation is None else f"{summary.correlation:+.2f}",
                *_area_cells(summary.faithfulness_after),
            )
            for summary in summaries
        ]
    return rows


def interaction_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return one row of text per tuning method and pair of models."""
    return [
        (
            interaction.tuning,
            f"{short_name(interaction.first)} over {short_name(interaction.second)}",
            f"{100 * interaction.value:+.1f}",
            _points(interaction.interval),
        )
        for interaction in comparison.interactions()
    ]


def write_page(comparison: Comparison, folder: str | Path, style: FigureStyle | None = None) -> list[Path]:
    """Write ``report.html`` and the figures, and return their paths.

    Raises:
        SaveError: a file cannot be written; an older one is not changed.
    """
    folder = Path(folder)
    scenes = _scenes(comparison)
    images = {name: figure_png(scene, style) for name, scene in scenes.items()}
    paths = []
    for name, image in images.items():
        path = folder / f"{name}.png"
        with atomic_write(path) as temporary:
            temporary.write_bytes(image)
        paths.append(path)
    page = folder / "report.html"
    with atomic_write(page) as temporary:
        temporary.write_text(_page(comparison, scenes, images), encoding="utf-8")
    return [page, *paths]


def _scenes(comparison: Comparison) -> dict[str, Scene]:
    """Return the figures by the names of their files."""
    scenes = {
        "accuracy": accuracy_scene(comparison),
        "curves": curves_scene(comparison),
        "confusion": confusion_scene(comparison),
    }
    for model in comparison.models:
        scene = attention_scene(comparison, model)
        if scene is not None:
            scenes[f"attention-{folder_name(short_name(model))}"] = scene
    if comparison.data_check is not None:
        scenes["data"] = data_scene(comparison.data_check)
    return scenes


def _page(comparison: Comparison, scenes: Mapping[str, Scene], images: Mapping[str, bytes]) -> str:
    """Return the HTML of the report."""
    sections = ["<h2>Accuracy</h2>", page_table(SUMMARY_HEADER, summary_rows(comparison)), SUMMARY_NOTE]
    interactions = interaction_rows(comparison)
    if interactions:
        sections += ["<h2>Interactions</h2>", page_table(INTERACTION_HEADER, interactions), INTERACTION_NOTE]
    attention = attention_rows(comparison)
    if attention:
        sections += [
            "<h2>Attention before and after tuning</h2>",
            page_table(ATTENTION_HEADER, attention),
            ATTENTION_NOTE,
        ]
    for name, image in images.items():
        title = scenes[name].title
        sections.append(f"<h2>{escape(title)}</h2>\n{png_image(image, title)}")
    recipe = escape(json.dumps(dict(comparison.recipe), indent=1))
    sections += ["<h2>Recipe</h2>", f"<pre>{recipe}</pre>"]
    seeds = sorted({cell.seed for cell in comparison.cells})
    counts = comparison.cells[0].record["images"]
    note = (
        f"{counts['train']:,} training and {counts['test']:,} test images, {len(comparison.labels)} classes, seeds "
        f"{', '.join(map(str, seeds))}"
    )
    return html_page(f"Fine-tuning on {comparison.data}", note, sections)


def _summary_row(summary: Summary) -> tuple[str, ...]:
    gain = "" if summary.gain is None else f"{100 * summary.gain[0]:+.1f} ({_points(summary.gain[1])})"
    return (
        short_name(summary.model),
        summary.tuning,
        f"{summary.accuracy:.1%}",
        f"{summary.interval[0]:.1%} to {summary.interval[1]:.1%}",
        gain,
        f"{summary.macro_f1:.3f}",
        f"{summary.num_trained:,}",
        f"{summary.seconds:.0f}",
        f"{summary.peak_mib:.0f}",
    )


def _area_cells(areas: Mapping[str, float] | None) -> tuple[str, str]:
    """Return deletion and insertion as text, each with that of a random order in brackets."""
    if areas is None:
        return "", ""
    deletion, insertion = (f"{areas[name]:.2f} ({areas[f'random_{name}']:.2f})" for name in ("deletion", "insertion"))
    return deletion, insertion


def _points(interval: tuple[float, float]) -> str:
    """Return an interval in percentage points as text."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"

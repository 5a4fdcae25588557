"""The report of an explained photo: one HTML file with photo, predictions, maps, numbers and provenance."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vitscope.files import atomic_write
from vitscope.metrics.agreement import Agreement
from vitscope.metrics.region_shares import RegionShare
from vitscope.models.prediction import Prediction
from vitscope.results.attribution import Attribution
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.views.figure import figure_png
from vitscope.views.html_page import html_page, page_table, png_image
from vitscope.views.html_table import html_text
from vitscope.views.numbers import percentage
from vitscope.views.reading_guide import CAUTION, READING, REGIONS
from vitscope.views.scene import Scene, short_label
from vitscope.views.style import FigureStyle
from vitscope.views.tables import AGREEMENT_HEADER, REGIONS_HEADER, agreement_rows, region_rows

MAX_PHOTO = 1024  # pixels of the longer side of the photo in a report
LONGEST_VALUE = 300  # characters of an entry of the provenance


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        photo: its name.
        image: the photo itself.
        model: name of the model.
        predictions: the most probable first; empty if the model has no classes, or if the numbers list them.
        scenes: the figures.
        kinds: kinds of maps in the figures, keys of :data:`~vitscope.views.reading_guide.READING`.
        meanings: sentences on single maps, by their names.
        numbers: what was measured, as (map, name, value).
        agreement: of the maps; None if there is one.
        regions: shares of the maps in regions, named by the maps.
        provenance: by the name of each map.
    """

    photo: str
    image: Image.Image
    model: str
    predictions: Sequence[Prediction]
    scenes: Sequence[Scene]
    kinds: Sequence[str]
    meanings: Mapping[str, str] = field(default_factory=dict)
    numbers: Sequence[tuple[str, str, str]] = ()
    agreement: Agreement | None = None
    regions: Sequence[RegionShare] = ()
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_report(report: Report, path: Path, *, overwrite: bool = False, style: FigureStyle | None = None) -> None:
    """Write a report as one HTML file.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is False.
        SaveError: the file cannot be written; an older file at ``path`` is not changed.
    """
    text = report_page(report, style)
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def report_page(report: Report, style: FigureStyle | None = None) -> str:
    """Return the HTML of a report."""
    untitled = replace(style or FigureStyle(), title=False)  # the headings of the page have the titles
    sections = ["<h2>Photo</h2>", _photo(report)]
    if report.predictions:
        sections += ["<h2>Predictions</h2>", page_table(*prediction_rows(report.predictions))]
    for scene in report.scenes:
        image = png_image(figure_png(scene, untitled), scene.title)
        sections += [f"<h2>{html_text(scene.title)}</h2>", f'<div class="wide figure">{image}</div>']
        sections += [f'<p class="note">{html_text(scene.note)}</p>'] if scene.note else []
    if report.meanings:
        sections.append(page_table(("map", "what it shows"), list(report.meanings.items()), text=True))
    sections.append("<h2>How to read the maps</h2>")
    sections += [f"<p>{html_text(READING[kind])}</p>" for kind in dict.fromkeys(report.kinds)]
    sections.append(f"<p>{html_text(CAUTION)}</p>")
    if report.numbers:
        sections += ["<h2>Numbers</h2>", page_table(("map", "number", "value"), report.numbers)]
    if report.agreement is not None:
        sections += ["<h2>Agreement of the maps</h2>", page_table(AGREEMENT_HEADER, agreement_rows(report.agreement))]
        sections.append(f"<p>Overlap: of the top {report.agreement.top:.0%} of the image.</p>")
    if report.regions:
        sections += ["<h2>Regions</h2>", page_table(REGIONS_HEADER, region_rows(report.regions))]
        sections.append(f"<p>{html_text(REGIONS)}</p>")
    sections.append("<h2>Provenance</h2>")
    for name, provenance in report.provenance.items():
        rows = [(key, _value(value)) for key, value in provenance.items()]
        sections += [f"<h3>{html_text(name)}</h3>", page_table(("entry", "value"), rows, text=True)]
    return html_page(f"{report.photo}, as {report.model} sees it", _summary(report), sections)


def numbers_of(name: str, result: Attribution) -> list[tuple[str, str, str]]:
    """Return what a method recorded about one map: its score, its error, its samples, as (map, name, value)."""
    provenance = result.provenance
    rows = []
    if isinstance(result, SegmentAttribution):
        rows.append((name, f"output for {short_label(result.target)}", f"{result.output:.4g}"))
        held_out = "not determined" if result.held_out_score is None else f"{result.held_out_score:.3f}"
        rows += [
            (name, "R² of the linear fit on held-out samples", held_out),
            (name, "R² of the linear fit on its own samples", f"{result.score:.3f}"),
        ]
    for value in provenance.get("score", ()):
        rows.append(
            (
                name,
                f"{provenance['parameters'].get('output', 'output')} of {short_label(result.target)}",
                f"{value:.4g}",
            )
        )
    for key in ("completeness", "convergence"):
        for entry in provenance.get(key, ()):
            rows += [(name, f"{key}: {part}", f"{value:.3g}") for part, value in entry.items()]
    if "samples" in provenance:
        rows.append((name, "forward passes", f"{provenance['samples']:,}"))
    values = result.values[0]
    rows += [
        (name, "lowest value", f"{float(values.min()):.3g}"),
        (name, "highest value", f"{float(values.max()):.3g}"),
    ]
    return rows


def _photo(report: Report) -> str:
    image = report.image.convert("RGB")
    image.thumbnail((MAX_PHOTO, MAX_PHOTO))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return png_image(file.getvalue(), report.photo).replace("<img ", '<img class="photo" ', 1)


def prediction_rows(predictions: Sequence[Prediction]) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """Return header and rows of a table of classes with their probabilities, or of outputs with their values."""
    if predictions[0].probability is None:
        return ("output", "value"), [(p.label, f"{p.value:.4g}") for p in predictions]
    return ("class", "probability"), [(p.label, percentage(p.probability or 0.0)) for p in predictions]


def _value(value: Any) -> str:
    """Return an entry of the provenance as text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _summary(report: Report) -> str:
    return report.scenes[0].subject if report.scenes else ""

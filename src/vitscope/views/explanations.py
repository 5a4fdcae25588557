"""The figure, the report and the notebook's view of an explanation."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitscope.display import ordinal
from vitscope.explanation.result import TOP_K, Explanation, PhotoExplanation
from vitscope.methods.registry import METHODS
from vitscope.results.attribution import Attribution
from vitscope.validation import require_integer
from vitscope.views.dispatch import scene_of, table_of
from vitscope.views.figure import draw
from vitscope.views.html_page import png_image
from vitscope.views.html_table import html_table, html_text
from vitscope.views.report import Report, numbers_of, prediction_rows
from vitscope.views.scene import OVERLAY, Panel, Row, Scene, map_panel, rollout_maps, rows_of, short_label
from vitscope.views.segments import side_by_side
from vitscope.views.subject import describe_target, with_subject
from vitscope.views.tables import AGREEMENT_HEADER, agreement_rows
from vitscope.views.windows import cls_grid

BASELINES = {"hide": "hidden", "baseline": "baseline"}  # parameters of methods, and their names in figures
REGIONS = {None: "the image", "patches": "each patch"}  # segments of a method, and what has a mean colour
WORDS = {"drop": "left out"}
REPEATS = {"steps", "samples"}  # options of gradient methods that are numbers of passes
MAX_IMAGES = 6  # of a batch in a notebook


@scene_of.register
def _(result: Explanation, index: int | None) -> Scene:
    return explanation_scene(result[0 if index is None else require_integer(index, "index")])


@table_of.register
def _(result: Explanation) -> str:
    sections = [section for single in list(result)[:MAX_IMAGES] for section in _notebook_sections(single)]
    if len(result) > MAX_IMAGES:
        sections.append(f"<p>… {len(result) - MAX_IMAGES:,} more images</p>")
    return "\n".join(sections)


def explanation_scene(explanation: Explanation) -> Scene:
    """Return the figure of a single photo."""
    (photo,) = explanation.photos
    if photo.window_cls is not None:
        scene = cls_grid(photo.window_cls)
    elif photo.is_default:
        scene = _default_scene(explanation.model, photo)
    else:
        scene = _comparison_scene(explanation.model, photo)
    return with_subject(scene, photo.name, explanation.model, photo.predictions, photo.target or "")


def explanation_report(explanation: Explanation, top_k: int = TOP_K) -> Report:
    """Return the content of the report of a single photo.

    Args:
        explanation: of one photo.
        top_k: maximum number of classes.
    """
    (photo,) = explanation.photos
    scene = explanation_scene(explanation)
    kinds = ["attention"] if photo.is_default else [METHODS[name].kind for name in photo.results]
    if photo.is_default and any(result.signed for result in photo.results.values()):
        kinds.append("gradient")
    return Report(
        photo=photo.name,
        image=scene.photo,
        model=explanation.model,
        predictions=photo.predictions[:top_k],
        scenes=[scene],
        kinds=kinds,
        meanings=photo.meanings,
        numbers=[row for name, result in photo.results.items() for row in numbers_of(name, result)],
        agreement=photo.agreement,
        provenance={name: result.provenance for name, result in photo.results.items()},
    )


def _default_scene(model: str, photo: PhotoExplanation) -> Scene:
    """Return the photo, the map of a class and the rollouts, above the heads of the last layer over the photo."""
    rollouts = [result for result in photo.results.values() if not result.signed]
    class_map = next((result for result in photo.results.values() if result.signed), None)
    image = photo.heads[0].images[0]
    top, maps = [Panel(image, title="photo")], rollout_maps(rollouts, 0)
    layer = photo.heads[0].provenance["parameters"]["layer"]
    note = f"heads of the last layer, {ordinal('layer', layer)}, query: readout"
    if class_map is None:
        title, note = f"Attention of {model}", f"top: attention rollout; below: {note}"
    else:
        target = short_label(class_map.target)
        lines = ["what raises or lowers", f"{_explained_number('libra', class_map)} of {target}"]
        top.append(replace(map_panel(class_map, f"libra, {target}"), lines=lines))
        maps = [replace(panel, lines=["what reaches the readout,", "the same for every class"]) for panel in maps]
        supported = describe_target(class_map.target, photo.predictions)
        title = f"What supports {supported}, and what reaches the readout of {model}"
        note = f"top: LibraGrad and attention rollout; below: {note}"
    top += maps
    heads = [_head_panel(head) for head in photo.heads]
    head_rows = -(-len(heads) // (2 * len(top)))
    return Scene([Row(top, len(top)), *rows_of(heads, -(-len(heads) // head_rows))], title, note)


def _head_panel(head: Attribution) -> Panel:
    title = f"head {head.provenance['parameters']['head']}"
    return replace(map_panel(head, title), alpha=OVERLAY, uniform=1 / head.grid.num_tokens)


def _comparison_scene(model: str, photo: PhotoExplanation) -> Scene:
    """Return the maps of several methods side by side."""
    title = f"What {model} looks at"
    if photo.target is not None:
        title = f"What supports {describe_target(photo.target, photo.predictions)} for {model}"
    return side_by_side(
        list(photo.results.values()),
        list(photo.results),
        title=title,
        lines=[_lines(name, result) for name, result in photo.results.items()],
        agreement=photo.agreement,
    )


def _lines(name: str, result: Attribution) -> list[str]:
    """Return what a map explains, how many forward passes it took, and its baseline if it has one."""
    parameters = result.provenance["parameters"]
    baselines = [f"{noun}: {_filling(key, parameters)}" for key, noun in BASELINES.items() if key in parameters]
    return [_explained_number(name, result), f"forward passes: {_passes(name, result)}", *baselines]


def _passes(name: str, result: Attribution) -> str:
    """Return the number of forward passes, and of backward passes if there are any."""
    samples = result.provenance.get("samples")
    if samples is not None:
        return f"{samples:,}"
    passes, parameters = METHODS[name].forwards, result.provenance["parameters"]
    signature = inspect.signature(METHODS[name].compute).parameters
    for key in REPEATS & signature.keys() & parameters.keys():  # the registry has the numbers of the defaults
        more = parameters[key] - signature[key].default
        passes = " ".join(str(int(word) + more) if word.isdecimal() else word for word in passes.split())
    return passes


def _filling(key: str, parameters: Mapping[str, Any]) -> str:
    """Return a baseline in words: a mean is that of each segment, of each patch, or of the image."""
    value = parameters[key]
    if value == "mean":
        segments = parameters.get("segments") if key == "hide" else None
        return f"mean of {REGIONS.get(segments, 'each segment')}"
    return WORDS.get(value, value) if isinstance(value, str) else ", ".join(f"{channel:g}" for channel in value)


def _explained_number(name: str, result: Attribution) -> str:
    """Return what a map explains: attention, or a number of the output."""
    if METHODS[name].kind == "attention":
        return "attention, the same for every class" if result.target is None else "attention, for the class"
    output = str(result.provenance["parameters"]["output"]).replace("_", "-")
    return f"the {output}"


def _notebook_sections(explanation: Explanation) -> list[str]:
    """Return figure, classes and agreement of a single photo as HTML."""
    (photo,) = explanation.photos
    scene = explanation_scene(explanation)
    sections = [png_image(draw(scene)._repr_png_(), f"{scene.title}. {scene.subject}")]
    if photo.predictions:
        sections.append(html_table(*prediction_rows(photo.predictions[:TOP_K]), caption="Predictions"))
    if photo.no_classes:
        sections.append(f"<p>{html_text(photo.no_classes)}</p>")
    sections.append(html_table(("map", "what it shows"), list(photo.meanings.items()), text=True))
    if photo.agreement is not None:
        rows = agreement_rows(photo.agreement)
        caption = f"Agreement; top regions: {photo.agreement.top:.0%} of the image"
        sections.append(html_table(AGREEMENT_HEADER, rows, caption))
    return sections

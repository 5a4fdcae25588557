"""The figures and the tables of results, registered with :mod:`vitscope.views.dispatch`."""

from pathlib import Path

from PIL import Image

from vitscope.attention.trace import Trace
from vitscope.compositing.effects import Effects
from vitscope.compositing.result import Composition
from vitscope.display import ordinal
from vitscope.errors import CallError
from vitscope.images.image import InputImage
from vitscope.interventions.artefacts import Artefacts
from vitscope.methods.head_importance import HeadImportance
from vitscope.methods.head_statistics import HeadStatistics
from vitscope.metrics.agreement import Agreement
from vitscope.metrics.faithfulness import Faithfulness
from vitscope.metrics.region_shares import RegionShares
from vitscope.results.attribution import Attribution
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.validation import require_integer, short_text
from vitscope.views.artefacts import artefact_scene
from vitscope.views.compositing import plate
from vitscope.views.dispatch import refuse_index, scene_of, table_of
from vitscope.views.heads import head_values
from vitscope.views.html_table import html_table
from vitscope.views.scene import AnyPanel, Panel, Row, Scene, short_label
from vitscope.views.segments import logit_advice, pixel_panel, supporting_regions
from vitscope.views.tables import (
    AGREEMENT_HEADER,
    EFFECTS_HEADER,
    FAITHFULNESS_HEADER,
    REGIONS_HEADER,
    STATISTICS_HEADER,
    agreement_rows,
    effect_rows,
    faithfulness_rows,
    region_rows,
    statistics_rows,
)
from vitscope.views.windows import attention_scene, cls_grid
from vitscope.window_tokens.window_cls import WindowCls

MAX_IMAGES = 6  # of a batch in one figure
OPTIONS = ("layer", "head", "query", "head_fusion", "segments", "hide", "output")  # in the second line
BLANK_SIDE = 256  # pixels of the white image under a map without a photo


@scene_of.register
def _(result: Attribution, index: int | None) -> Scene:
    if isinstance(result, SegmentAttribution) and (len(result) == 1 or index is not None):
        single = result[0 if index is None else index]
        if single.images and {"parameters", "samples"} <= set(single.provenance):
            return supporting_regions(single)
    chosen = list(range(min(len(result), MAX_IMAGES))) if index is None else [_image(index, len(result))]
    pairs = [_photo_and_map(result[i]) for i in chosen]
    rows = [Row(pair, 2) for pair in pairs]
    if len(pairs) > 1:
        rows = [Row([panel for pair in pairs[i : i + 2] for panel in pair], 4) for i in range(0, len(pairs), 2)]
    method, model = (short_text(result.provenance.get(key), f"unknown {key}") for key in ("method", "model"))
    target = "" if result.target is None else f", for {short_label(result.target)}"
    title = f"{method.replace('_', ' ')} of {model}{target}"
    note = _options(result, len(chosen)) + logit_advice([result[i] for i in chosen])
    return Scene(rows, title[:1].upper() + title[1:], note.removeprefix("; "))


@scene_of.register
def _(result: Trace, index: int | None) -> Scene:
    return attention_scene(result, result.blocks[-1].layer, "readout", index=_image(index, len(result.images)))


@scene_of.register
def _(result: WindowCls, index: int | None) -> Scene:
    return cls_grid(result, index=_image(index, len(result.trace.images)))


@scene_of.register
def _(result: Artefacts, index: int | None) -> Scene:
    return artefact_scene(result, index=_image(index, len(result.images)))


@scene_of.register
def _(result: HeadImportance, index: int | None) -> Scene:
    image = _image(index, len(result.values))
    model = short_text(result.provenance.get("model"), "an unknown model")
    by = short_text(result.provenance.get("parameters", {}).get("by"), "an unknown measure")
    return head_values(
        result.values[image].cpu().numpy(),
        title=f"Heads of {model} for {short_label(result.targets[image])}",
        note=f"importance by {by}; red: supports, blue: opposes{_of_images(1, len(result.values))}",
        layers=result.layers,
    )


@scene_of.register
def _(result: Composition, index: int | None) -> Scene:
    refuse_index(result, index)
    return plate(result)


@table_of.register
def _(result: Agreement) -> str:
    return html_table(
        AGREEMENT_HEADER, agreement_rows(result), f"Agreement; top regions: {result.top:.0%} of the image"
    )


@table_of.register
def _(result: Faithfulness) -> str:
    return html_table(FAITHFULNESS_HEADER, faithfulness_rows(result), "Areas under the curves of the probability")


@table_of.register
def _(result: Effects) -> str:
    return html_table(EFFECTS_HEADER, effect_rows(result), "Effects on the output")


@table_of.register
def _(result: RegionShares) -> str:
    entries = [*(result.means() if len(result.photos) > 1 else ()), *result.rows()]
    return html_table(REGIONS_HEADER, region_rows(entries), "Shares of regions; ratio 1: a uniform map")


@table_of.register
def _(result: HeadStatistics) -> str:
    return html_table(STATISTICS_HEADER, statistics_rows(result), "Heads by layer: mean (lowest to highest)")


def _photo_and_map(result: Attribution) -> list[AnyPanel]:
    """Return the photo of a single result and the map over it; the map alone on white if there is no photo."""
    title = str(result.provenance.get("method", "map")).replace("_", " ")
    title += "" if result.target is None else f", {short_label(result.target)}"
    if result.images:
        name = Path(result.images[0].name).name or "photo"
        return [Panel(result.images[0], title=name), pixel_panel(result, title)]
    height, width = result.values.shape[1:]
    scale = BLANK_SIDE / max(height, width)
    blank = Image.new("RGB", (max(round(width * scale), 2), max(round(height * scale), 2)), "white")
    return [pixel_panel(result, title, InputImage.from_photo(blank))]


def _options(result: Attribution, count: int) -> str:
    """Return the options of a method, its number of samples, and the number of images that are shown."""
    parameters = result.provenance.get("parameters", {})
    passed = [key for key in OPTIONS if parameters.get(key) is not None]
    options = [
        ordinal("layer", parameters[key]) if key == "layer" else f"{key.replace('_', ' ')}: {parameters[key]}"
        for key in passed
    ]
    samples = result.provenance.get("samples")
    options += [] if samples is None else [f"{samples:,} samples"]
    options += ["interrupted"] if result.provenance.get("interrupted") else []
    return ", ".join(options) + _of_images(count, len(result))


def _of_images(count: int, total: int) -> str:
    return f"; {count} of {total:,} images" if count < total else ""


def _image(index: int | None, count: int) -> int:
    """Return the index of an image, counted from the start; that of the first for None."""
    if index is None:
        return 0
    index = require_integer(index, "index")
    if not -count <= index < count:
        raise CallError(f"index is {index}: this result has images 0 to {count - 1}")
    return index % count

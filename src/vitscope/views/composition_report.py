"""The report of a composition: its figures, the outputs of every edited image, and its provenance."""

from collections.abc import Sequence
from dataclasses import replace

from vitscope.compositing.effects import effects
from vitscope.compositing.result import Composition
from vitscope.typing import ClassTarget
from vitscope.views.compositing import controls, format_output, places_and_sizes, plate
from vitscope.views.report import Report
from vitscope.views.scene import Scene, short_label

COUNT = 3  # classes of the original that are named


def composition_subject(photo: str, result: Composition) -> str:
    """Return the photo, the model and its most probable classes for the original."""
    if result.output == "similarity":
        return f"{photo}; {result.provenance['model']}"
    classes = result.ranking(0, COUNT).classes
    named = ", ".join(f"{short_label(c.label)} ({format_output(c.value, result.output)})" for c in classes)
    return f"{photo}; {result.provenance['model']} predicts {named}"


def composition_report(
    photo: str,
    results: Sequence[Composition],
    targets: Sequence[ClassTarget | None] = (None,),
    *,
    full: bool = False,
) -> Report:
    """Return the content of the report of a photo.

    Args:
        photo: its name.
        results: complete, one for each model.
        targets: as in :func:`~vitscope.views.compositing.places_and_sizes`.
        full: as in :func:`~vitscope.views.compositing.plate`.
    """
    scenes: list[Scene] = [
        replace(plate(result, full=full), subject=composition_subject(photo, result)) for result in results
    ]
    if any(result.tested("location") or result.tested("size") for result in results):
        scenes.append(places_and_sizes(results, targets))
    if any(result.tested("controls") for result in results):
        scenes += [controls([result], effects([result], target=targets[0]), targets[0]) for result in results]
    named = {str(result.provenance["model"]): result for result in results}
    return Report(
        photo=photo,
        image=results[0].original.photo,
        model=" and ".join(named),
        predictions=(),
        scenes=scenes,
        kinds=["composition", *(["attention"] if results[0].rollouts is not None else [])],
        numbers=[row for model, result in named.items() for row in _outputs(model, result)],
        provenance={model: result.provenance for model, result in named.items()},
    )


def _outputs(model: str, result: Composition) -> list[tuple[str, str, str]]:
    """Return the most probable classes of every edited image, as (model, image, classes)."""
    rows = []
    for index in result.evaluated:
        classes = result.ranking(index, COUNT).classes
        text = ", ".join(f"{short_label(c.label)} {format_output(c.value, result.output)}" for c in classes)
        rows.append((model, result.edited_images[index].name, text))
    return rows

"""Export of a composition: the rows of its CSV table, and its contents for JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vitscope.compositing.result import Composition


def table_rows(result: "Composition", top_k: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each evaluated image: its description, its likeliest classes and the rollout on its objects."""
    for index in result.evaluated:
        image, ranking = result.edited_images[index], result.ranking(index, top_k)
        tested = next((placement for placement in image.show if placement.name == image.subject), None)
        x, y = (None, None) if tested is None else (tested.centre or result.objects[tested.name].centre)
        area = None if tested is None else result.objects[tested.name].area * tested.scale**2
        row = {
            "edited image": ranking.name,
            "test": ranking.test,
            "object": image.subject,
            "background": image.background,
            "positions": "neutral" if image.neutral else "as they are",
            "x": x,
            "y": y,
            "scale": None if tested is None else tested.scale,
            "area": area,
        }
        for rank, ranked in enumerate(ranking.classes, 1):
            row |= {
                f"class {rank}": ranked.label,
                f"{result.output} {rank}": ranked.value,
                f"change {rank}": ranked.change,
            }
        yield row | {f"attention on {name}": mass for name, mass in _rollout_on_objects(result, index).items()}


def as_json(result: "Composition") -> dict[str, Any]:
    """Return everything but the pixels, in types that JSON supports."""
    images = []
    for index, (image, outputs) in enumerate(zip(result.edited_images, result.outputs, strict=True)):
        entry = {**asdict(image), "outputs": None if np.isnan(outputs).any() else outputs.tolist()}
        attention = _rollout_on_objects(result, index)
        images.append(entry | {"attention": attention} if _has_rollout(result, index) else entry)
    return {
        "image": result.original.name,
        "provenance": dict(result.provenance),
        "objects": [
            {
                "name": item.name,
                "box": list(item.box),
                "area": item.area,
                "visible_fraction": result.visible_fraction(name),
                "class": result.labels[result.column(None, name)],
            }
            for name, item in result.objects.items()
        ],
        "labels": list(result.labels),
        "edited_images": images,
    }


def _has_rollout(result: "Composition", index: int) -> bool:
    return result.rollouts is not None and not np.isnan(result.rollouts[index]).any()


def _rollout_on_objects(result: "Composition", index: int) -> dict[str, float]:
    """Return the share of the rollout on each object of an edited image; empty if there is no rollout."""
    if not _has_rollout(result, index):
        return {}
    names = [placement.name for placement in result.edited_images[index].show]
    return {name: result.rollout_mass(index, name)[0] for name in names}

"""Export of a composition: the CSV table and the JSON entries of its edited images, and the file that holds them."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vitscope.compositing.object_masks import ObjectMask
from vitscope.compositing.ranking import Ranking
from vitscope.compositing.stage import EditedImage
from vitscope.errors import CallError
from vitscope.files import atomic_write


def table_row(
    image: EditedImage,
    ranking: Ranking,
    objects: Mapping[str, ObjectMask],
    output: str,
    rollout_masses: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return a row: the edited image, its most probable classes, and the share of the rollout on its objects."""
    tested = next((placement for placement in image.show if placement.name == image.subject), None)
    x, y = (None, None) if tested is None else (tested.centre or objects[tested.name].centre)
    row = {
        "edited image": image.name,
        "test": image.test,
        "object": image.subject,
        "background": image.background,
        "positions": "neutral" if image.neutral else "as they are",
        "x": x,
        "y": y,
        "scale": None if tested is None else tested.scale,
        "area": None if tested is None else objects[tested.name].area * tested.scale**2,
    }
    for rank, ranked in enumerate(ranking.classes, 1):
        row |= {f"class {rank}": ranked.label, f"{output} {rank}": ranked.value, f"change {rank}": ranked.change}
    return row | {f"attention on {name}": mass for name, mass in (rollout_masses or {}).items()}


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with a column for every key of any row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_entry(
    image: EditedImage, outputs: Float[np.ndarray, " label"], rollout_masses: Mapping[str, float] | None
) -> dict[str, Any]:
    """Return an edited image in types that JSON supports, with its outputs and the rollout on its objects."""
    entry = {**asdict(image), "outputs": None if np.isnan(outputs).any() else outputs.tolist()}
    return entry if rollout_masses is None else entry | {"attention": dict(rollout_masses)}


def write_table(path: Path, texts: Mapping[str, Callable[[], str]]) -> Path:
    """Write the text that the suffix of a path selects, and return the path.

    Args:
        path: the file.
        texts: functions that return the text of a suffix, ``".csv"`` or ``".json"``.

    Raises:
        CallError: the path has another suffix.
        SaveError: the file cannot be written; an older file at ``path`` is not changed.
    """
    if path.suffix not in texts:
        raise CallError(f"cannot save as {path.name!r}: end the name in .csv or .json; save images by image(…).save")
    text = texts[path.suffix]()
    with atomic_write(path) as temporary_path:
        temporary_path.write_text(text, encoding="utf-8", newline="")
    return path

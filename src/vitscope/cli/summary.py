"""The table summary.csv: one line for each photo of a batch."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.cli.output import predictions_of
from vitscope.errors import OutputExistsError
from vitscope.files import atomic_write
from vitscope.interrupts import uninterrupted

if TYPE_CHECKING:
    from vitscope.models import VisionModel

NAME = "summary.csv"
# photo: its path, as it was passed; predicted and probability: the most probable class; target: what was explained;
# score: the probability of the target if it is a class, or the value of a regression; file: name of the output.
# Further columns hold numbers of the command, such as the shares of regions.
COLUMNS = ("photo", "predicted", "probability", "target", "score", "model", "method", "file")


class Summary:
    """The lines of a summary.csv. Lines of files that this batch does not write again are kept.

    Args:
        path: the table; it need not exist.
        overwrite: replace a file of this name that is no summary.

    Raises:
        OutputExistsError: the file exists and is no summary.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        self._has_news = False
        self._rows = {row["file"]: row for row in _read(path, overwrite=overwrite)}

    def add(
        self,
        model: "VisionModel",
        photo: Any,
        name: str,
        target: str | None,
        method: str,
        file: str,
        numbers: Mapping[str, str] | None = None,
    ) -> None:
        """Add the line of a photo; the model is evaluated again for its classes.

        Args:
            model: the model that was explained.
            photo: the photo.
            name: its path, or another name.
            target: label of what was explained; None for the whole prediction.
            method: names of the methods.
            file: name of the output.
            numbers: further columns.
        """
        scores = _scores(model, photo, target)
        self._rows[file] = {
            "photo": name,
            **scores,
            "target": target or "",
            "model": model.name,
            "method": method,
            "file": file,
            **(numbers or {}),
        }
        self._has_news = True

    def write(self) -> Path | None:
        """Write the table as a whole, and return its path; None if no line was added."""
        if not self._has_news:
            return None
        text = io.StringIO(newline="")
        columns = dict.fromkeys([*COLUMNS, *(name for row in self._rows.values() for name in row)])
        writer = csv.DictWriter(text, list(columns), restval="")
        writer.writeheader()
        writer.writerows(self._rows.values())
        with uninterrupted(), atomic_write(self.path) as temporary:
            temporary.write_bytes(text.getvalue().encode("utf-8", "backslashreplace"))
        return self.path


def _read(path: Path, *, overwrite: bool) -> list[dict[str, str]]:
    """Return the lines of an existing table; none if there is no file, or another file that may be replaced."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ())[: len(COLUMNS)] == COLUMNS:
                return [row for row in table if row["file"]]
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    if overwrite:
        return []
    raise OutputExistsError(f"{path} exists already and is no summary of vitscope: pass --overwrite or another --out")


def _scores(model: "VisionModel", photo: Any, target: str | None) -> dict[str, str]:
    """Return the most probable class and the score of the target, as text; empty if there are no classes."""
    predictions = predictions_of(model, photo)
    by_label = {prediction.label: prediction for prediction in reversed(predictions)}
    numbers = [
        "" if prediction is None else f"{prediction.probability if prediction.value is None else prediction.value:.6g}"
        for prediction in (predictions[0] if predictions else None, by_label.get(target or ""))
    ]
    predicted = predictions[0].label if predictions else ""
    return {"predicted": predicted, "probability": numbers[0], "score": numbers[1]}

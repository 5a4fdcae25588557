"""The result of a comparison: its cells, one summary per model and tuning method, and interactions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.display import Figured, Tabulated, one_line
from vitscope.images.image import InputImage
from vitscope.tune import metrics
from vitscope.tune.attention_change import AttentionChange
from vitscope.tune.leakage import DataCheck

BASE = "head"  # gains are measured against this tuning method


@dataclass(frozen=True, eq=False)
class Cell:
    """One model, tuned with one method and one seed.

    Attributes:
        model: the name of the model.
        tuning: the tuning method.
        seed: the random seed.
        record: the record of :class:`vitscope.Tuned`, with the change of the attention under ``attention``.
    """

    model: str
    tuning: str
    seed: int
    record: Mapping[str, Any]

    @property
    def correct(self) -> np.ndarray:
        """(image,) True for each test image whose class is predicted correctly."""
        return np.asarray(self.record["predictions"]) == np.asarray(self.record["true_labels"])


@dataclass(frozen=True, eq=False)
class Summary:
    """The cells of one model and tuning method: means over seeds, and the accuracy with its 95 % interval."""

    model: str
    tuning: str
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    confusion: np.ndarray
    num_trained: int
    num_head: int
    seconds: float
    peak_mib: float
    distances: tuple[float, ...] | None
    correlation: float | None
    faithfulness_before: Mapping[str, float] | None
    faithfulness_after: Mapping[str, float] | None
    gain: tuple[float, tuple[float, float]] | None

    def as_json(self) -> dict[str, Any]:
        """Return every field."""
        gain = None if self.gain is None else {"value": self.gain[0], "interval": list(self.gain[1])}
        return {**self.__dict__, "confusion": self.confusion.tolist(), "gain": gain}


@dataclass(frozen=True)
class Interaction:
    """The gain of ``first`` over the head alone minus the gain of ``second``, with its 95 % interval."""

    tuning: str
    first: str
    second: str
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Comparison(Figured, Tabulated):
    """The result of :func:`vitscope.compare`.

    Attributes:
        data: the name of the data set.
        labels: the names of the classes.
        cells: one cell per model, tuning method and seed, in this order.
        recipe: the settings of training.
        data_check: the check of the data set; None if a loaded data set was passed.
        folder: the folder of the comparison.
        images: for each model, the test images whose attention is compared, as the model sees them.

    Examples:
        >>> record = {"predictions": [0, 1, 1], "true_labels": [0, 0, 1]}
        >>> cells = [Cell("vit-nano", "head", seed, record) for seed in (0, 1)]
        >>> comparison = Comparison("photos", ("cat", "dog"), tuple(cells), {}, None, Path("out"), {})
        >>> comparison.correct("vit-nano", "head").tolist()
        [[True, False, True], [True, False, True]]
    """

    data: str
    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    recipe: Mapping[str, Any]
    data_check: DataCheck | None
    folder: Path
    images: Mapping[str, Sequence[InputImage]]

    def __repr__(self) -> str:
        lines = [
            f"{len(self.cells)} cells: {', '.join(self.tunings[:5])} of {', '.join(map(repr, self.models[:3]))}",
            f"in {self.folder}",
        ]
        return one_line(f"Comparison on {self.data}", "; ".join(lines))

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models."""
        return tuple(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def tunings(self) -> tuple[str, ...]:
        """The tuning methods."""
        return tuple(dict.fromkeys(cell.tuning for cell in self.cells))

    def of(self, model: str, tuning: str) -> list[Cell]:
        """Return the cells of a model and a tuning method, one per seed."""
        return [cell for cell in self.cells if (cell.model, cell.tuning) == (model, tuning)]

    def attention(self, model: str, tuning: str) -> AttentionChange:
        """Return the change of the attention by tuning with the first seed."""
        return AttentionChange.from_json(self.of(model, tuning)[0].record["attention"])

    def correct(self, model: str, tuning: str) -> np.ndarray:
        """Return a (seed, image) array that is True for test images whose class is predicted correctly."""
        return np.stack([cell.correct for cell in self.of(model, tuning)])

    def summaries(self) -> list[Summary]:
        """Return one summary per model and tuning method."""
        return list(self._summaries)

    @cached_property
    def _summaries(self) -> tuple[Summary, ...]:
        return tuple(self._summary(model, tuning) for model in self.models for tuning in self.tunings)

    def interactions(self) -> list[Interaction]:
        """Return the differences in gain per method and pair of models; empty without ``head`` or with one model."""
        if BASE not in self.tunings:
            return []
        interactions = []
        for tuning in self.tunings:
            for first, second in combinations(reversed(self.models), 2) if tuning != BASE else ():
                pairs = [(self.correct(model, tuning), self.correct(model, BASE)) for model in (first, second)]
                interactions.append(Interaction(tuning, first, second, *metrics.interaction(pairs[0], pairs[1])))
        return interactions

    def as_json(self) -> dict[str, Any]:
        """Return settings, summaries and interactions."""
        return {
            "data": self.data,
            "labels": list(self.labels),
            "recipe": dict(self.recipe),
            "data_check": None if self.data_check is None else self.data_check.as_json(),
            "summaries": [summary.as_json() for summary in self.summaries()],
            "interactions": [interaction.__dict__ for interaction in self.interactions()],
        }

    def _summary(self, model: str, tuning: str) -> Summary:
        cells, correct = self.of(model, tuning), self.correct(model, tuning)
        mean = {name: float(np.mean([cell.record[name] for cell in cells])) for name in ("macro_f1", "seconds")}
        changes = [cell.record["attention"] for cell in cells if cell.record.get("attention")]
        correlations = [change["correlation"] for change in changes if change["correlation"] is not None]
        gain = None
        if tuning != BASE and BASE in self.tunings:
            gain = metrics.gain(correct, self.correct(model, BASE))
        return Summary(
            model,
            tuning,
            float(correct.mean()),
            metrics.accuracy_interval(correct),
            mean["macro_f1"],
            np.sum([cell.record["confusion"] for cell in cells], axis=0),
            cells[0].record["num_trained"],
            cells[0].record["num_head"],
            mean["seconds"],
            max(cell.record["peak_mib"] for cell in cells),
            tuple(np.mean([change["distances"] for change in changes], axis=0).tolist()) if changes else None,
            float(np.mean(correlations)) if correlations else None,
            _mean_areas([change["faithfulness_before"] for change in changes]),
            _mean_areas([change["faithfulness_after"] for change in changes]),
            gain,
        )


def _mean_areas(several: Sequence[Mapping[str, float] | None]) -> Mapping[str, float] | None:
    """Return the mean of each area over the cells that have them."""
    available = [areas for areas in several if areas is not None]
    return {name: float(np.mean([areas[name] for areas in available])) for name in available[0]} if available else None

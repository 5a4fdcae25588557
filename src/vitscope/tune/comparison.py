"""compare(): models × tunings × seeds on one data set, cell by cell, and what the cells say together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vitscope.errors import CallError, OutputExistsError
from vitscope.files import atomic_write, discard, require_path, sweep_temporary
from vitscope.images.image import InputImage
from vitscope.models.checkpoints.serialization import WITHIN
from vitscope.models.loader import load
from vitscope.models.vision_model import VisionModel
from vitscope.models.window_reader import block_projections
from vitscope.tune import metrics as measures
from vitscope.tune.attention_change import AttentionChange, attention_change
from vitscope.tune.data import Data, load_data
from vitscope.tune.finetune import finetune, require_device
from vitscope.tune.json_files import DamagedError
from vitscope.tune.leakage import DataCheck, inspect, usable
from vitscope.tune.lock import locked
from vitscope.tune.methods import READS_WINDOWS, require_tuning
from vitscope.tune.processes import training_processes
from vitscope.tune.progress import CellProgress, cells_progress
from vitscope.tune.recipe import Recipe, read_recipe
from vitscope.tune.run_folder import Tuned, difference, holds_something, read_result, settings_of
from vitscope.validation import at_least, seed_number

BASE = "head"  # what gains are measured against
CELL, CELLS, EXAMPLES = "cell.json", "cells", 8


@dataclass(frozen=True, eq=False)
class Cell:
    """One model, tuned in one way with one seed.

    ``about`` is what :class:`~vitscope.Tuned` holds, and ``attention`` what tuning did to it.
    """

    model: str
    tuning: str
    seed: int
    about: Mapping[str, Any]

    @property
    def right(self) -> np.ndarray:
        """(image,) whether each test image was named rightly."""
        return np.asarray(self.about["said"]) == np.asarray(self.about["truth"])


@dataclass(frozen=True, eq=False)
class Summary:
    """The cells of one model and tuning together: means over seeds, the accuracy with its 95 % interval."""

    model: str
    tuning: str
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float
    confusion: np.ndarray
    trained: int
    head: int
    seconds: float
    peak_mib: float
    distances: tuple[float, ...] | None
    correlation: float | None
    faithfulness_before: Mapping[str, float] | None
    faithfulness_after: Mapping[str, float] | None
    gain: tuple[float, tuple[float, float]] | None


@dataclass(frozen=True)
class Interaction:
    """How much more ``first`` gains over the head alone by a tuning than ``second`` does, with its 95 % interval."""

    tuning: str
    first: str
    second: str
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All cells of a comparison.

    Attributes:
        labels: the classes.
        cells: in order of models, tunings, seeds.
        inspection: what was found in the data set; None where it came checked.
        images: for each model the test images whose attention was compared, as it sees them.
    """

    data: str
    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    recipe: Mapping[str, Any]
    inspection: DataCheck | None
    folder: Path
    images: Mapping[str, Sequence[InputImage]]

    def __repr__(self) -> str:
        rows = [
            f"{len(self.cells)} cells: {', '.join(self.tunings[:5])} of {', '.join(map(repr, self.models[:3]))}",
            f"in {self.folder}",
        ]
        return f"<Comparison on {self.data}, {'; '.join(rows)}>"

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def tunings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.tuning for cell in self.cells))

    def of(self, model: str, tuning: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.model, cell.tuning) == (model, tuning)]

    def attention(self, model: str, tuning: str) -> AttentionChange:
        """What tuning did to the attention, with the first seed."""
        return AttentionChange.of_json(self.of(model, tuning)[0].about["attention"])

    def right(self, model: str, tuning: str) -> np.ndarray:
        """(seed, image)."""
        return np.stack([cell.right for cell in self.of(model, tuning)])

    def summaries(self) -> list[Summary]:
        """One row for each model and tuning."""
        return list(self._summaries)

    @cached_property
    def _summaries(self) -> tuple[Summary, ...]:
        return tuple(self._summary(model, tuning) for model in self.models for tuning in self.tunings)

    def interactions(self) -> list[Interaction]:
        """For each tuning and each two models, who gains more; empty without ``head`` or with one model."""
        if BASE not in self.tunings:
            return []
        found = []
        for tuning in self.tunings:
            for first, second in combinations(reversed(self.models), 2) if tuning != BASE else ():
                pairs = [(self.right(model, tuning), self.right(model, BASE)) for model in (first, second)]
                found.append(Interaction(tuning, first, second, *measures.interaction(pairs[0], pairs[1])))
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "labels": list(self.labels),
            "recipe": dict(self.recipe),
            "inspection": None if self.inspection is None else self.inspection.as_json(),
            "summaries": [
                {**one.__dict__, "confusion": one.confusion.tolist(), "gain": _gain_json(one.gain)}
                for one in self.summaries()
            ],
            "interactions": [one.__dict__ for one in self.interactions()],
        }

    def _summary(self, model: str, tuning: str) -> Summary:
        cells, right = self.of(model, tuning), self.right(model, tuning)
        mean = {name: float(np.mean([cell.about[name] for cell in cells])) for name in ("macro_f1", "seconds")}
        attention = [cell.about["attention"] for cell in cells if cell.about.get("attention")]
        related = [one["correlation"] for one in attention if one["correlation"] is not None]
        gain = None
        if tuning != BASE and BASE in self.tunings:
            gain = measures.gain(right, self.right(model, BASE))
        return Summary(
            model,
            tuning,
            float(right.mean()),
            measures.accuracy_interval(right),
            mean["macro_f1"],
            np.sum([cell.about["confusion"] for cell in cells], axis=0),
            cells[0].about["trained"],
            cells[0].about["head"],
            mean["seconds"],
            max(cell.about["peak_mib"] for cell in cells),
            tuple(np.mean([one["distances"] for one in attention], axis=0).tolist()) if attention else None,
            float(np.mean(related)) if related else None,
            _means([one["faithfulness_before"] for one in attention]),
            _means([one["faithfulness_after"] for one in attention]),
            gain,
        )


def compare(
    data: Data | DataCheck | str | Path,
    models: Sequence[str | Path | VisionModel],
    *,
    out: str | Path,
    tunings: Sequence[str] = (BASE, "adapter-mlp", "lora"),
    seeds: int | Sequence[int] = 3,
    recipe: Recipe | str | Path = "modern",
    rank: int | None = None,
    unreadable: str = "refuse",
    drop_duplicates: bool = False,
    keep_models: bool = False,
    device: str | None = None,
    progress: CellProgress | bool | None = None,
    **changes: Any,
) -> Comparison:
    """Tune each model in each way with each seed on one data set, and compare.

    A comparison that was broken off goes on where it stopped when it is called again in the same way: finished cells
    are not run again, a broken-off cell goes on from its last checkpoint.

    Args:
        data: also as :func:`vitscope.inspect` gives it.
        unreadable, drop_duplicates, recipe, changes: as for :func:`vitscope.finetune`.
        models: two or more, by name or from :func:`vitscope.load`; one is possible too.
        rank: of adapters (64) and of LoRA (8), for those tunings that have one.
        tunings: what learns; gains are measured against ``"head"`` where it is among them.
        seeds: how many, counted from 0, or which.
        out: the folder of the comparison.
        keep_models: keep the tuned models of all cells, in ``out/cells``; otherwise only what they said. Cells
            that were finished without it have none any more.
        device: where to train; by default on the GPU if there is one.
        progress: True for a bar on stderr, or a function that is called after every step with the name of the cell and
            what :func:`vitscope.finetune` tells.

    Raises:
        CallError: an argument is wrong, or ``out`` holds something else.
        WorkError: a cell fails; what was finished before is kept.
    """
    chosen, out = read_recipe(recipe, **changes), require_path(out, "out")
    require_device(device)
    listed = _seeds(seeds)
    _refuse_text(models, "models", "models")
    _refuse_text(tunings, "tunings", "names of tunings")
    ways = [require_tuning(tuning) for tuning in tunings]
    if rank is not None and all(way.rank is None for way in ways):
        raise CallError(f"rank is {rank}, but none of {', '.join(tunings)} has one: adapters and lora do")
    if not models or not tunings or not listed:
        raise CallError("a comparison needs a model, a tuning and a seed at least")
    if out.exists() and (not out.is_dir() or (holds_something(out) and not (out / CELLS).is_dir())):
        raise OutputExistsError(f"{out} holds something else than a comparison: choose another folder")
    inspection: DataCheck | None = None
    if not isinstance(data, Data):
        inspection = data if isinstance(data, DataCheck) else inspect(load_data(data))
        data = usable(inspection, unreadable=unreadable, drop_duplicates=drop_duplicates)
    loaded = [model if isinstance(model, VisionModel) else load(model) for model in models]
    _refuse_one_name_twice([model.name for model in loaded])
    if READS_WINDOWS in tunings:
        for model in loaded:
            block_projections(model)  # refuses a model without windows before anything is trained
    images = _examples(data)
    cells: list[Cell] = []
    processes = training_processes()
    with cells_progress(progress) as tell, locked(out) if processes.is_main_process else nullcontext():
        for model, tuning, seed in _order(loaded, tunings, listed):
            folder = out / CELLS / f"{plain_name(model.name)}-{tuning}-{seed}"
            ranked = None if require_tuning(tuning).rank is None else rank
            work = _Work(model, data, tuning, ranked, replace(chosen, seed=seed), folder, images, keep_models, device)
            cells.append(work.cell(tell))
        views = {model.name: model.prepare(list(images))[1] for model in loaded}
        done = Comparison(data.name, data.labels, tuple(cells), chosen.as_json(), inspection, out, views)
        if processes.is_main_process:
            with atomic_write(out / "comparison.json") as beside:
                beside.write_text(json.dumps(done.as_json(), indent=1) + "\n", encoding="utf-8")
    return done


@dataclass(frozen=True, eq=False)
class _Work:
    """One cell to run, or to read if it has been run."""

    model: VisionModel
    data: Data
    tuning: str
    rank: int | None
    recipe: Recipe
    folder: Path
    images: Sequence[Any]
    keep: bool
    device: str | None

    def cell(self, progress: CellProgress | None) -> Cell:
        kept = self.folder / CELL
        if not kept.is_file():
            tuned, processes = self._tuned(progress), training_processes()
            if processes.is_main_process:
                change = attention_change(self.model, tuned.model, self.images)
                with atomic_write(kept) as beside:
                    about = {**tuned.about, "attention": change.as_json(), "model_kept": self.keep}
                    beside.write_text(json.dumps(about), encoding="utf-8")
            processes.wait_for_everyone()
        about = _read_cell(kept)
        keeps_model = about.pop("model_kept", True)
        if training_processes().is_main_process:
            if not keeps_model:  # it was decided when the cell was run, maybe by a killed process
                discard(self.folder / WITHIN)
            for folder in (self.folder, self.folder.parent):
                sweep_temporary(folder)
        settings = settings_of(self.model, self.data, self.tuning, self.rank, self.recipe)
        if any(about.get(name) != settings[name] for name in settings):
            raise OutputExistsError(
                f"{self.folder} holds a cell with another {difference(about, settings)}: choose another --out"
            )
        return Cell(self.model.name, self.tuning, self.recipe.seed, about)

    def _tuned(self, progress: CellProgress | None) -> Tuned:
        name = f"{self.model.name}, {self.tuning}, seed {self.recipe.seed}"
        tell = None if progress is None else lambda found: progress(name, found)
        return finetune(
            self.model,
            self.data,
            out=self.folder,
            tuning=self.tuning,
            recipe=self.recipe,
            rank=self.rank,
            device=self.device,
            progress=tell,
        )


def _read_cell(path: Path) -> dict[str, Any]:
    """What a finished cell wrote about itself."""
    about = read_result(path)
    try:
        if about.get("attention"):
            AttentionChange.of_json(about["attention"])
    except (AttributeError, KeyError, TypeError, ValueError, DamagedError):
        raise CallError(f"{path} is damaged: delete {path.parent} and run the same call again") from None
    return about


def _seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str | bytes):
        return [seed_number(seed) for seed in seeds]
    return list(range(at_least(1, seeds, "seeds")))


def _refuse_text(value: Any, what: str, of: str) -> None:
    """A text is a sequence too: of letters, which nobody means."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise CallError(f"{what} is {value!r}: a list of {of} is expected")


def _order(
    models: Sequence[VisionModel], tunings: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[VisionModel, str, int]]:
    each = dict.fromkeys(tunings), dict.fromkeys(seeds)
    return ((model, tuning, seed) for model in models for tuning in each[0] for seed in each[1])


def _refuse_one_name_twice(names: Sequence[str]) -> None:
    """Two models of one name would share the folders of their cells."""
    plain = [plain_name(name) for name in names]
    twice = next((name for name in names if plain.count(plain_name(name)) > 1), None)
    if twice is None:
        return
    if Path(twice).is_dir():
        raise CallError(
            f"two models have the same name, {Path(twice).name}: compare different ones, or rename a model's folder"
        )
    # A tuned run is called after its model and tuning: another folder's name would not help.
    raise CallError(f"two models have the same name, {twice}: compare different ones")


def _examples(data: Data) -> list[Any]:
    """Test images of as many classes as there are examples, one after the other."""
    firsts = [np.flatnonzero(data.test.classes == one) for one in range(len(data.labels))]
    rounds = [places[at] for at in range(EXAMPLES) for places in firsts if at < len(places)]
    return [data.test.read(int(place)) for place in rounds[:EXAMPLES]]


def plain_name(name: str) -> str:
    """A name as a folder's: of a path on this machine the last part, of others all parts."""
    short = Path(name).name if Path(name).is_dir() else name
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in short)


def _means(several: Sequence[Mapping[str, float] | None]) -> Mapping[str, float] | None:
    """Of those that are there."""
    known = [one for one in several if one is not None]
    return {name: float(np.mean([one[name] for one in known])) for name in known[0]} if known else None


def _gain_json(gain: tuple[float, tuple[float, float]] | None) -> Any:
    return None if gain is None else {"value": gain[0], "interval": list(gain[1])}
